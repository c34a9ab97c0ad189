"""Tiny data sets in the real on-disk layouts."""

from __future__ import annotations

import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import scipy.io

from data.classes import load_class_table

SIZE = (40, 60)  # height, width


def _write(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), pixels)


def random_image(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return cv2.resize(coarse, size[::-1])


def random_ids(seed: int, ids: list[int], size: tuple[int, int] = SIZE) -> np.ndarray:
    coarse = np.random.default_rng(seed).choice(np.array(ids, np.uint8), (4, 6))
    return cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)


def write_ade20k(root: Path, train: int = 5, val: int = 3) -> None:
    base = root / "ADEChallengeData2016"
    for folder, split, count in (("training", "train", train), ("validation", "val", val)):
        for i in range(count):
            name = f"{folder}/ADE_{split}_{i + 1:08d}"
            _write(base / "images" / f"{name}.jpg", random_image(i))
            _write(base / "annotations" / f"{name}.png", random_ids(i, [0, 1, 2, 75, 150]))


def write_cityscapes(root: Path, train: int = 5, val: int = 3) -> None:
    for split, cities, count in (("train", "aachen ulm", train), ("val", "lindau", val)):
        for i in range(count):
            city = cities.split()[i % len(cities.split())]
            stem = f"{split}/{city}/{city}_{i:06d}_000019"
            label = root / "gtFine" / f"{stem}_gtFine"
            _write(root / "leftImg8bit" / f"{stem}_leftImg8bit.png", random_image(i))
            _write(label.with_name(f"{label.name}_labelIds.png"), random_ids(i, [0, 7, 26, 33]))
            _write(label.with_name(f"{label.name}_color.png"), random_image(i))


def write_cocostuff(root: Path, train: int = 5, val: int = 3) -> None:
    for split, count in (("train2017", train), ("val2017", val)):
        for i in range(count):
            name = f"{split}/{i + 1:012d}"
            _write(root / "images" / f"{name}.jpg", random_image(i))
            label = random_ids(i, [0, 12, 91, 181, 255])
            _write(root / "stuffthingmaps" / f"{name}.png", label)


def write_cocostuff_10k(root: Path, train: int = 5, val: int = 3) -> None:
    for folder in ("annotations", "imageLists"):
        (root / folder).mkdir(parents=True)
    stems = [f"COCO_train2014_{i + 1:012d}" for i in range(train + val)]
    for i, stem in enumerate(stems):
        _write(root / "images" / f"{stem}.jpg", random_image(i))
        label = random_ids(i, [0, 1, 13, 182])
        scipy.io.savemat(root / "annotations" / f"{stem}.mat", {"S": label})
    # Neither list is a range of the sorted names.
    (root / "imageLists/train.txt").write_text("\n".join(stems[val:][::-1]) + "\n")
    (root / "imageLists/test.txt").write_text("\n".join(stems[:val]) + "\n")


def write_camvid(root: Path) -> None:
    """Both ends of each part that SegNet's split makes of the sequences."""
    train = ["0001TP_006690", "0001TP_008520", "0006R0_f00930", "0016E5_00390", "0016E5_08640"]
    val = ["0001TP_008550", "0001TP_010380", "Seq05VD_f00000"]
    colors = load_class_table("camvid").raw_colors
    for stems in (train, val):
        for i, stem in enumerate(stems):
            _write(root / "701_StillsRaw_full" / f"{stem}.png", random_image(i))
            label = colors[random_ids(i, [0, 1, 5, 22, 31])]
            _write(root / "LabeledApproved_full" / f"{stem}_L.png", label[..., ::-1])


def write_segnet_camvid(root: Path) -> None:
    """SegNet's copy of CamVid: numbered labels."""
    for folder, count in (("train", 3), ("val", 2), ("test", 3)):
        for i in range(count):
            _write(root / folder / f"{folder}_{i}.png", random_image(i))
            _write(root / f"{folder}annot" / f"{folder}_{i}.png", random_ids(i, [0, 4, 10, 11]))


def write_imagenet(root: Path, classes: int = 4, train: int = 2, val: int = 1) -> None:
    """As many images of each class; their sizes differ."""
    for split, count in (("train", train), ("val", val)):
        for k in range(classes):
            for i in range(count):
                folder = f"n{k:08d}"
                path = root / split / folder / f"{folder}_{split}_{i}.JPEG"
                _write(path, random_image(10 * k + i, (40 + k % 3, 50 + i)))


def zip_folders(archive: Path, base: Path, *folders: str) -> None:
    """Move folders below `base` into a zip that holds their names as they are from `base`."""
    with zipfile.ZipFile(archive, "w") as target:
        for folder in folders:
            for file in sorted((base / folder).rglob("*")):
                target.write(file, file.relative_to(base))
    for folder in folders:
        shutil.rmtree(base / folder)


WRITERS = {
    "ade20k": write_ade20k,
    "camvid": write_camvid,
    "cityscapes": write_cityscapes,
    "cocostuff": write_cocostuff,
    "cocostuff 10k": write_cocostuff_10k,
}


def zip_dataset(name: str, root: Path) -> None:
    """Replace the unpacked folders of a data set by its official zips."""
    if name == "ade20k":
        zip_folders(root / "ADEChallengeData2016.zip", root, "ADEChallengeData2016")
    elif name == "camvid":
        zip_folders(root / "701_StillsRaw_full.zip", root, "701_StillsRaw_full")
        zip_folders(root / "LabeledApproved_full.zip", root / "LabeledApproved_full", "")
    elif name == "cityscapes":
        for folder in ("leftImg8bit", "gtFine"):
            zip_folders(root / f"{folder}_trainvaltest.zip", root, folder)
    elif name == "cocostuff":
        for split in ("train2017", "val2017"):
            zip_folders(root / f"{split}.zip", root / "images", split)
        labels = root / "stuffthingmaps_trainval2017.zip"
        zip_folders(labels, root / "stuffthingmaps", "train2017", "val2017")
    else:
        archive = root / "cocostuff-10k-v1.1.zip"
        zip_folders(archive, root, "images", "annotations", "imageLists")
