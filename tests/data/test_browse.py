"""Contact sheets: which samples are on them, and that picture and page show what they hold."""

from __future__ import annotations

import re
import zlib
from base64 import b64decode

import cv2
import numpy as np
import pytest
from PIL import Image

import data
from data import browse
from data.browse import color_mask, draw_sheet, legend, main, read_samples, write_samples
from data.sampling import EndlessBatchSampler
from pages import unpack
from tests.callbacks.browser import Browser, find_browser
from tests.data.layouts import write_imagenet

pytestmark = pytest.mark.filterwarnings("ignore:.*officially")


def read_page(path):
    (packed,) = re.findall(r'id="data-samples">([^<]*)<', path.read_text())
    return unpack(packed)


def decode_mask(sample):
    flat = np.frombuffer(zlib.decompress(b64decode(sample["mask"])), np.uint8)
    return flat.reshape(sample["height"], sample["width"])


def test_training_samples_are_those_that_a_network_sees(open_small):
    module = open_small("ade20k")
    keys = next(iter(EndlessBatchSampler(5, 8, seed=module.seed, start=2 * 5 + 3)))
    images = module.training_images()
    samples = list(read_samples(module, "train", first=3, count=8, epoch=2))
    for sample, (epoch, index) in zip(samples, keys, strict=True):
        wanted = images[epoch, index]
        np.testing.assert_array_equal(sample.image, wanted["image"])
        np.testing.assert_array_equal(sample.mask, wanted["mask"])
        assert sample.title == f"{wanted['name']} (epoch {epoch}, image {index}), 32x32"
        for label, share in sample.shares.items():
            assert share == np.mean(wanted["mask"] == label)
        assert sum(sample.shares.values()) == pytest.approx(1)
        assert list(sample.shares.values()) == sorted(sample.shares.values(), reverse=True)


def test_evaluation_samples_end_with_the_last(open_small):
    module = open_small("ade20k", eval_scale=(30, 20))
    samples = list(read_samples(module, "val", first=1, count=24))
    assert [s.title for s in samples] == [
        f"ADE_val_0000000{i + 1} (image {i}), 30x20" for i in (1, 2)
    ]
    assert samples[0].mask.shape == (40, 60)  # as it is scored


def test_masks_of_superpatches_are_shown_at_the_size_of_the_image(open_small):
    module = open_small("ade20k", superpatches="all")
    (sample,) = read_samples(module, "val", first=0, count=1)
    assert sample.image.shape == (40, 60, 3)
    wanted = module.val_dataloader().dataset[0]["mask"]
    assert wanted.shape == (2, 2)
    assert sum(sample.shares.values()) == 1
    for row, column in np.ndindex(2, 2):
        block = sample.mask[32 * row : 32 * (row + 1), 32 * column : 32 * (column + 1)]
        assert (block == wanted[row, column]).all()
    assert sample.mask.shape == (40, 60)


def test_images_of_one_class_are_named_by_it(tmp_path):
    write_imagenet(tmp_path)
    module = data.create_data_module("imagenet", root=tmp_path, workers=0, crop_size=(28, 28))
    samples = list(read_samples(module, "val", first=0, count=4))
    assert [sample.mask for sample in samples] == [None] * 4
    entries = legend(samples, module.classes)
    assert [(entry["name"], entry["share"]) for entry in entries] == [
        (f"n0000000{k}", 0.25) for k in range(4)
    ]
    sheet = np.asarray(draw_sheet(samples, module.classes))
    assert sheet.shape[1] < 4 * (32 + 30)  # the images alone, side by side
    page = read_page(write_samples(tmp_path / "page.html", "t", samples, module.classes))
    assert [sample["mask"] for sample in page["samples"]] == [None] * 4
    assert [sample["shares"] for sample in page["samples"]] == [[[k, 1]] for k in range(4)]


def test_masks_have_the_colors_of_their_classes_and_stripes_where_ignored(open_small):
    classes = open_small("cityscapes").classes
    mask = np.repeat(np.uint8([[0, 13, 255]]), 8, axis=0).repeat(8, axis=1)
    colored = color_mask(mask, classes)
    assert (colored[:, :8] == classes.palette[0]).all()
    assert (colored[:, 8:16] == classes.palette[13]).all()
    greys = colored[:, 16:]
    assert (greys.max(axis=2) == greys.min(axis=2)).all()
    assert {tuple(color) for color in greys.reshape(-1, 3)} == {(70,) * 3, (150,) * 3}
    assert (greys[0] != greys[4]).all()


def test_the_command_writes_a_picture_and_a_page(open_small, tmp_path, capsys):
    open_small("cityscapes")
    arguments = ["data=cityscapes", f"data.root={tmp_path}", "data.crop_size=[32,48]", "count=3"]
    arguments += ["data.train_scale=[60,40]", "data.scale_range=[0.5,0.5]"]  # 30x20: padded
    assert main([*arguments, f"output={tmp_path / 'out'}"]) == 0
    picture, page = (tmp_path / "out" / f"cityscapes_train.{kind}" for kind in ("png", "html"))
    assert capsys.readouterr().out.splitlines() == [str(picture), str(page)]

    content = read_page(page)
    assert content["ignored"] == 255
    assert len(content["samples"]) == 3
    table = {one["label"]: one for one in content["classes"]}
    assert (table[255]["name"], table[255]["color"]) == ("ignored", None)
    assert (table[0]["name"], table[0]["color"]) == ("road", [128, 64, 128])
    sheet = np.asarray(Image.open(picture))
    for number, sample in enumerate(content["samples"]):
        mask = decode_mask(sample)
        assert mask.shape == (32, 48)
        assert (mask[20:] == 255).all()
        shares = {label: pytest.approx(np.mean(mask == label)) for label in np.unique(mask)}
        assert dict(sample["shares"]) == shares
        image = cv2.imdecode(np.frombuffer(b64decode(sample["jpeg"]), np.uint8), cv2.IMREAD_COLOR)
        assert image.shape == (32, 48, 3)
        np.testing.assert_allclose(image[24:, 8:40, ::-1].mean((0, 1)), (124, 116, 104), atol=4)
        left = browse._GAP + number * (3 * 48 + browse._GAP)
        top = browse._GAP + browse._LINE
        panels = sheet[top : top + 32, left : left + 3 * 48]
        np.testing.assert_array_equal(
            panels[:, 48:96], color_mask(mask, data.Cityscapes(tmp_path).classes)
        )
        assert (panels[20:, :48] == (124, 116, 104)).all()


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("split=test", "split=test: Have: train, val"),
        ("count=0", "count=0: give a whole number, 1 or more"),
        ("first=-1", "first=-1: give a whole number, 0 or more"),
        ("coumt=3", "unknown argument 'coumt=3': did you mean 'count'?"),
        ("data.rot=x", "data.rot"),
        ("first=3", "first=3: there are 3 evaluation images"),
    ],
)
def test_slips_are_named(argument, message, open_small, tmp_path, capsys):
    open_small("ade20k")
    split = [] if argument.startswith("split") else ["split=val"]
    output = tmp_path / "out"
    assert main(["data=ade20k", f"data.root={tmp_path}", f"output={output}", *split, argument]) == 2
    assert message in capsys.readouterr().err
    assert not output.exists()


@pytest.fixture
def browser(tmp_path_factory):
    pytest.importorskip("aiohttp", reason="the browser is told what to do by aiohttp")
    if find_browser() is None:
        pytest.skip("no chromium or google-chrome on the path")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


def test_the_page_in_a_browser(browser, open_small, tmp_path):
    module = open_small("ade20k")
    samples = list(read_samples(module, "train", first=0, count=5))
    page = write_samples(tmp_path / "page.html", "<Trees>", samples, module.classes)
    browser.open(page)
    assert browser.run("document.querySelector('h1').textContent") == "<Trees>"
    # Images and colours of what is in sight are drawn, each pixel in its class's colour.
    browser.wait("document.querySelector('canvas').width === 32")
    pixels = "document.querySelector('canvas').getContext('2d').getImageData(0, 0, 32, 32).data"
    drawn = np.uint8(browser.run(f"[...{pixels}]")).reshape(32, 32, 4)
    np.testing.assert_array_equal(drawn[..., :3], color_mask(samples[0].mask, module.classes))
    assert (drawn[..., 3] == 255).all()

    # A click on a class leaves the samples that have it, and colours nothing else.
    label = next(k for k in samples[0].shares if k != 255)
    name = module.class_names[label]
    having = sum(label in sample.shares for sample in samples)
    entries = "[...document.querySelectorAll('figure .class')]"
    chip = f"{entries}.find((entry) => entry.textContent.startsWith('{name}'))"
    browser.run(f"{chip}.click()")
    assert browser.run("document.getElementById('shown').textContent") == f"{having} of 5"
    browser.wait(f"[...{pixels}].some((value, i) => i % 4 === 3 && value === 0)")
    drawn = np.uint8(browser.run(f"[...{pixels}]")).reshape(32, 32, 4)
    np.testing.assert_array_equal(drawn[..., 3] == 255, samples[0].mask == label)

    browser.run("document.querySelector('.both').click()")
    hidden = "getComputedStyle(document.querySelector('canvas')).visibility"
    assert browser.run(hidden) == "hidden"
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]
