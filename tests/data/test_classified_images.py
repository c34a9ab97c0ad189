"""Images of one class each, in a folder for each class."""

from __future__ import annotations

import itertools
import shutil
import warnings

import cv2
import numpy as np
import pytest
import torch

import data
from segtrain.errors import UserError
from tests.data.layouts import random_image, write_imagenet

pytestmark = pytest.mark.filterwarnings("ignore:.*(officially|many workers)")


@pytest.fixture
def open_imagenet(tmp_path):
    """Write it under tmp_path (once) and open it."""

    def open_imagenet(classes: int = 4, **options) -> data.ImageNet:
        if not any(tmp_path.iterdir()):
            write_imagenet(tmp_path, classes)
        options = {"batch_size": 3, "workers": 0, "crop_size": (28, 28)} | options
        return data.create_data_module("imagenet", root=tmp_path, **options)

    return open_imagenet


def take(imagenet: data.ImageNet, batches: int) -> list[dict]:
    return list(itertools.islice(imagenet.train_dataloader(), batches))


def test_batches_are_those_of_segmentation_with_one_pixel(open_imagenet):
    imagenet = open_imagenet()
    imagenet.check()
    assert imagenet.class_names == ("n00000000", "n00000001", "n00000002", "n00000003")
    assert imagenet.palette.shape == (4, 3)
    assert imagenet.image_size_for_cost == (28, 28)
    (batch,) = take(imagenet, 1)
    assert batch["image"].shape == (3, 28, 28, 3)
    assert batch["image"].dtype == torch.uint8
    assert batch["mask"].shape == (3, 1, 1)
    assert batch["mask"].dtype == torch.int64
    on_device = imagenet.on_after_batch_transfer(batch, 0)
    assert on_device["image"].shape == (3, 3, 28, 28)
    assert torch.equal(on_device["mask"], batch["mask"])
    (evaluation,) = imagenet.val_dataloader()
    assert set(evaluation) == {"image", "mask", "name", "index"}
    assert evaluation["mask"].flatten().tolist() == [0, 1, 2, 3]
    assert evaluation["name"][1] == "n00000001_val_0"


def test_the_class_of_an_image_is_its_folder(open_imagenet):
    for batch in take(open_imagenet(workers=1), 8):
        for name, mask in zip(batch["name"], batch["mask"], strict=True):
            assert name.startswith(f"n{int(mask):08d}_train_")


def test_more_classes_than_a_byte_has_values(open_imagenet):
    imagenet = open_imagenet(classes=300, eval_batch_size=300)
    assert imagenet.num_classes == 300
    assert imagenet.ignore_index == -1  # 255 is a class
    (batch,) = imagenet.val_dataloader()
    assert batch["mask"].flatten().tolist() == list(range(300))


def test_evaluation_takes_the_centre_of_256_for_224(open_imagenet, tmp_path):
    path = tmp_path / "val/n00000000/n00000000_val_0.JPEG"
    image = cv2.resize(random_image(0), (192, 128))
    imagenet = open_imagenet(crop_size=(56, 56))
    assert cv2.imwrite(str(path), image, [cv2.IMWRITE_JPEG_QUALITY, 100])
    (batch,) = imagenet.val_dataloader()
    small = cv2.resize(image[..., ::-1], (96, 64), interpolation=cv2.INTER_AREA)
    assert np.abs(batch["image"][0].numpy() - small[4:60, 20:76].astype(int)).mean() < 2


def test_training_takes_windows_of_the_image_and_flips_them(open_imagenet, tmp_path):
    """On an image whose colours say where a pixel is."""
    shutil.rmtree(tmp_path / "val", ignore_errors=True)
    imagenet = open_imagenet(classes=1, batch_size=1)
    rows, columns = np.mgrid[0:200, 0:240].astype(np.uint8)
    for path in (tmp_path / "train/n00000000").iterdir():
        pixels = np.stack([np.zeros_like(rows), rows, columns], -1)
        assert cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 100])
    shares, flips, centres = [], [], []
    for batch in take(imagenet, 200):
        red, green, _ = batch["image"][0].numpy().astype(float).transpose(2, 0, 1)
        width = (red[:, -1] - red[:, 0]).mean() * 28 / 27
        height = (green[-1] - green[0]).mean() * 28 / 27
        flips.append(width < 0)
        shares.append(abs(width) * height / (200 * 240))
        centres.append((green.mean(), red.mean()))
        assert 0.65 < abs(width) / height < 1.5
    assert 0.05 < min(shares) < 0.15
    assert 0.85 < max(shares) < 1.05
    assert np.mean(flips) == pytest.approx(0.5, abs=0.12)
    assert (np.ptp(centres, axis=0) > 60).all()


def test_samples_depend_on_epoch_and_index_alone(open_imagenet):
    expected = take(open_imagenet(), 8)
    for options in ({"workers": 2}, {"batch_size": 1}):
        batches = take(open_imagenet(**options), 24 // options.get("batch_size", 3))
        for key in ("image", "mask", "epoch", "index"):
            one, other = (torch.cat([b[key] for b in run]) for run in (batches, expected))
            assert torch.equal(one, other)
    images = torch.cat([batch["image"] for batch in expected]).flatten(1)
    assert len(torch.unique(images, dim=0)) == len(images)


@pytest.mark.parametrize("photometric", [True, "pil"])
def test_colours_may_be_distorted(open_imagenet, photometric):
    plain, distorted = take(open_imagenet(), 2), take(open_imagenet(photometric=photometric), 2)
    assert any(
        not torch.equal(a["image"], b["image"]) for a, b in zip(plain, distorted, strict=True)
    )


def test_classes_count_their_training_images(open_imagenet, tmp_path):
    (tmp_path / "train/n00000009").mkdir(parents=True)  # a class without images
    write_imagenet(tmp_path)
    (tmp_path / "train/n00000002/n00000002_train_1.JPEG").unlink()
    (tmp_path / "train/n00000001/notes.txt").touch()
    assert open_imagenet().class_counts().tolist() == [2, 2, 1, 2, 0]


def test_an_evaluation_class_that_training_lacks(open_imagenet, tmp_path):
    imagenet = open_imagenet()
    shutil.rmtree(tmp_path / "train/n00000002")
    message = f"found: 1 folders of {tmp_path}/val are not in {tmp_path}/train, the first is n0*2"
    with pytest.raises(UserError, match=message):
        imagenet.check()


def test_evaluation_images_as_the_archive_has_them(open_imagenet, tmp_path):
    imagenet = open_imagenet()
    for path in (tmp_path / "val").rglob("*.JPEG"):
        path.rename(tmp_path / "val" / path.name)
    for folder in (tmp_path / "val").glob("n????????"):
        folder.rmdir()
    with pytest.raises(UserError, match=r"found: no folders of classes in .*/val\n"):
        imagenet.check()


def test_missing_files(open_imagenet, tmp_path):
    with pytest.raises(UserError, match=r"found: no folder .*nowhere\n  get it: ILSVRC2012"):
        data.ImageNet(tmp_path / "nowhere").check()
    imagenet = open_imagenet()
    for path in (tmp_path / "val").rglob("*.JPEG"):
        path.unlink()
    with pytest.raises(UserError, match=r"found: no \.JPEG files in the 4 folders of .*/val\n"):
        imagenet.check()


def test_a_damaged_image(open_imagenet, tmp_path):
    imagenet = open_imagenet()
    path = tmp_path / "val/n00000001/n00000001_val_0.JPEG"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(UserError, match=f"{path} is damaged or cut short"):
        list(imagenet.val_dataloader())


@pytest.mark.parametrize("option", ["train_scale", "eval_scale", "cat_max_ratio", "options"])
def test_options_of_segmentation_are_refused(open_imagenet, option):
    with pytest.raises(UserError, match=f"data set 'imagenet'.*{option}"):
        open_imagenet(**{option: None})


def test_albumentations_knows_every_argument_it_is_given(open_imagenet):
    """It only warns about others, and would go on with its defaults."""
    imagenet = open_imagenet(photometric=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        imagenet.training_images()
        imagenet.evaluation_images()
