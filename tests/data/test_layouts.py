"""Official layouts, unpacked and zipped, and what happens when they are not as they should be."""

from __future__ import annotations

import multiprocessing
import zipfile

import cv2
import numpy as np
import pytest

import data
from data.files import Place
from segtrain.errors import UserError
from tests.data.layouts import (
    SIZE,
    WRITERS,
    random_ids,
    random_image,
    write_segnet_camvid,
    zip_dataset,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*officially:UserWarning")


def samples(data_module: data.SegmentationData) -> list[dict]:
    return list(data_module.val_dataloader())


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("workers", [0, 2])
def test_zips_give_the_same_samples_as_folders(open_small, tmp_path, name, workers):
    unpacked = open_small(name)
    unpacked.check()
    expected = samples(unpacked)
    zip_dataset(name, tmp_path)
    zipped = open_small(name, workers=workers)
    zipped.check()
    loaded = samples(zipped)
    assert [batch["name"] for batch in loaded] == [batch["name"] for batch in expected]
    for batch, other in zip(loaded, expected, strict=True):
        np.testing.assert_array_equal(batch["image"], other["image"])
        np.testing.assert_array_equal(batch["mask"], other["mask"])
    assert len(loaded) == 3
    train = zipped.train_dataloader().dataset
    assert len(train) == 5


@pytest.mark.parametrize(
    ("name", "raw_to_train"),
    [
        ("ade20k", {0: 255, 1: 0, 2: 1, 75: 74, 150: 149}),
        ("camvid", {0: 255, 1: 9, 5: 1, 22: 0, 31: 1}),
        ("cityscapes", {0: 255, 7: 0, 26: 13, 33: 18}),
        ("cocostuff", {0: 0, 12: 11, 91: 80, 181: 170, 255: 255}),
        ("cocostuff 10k", {0: 255, 1: 0, 13: 11, 182: 170}),  # COCO ids, not PNG values
    ],
)
def test_pixels_and_ids_are_those_of_the_files(open_small, name, raw_to_train):
    for i, batch in enumerate(samples(open_small(name))):
        raw = random_ids(i, list(raw_to_train))
        expected = np.vectorize(raw_to_train.get)(raw)
        np.testing.assert_array_equal(batch["mask"][0], expected)
        error = np.abs(batch["image"][0].numpy().astype(int) - random_image(i)[..., ::-1]).mean()
        assert error < (1 if name in ("camvid", "cityscapes") else 8)  # the others are JPEG


def test_camvid_is_split_by_sequence(open_small):
    camvid = open_small("camvid")
    names = {
        split: [stem for stem, _, _ in camvid.find_split(split).files] for split in ("train", "val")
    }
    assert names == {
        "train": [
            "0001TP_006690",
            "0001TP_008520",
            "0006R0_f00930",
            "0016E5_00390",
            "0016E5_08640",
        ],
        "val": ["0001TP_008550", "0001TP_010380", "Seq05VD_f00000"],
    }


def test_camvid_as_segnet_has_it(tmp_path):
    write_segnet_camvid(tmp_path)
    camvid = data.CamVid(tmp_path, workers=0)
    camvid.check()
    assert camvid.image_size_for_cost == (360, 480)
    stems = [stem for stem, _, _ in camvid.find_split("train").files]
    assert stems == ["train_0", "train_1", "train_2", "val_0", "val_1"]
    for i, batch in enumerate(samples(camvid)):
        assert batch["name"] == [f"test_{i}"]
        raw = random_ids(i, [0, 4, 10, 11])
        np.testing.assert_array_equal(batch["mask"][0], np.where(raw == 11, 255, raw))


@pytest.mark.parametrize("workers", [0, 1])
def test_a_colour_of_no_class(open_small, tmp_path, workers):
    camvid = open_small("camvid", workers=workers)
    path = tmp_path / "LabeledApproved_full/0001TP_008550_L.png"
    label = cv2.imread(str(path))
    label[3, 4] = (66, 128, 64)
    cv2.imwrite(str(path), label)
    with pytest.raises(UserError) as error:
        samples(camvid)
    message = f"{path}: no class has the colour (64, 128, 66). Put back the label files"
    assert str(error.value).startswith(message)


def test_ade20k_root_may_be_the_folder_itself(open_small, tmp_path):
    outer = samples(open_small("ade20k"))
    inner = samples(open_small("ade20k", root=tmp_path / "ADEChallengeData2016"))
    assert [batch["name"] for batch in inner] == [batch["name"] for batch in outer]


def test_ten_thousand_follow_the_image_lists(open_small):
    data_module = open_small("cocostuff 10k")
    names = [batch["name"][0] for batch in samples(data_module)]
    assert names == [f"COCO_train2014_{i:012d}" for i in (1, 2, 3)]


def test_converted_labels_are_used_only_without_originals(open_small, tmp_path):
    expected = [batch["mask"].numpy() for batch in samples(open_small("cocostuff"))]
    folder = tmp_path / "stuffthingmaps/val2017"
    originals = sorted(folder.glob("*.png"))
    for path, mask in zip(originals, expected, strict=True):
        converted = path.with_name(f"{path.stem}_labelTrainIds.png")
        assert cv2.imwrite(str(converted), mask[0])
    both = [batch["mask"].numpy() for batch in samples(open_small("cocostuff"))]
    np.testing.assert_array_equal(both, expected)
    for path in originals:
        path.unlink()
    converted = [batch["mask"].numpy() for batch in samples(open_small("cocostuff"))]
    np.testing.assert_array_equal(converted, expected)


def test_another_count_than_the_official_one_is_one_warning(open_small):
    with pytest.warns(UserWarning, match="officially") as caught:
        open_small("cityscapes").check(["val"])
    assert [str(w.message) for w in caught] == [
        f"Cityscapes val: 3 images in {open_small('cityscapes').root}, officially 500"
    ]


@pytest.mark.parametrize("name", WRITERS)
def test_missing_root(tmp_path, name):
    options = {"variant": "10k"} if name.endswith("10k") else {}
    data_module = data.create_data_module(name.split()[0], root=tmp_path / "nowhere", **options)
    with pytest.raises(UserError) as error:
        data_module.check()
    title, expected, found, get_it = str(error.value).splitlines()
    assert title == f"{data_module.title} is missing or incomplete in {tmp_path / 'nowhere'}"
    assert expected.startswith("  expected: ")
    assert found == f"  found: no folder {tmp_path / 'nowhere'}"
    assert ".zip" in get_it
    assert "http" in get_it


def test_half_unpacked_split_is_counted(open_small, tmp_path):
    data_module = open_small("ade20k")
    images = tmp_path / "ADEChallengeData2016/images/training"
    for path in sorted(images.iterdir())[2:]:
        path.unlink()
    with pytest.raises(UserError) as error:
        data_module.check()
    message = str(error.value)
    assert f"2 .jpg files in {images}, 5 .png files in" in message
    assert "3 labels have no image, the first is ADE_train_00000003" in message


def test_empty_split(open_small, tmp_path):
    data_module = open_small("cityscapes")
    for folder in ("leftImg8bit", "gtFine"):
        (tmp_path / folder / "val").rename(tmp_path / folder / "away")
    data_module.check(["train"])
    with pytest.raises(UserError, match=r"found: 0 _leftImg8bit.png files in .*val"):
        data_module.check()


def test_one_missing_label_does_not_shift_the_pairs(open_small, tmp_path):
    data_module = open_small("cocostuff")
    (tmp_path / "stuffthingmaps/val2017/000000000002.png").unlink()
    with pytest.raises(UserError, match=r"1 images have no label, the first is 000000000002"):
        data_module.check()


def test_cut_short_zip(open_small, tmp_path):
    open_small("ade20k")
    zip_dataset("ade20k", tmp_path)
    archive = tmp_path / "ADEChallengeData2016.zip"
    archive.write_bytes(archive.read_bytes()[:-200])
    with pytest.raises(UserError, match=r"ADEChallengeData2016\.zip is not a complete zip"):
        open_small("ade20k").check()


def read_all(place: Place, contents: dict[str, bytes]) -> None:
    for _ in range(20):
        for name, content in contents.items():
            assert place.read(name) == content


def test_forked_processes_read_one_zip_at_once(tmp_path):
    """An open zip has one file position, which forked processes would share."""
    generator = np.random.default_rng(0)
    contents = {f"{i}.png": generator.bytes(30000) for i in range(40)}
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name, content in contents.items():
            archive.writestr(name, content)
    place = Place(tmp_path / "images.zip")
    assert place.names(".png") == sorted(contents)  # opens it before the fork
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=read_all, args=(place, contents)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]


def test_damaged_file_in_a_zip(open_small, tmp_path):
    open_small("ade20k")
    zip_dataset("ade20k", tmp_path)
    archive = tmp_path / "ADEChallengeData2016.zip"
    content = bytearray(archive.read_bytes())
    image = content.index(b"images/validation/ADE_val_00000001.jpg")
    content[image + 200] ^= 0xFF
    archive.write_bytes(content)
    with pytest.raises(UserError, match=r"ADE_val_00000001.jpg is damaged: get ADEChallenge"):
        samples(open_small("ade20k"))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("ade20k", "ADEChallengeData2016/images/validation/ADE_val_00000002.jpg"),
        ("ade20k", "ADEChallengeData2016/annotations/validation/ADE_val_00000002.png"),
        ("camvid", "LabeledApproved_full/0001TP_008550_L.png"),
        ("cityscapes", "leftImg8bit/val/lindau/lindau_000001_000019_leftImg8bit.png"),
        ("cocostuff 10k", "annotations/COCO_train2014_000000000002.mat"),
    ],
)
def test_truncated_file(open_small, tmp_path, name, file, workers):
    data_module = open_small(name, workers=workers)
    path = tmp_path / file
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError) as error:
        samples(data_module)
    assert str(error.value) == (
        f"{path} is damaged or cut short: replace it by a fresh copy from the data set's archive"
    )


def test_empty_file(open_small, tmp_path):
    data_module = open_small("ade20k")
    path = tmp_path / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg"
    path.write_bytes(b"")
    with pytest.raises(UserError, match="damaged"):
        samples(data_module)


@pytest.mark.parametrize("workers", [0, 1])
def test_label_of_another_data_set(open_small, tmp_path, workers):
    data_module = open_small("cityscapes", workers=workers)
    path = tmp_path / "gtFine/val/lindau/lindau_000000_000019_gtFine_labelIds.png"
    cv2.imwrite(str(path), random_ids(0, [0, 18, 255]))
    with pytest.raises(UserError) as error:
        samples(data_module)
    assert str(error.value).startswith(f"{path}: label ids 255 are outside the table")


def test_coloured_label(open_small, tmp_path):
    data_module = open_small("ade20k")
    path = tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"
    cv2.imwrite(str(path), random_image(0))
    with pytest.raises(UserError, match="one 8-bit channel"):
        samples(data_module)


def test_label_of_another_size(open_small, tmp_path):
    data_module = open_small("ade20k")
    path = tmp_path / "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png"
    cv2.imwrite(str(path), random_ids(0, [1, 2], (SIZE[0], SIZE[1] - 1)))
    with pytest.raises(UserError, match=r"ADE_val_00000001.png is 59x40 but .* is 60x40"):
        samples(data_module)


def test_batch_of_different_sizes(open_small, tmp_path):
    data_module = open_small("ade20k", eval_batch_size=3)
    base = tmp_path / "ADEChallengeData2016"
    cv2.imwrite(str(base / "images/validation/ADE_val_00000003.jpg"), random_image(0, (30, 30)))
    label = random_ids(0, [1], (30, 30))
    cv2.imwrite(str(base / "annotations/validation/ADE_val_00000003.png"), label)
    with pytest.raises(UserError, match=r"Set data\.eval_batch_size=1"):
        samples(data_module)


def test_exif_rotation_is_ignored(open_small, tmp_path):
    """Labels carry no EXIF, so a rotated image would no longer fit its label."""
    data_module = open_small("ade20k")
    before = samples(data_module)[0]["image"]
    path = tmp_path / "ADEChallengeData2016/images/validation/ADE_val_00000001.jpg"
    content = path.read_bytes()
    rotate_by_90 = bytes.fromhex("4d4d002a00000008000101120003000000010006000000000000")
    exif = b"Exif\0\0" + rotate_by_90
    path.write_bytes(content[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2) + exif + content[2:])
    rotated = cv2.imread(str(path))
    assert rotated.shape[:2] == SIZE[::-1]  # the tag is one that readers follow
    np.testing.assert_array_equal(samples(data_module)[0]["image"], before)


def test_unknown_names():
    with pytest.raises(UserError, match="did you mean 'cityscapes'"):
        data.create_data_module("cityscape", root="x")
    with pytest.raises(UserError, match="164k, 10k"):
        data.COCOStuff("x", variant="9k")
    with pytest.raises(UserError, match="did you mean 'ade20k'"):
        data.Scenes("x", layout="ade")


def test_costs_are_of_images_as_they_are_evaluated(tmp_path):
    assert data.ADE20K(tmp_path).image_size_for_cost == (512, 512)
    assert data.ADE20K(tmp_path, eval_scale=(2048, 640)).image_size_for_cost == (640, 640)
    assert data.CamVid(tmp_path).image_size_for_cost == (720, 960)
    assert data.Cityscapes(tmp_path).image_size_for_cost == (1024, 2048)
    assert data.Cityscapes(tmp_path, eval_scale=(1024, 512)).image_size_for_cost == (512, 1024)
