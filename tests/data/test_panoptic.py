"""Panoptic ground truth in the files of ADE20K and Cityscapes."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest

import data
from segtrain.errors import UserError
from tests.data.layouts import SIZE

pytestmark = pytest.mark.filterwarnings("ignore:.*officially:UserWarning")

VOID = 255
#: id, category id, crowd, part of the image; the rest has no segment.
CITYSCAPES = [
    (7, 7, 0, np.s_[30:, :]),
    (26001, 26, 0, np.s_[10:20, 5:15]),
    (26002, 26, 0, np.s_[10:20, 15:25]),
    (24, 24, 1, np.s_[10:20, 40:50]),
]
ADE20K = [
    (8, 8, 0, np.s_[:10, :]),
    (3 + 256 * 20, 37, 0, np.s_[10:20, :30]),
    (5 + 256 * 7 + 65536 * 250, 12, 0, np.s_[20:30, 7:9]),
]


def write_panoptic(folder, name, stems, suffix, categories, segments):
    """What panopticapi writes: a JSON file, and PNGs in a folder of the same name."""
    annotations = []
    for stem in stems:
        ids = np.zeros(SIZE, np.int64)
        infos = []
        for identity, category, crowd, part in segments:
            ids[part] = identity
            infos.append({"id": identity, "category_id": category, "iscrowd": crowd, "area": 1})
        file = f"{stem}{suffix}"
        annotations.append({"image_id": stem, "file_name": file, "segments_info": infos})
        (folder / name).mkdir(parents=True, exist_ok=True)
        colors = np.stack([ids // 65536, ids // 256 % 256, ids % 256], axis=-1)  # OpenCV's order
        assert cv2.imwrite(str(folder / name / file), colors.astype(np.uint8))
    told = {"images": [], "annotations": annotations, "categories": categories}
    (folder / f"{name}.json").write_text(json.dumps(told))


def write_cityscapes(root, name="cityscapes_panoptic_val", by_train_id=False):
    ids = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
    class_names = data.Cityscapes.table.class_names
    number = {raw: i if by_train_id else raw for i, raw in enumerate(ids)}
    categories = [
        {"id": number[raw], "name": name, "isthing": int(raw >= 24)}
        for raw, name in zip(ids, class_names, strict=True)
    ]
    segments = [(i, number[category], crowd, part) for i, category, crowd, part in CITYSCAPES]
    stems = [f"lindau_{i:06d}_000019" for i in range(3)]
    write_panoptic(root / "gtFine", name, stems, "_gtFine_panoptic.png", categories, segments)


def write_ade20k(folder):
    categories = [
        {"id": i, "name": name, "isthing": int(i in (8, 12, 37))}
        for i, name in enumerate(data.ADE20K.table.class_names)
    ]
    categories[6]["name"] = "road, route"
    categories[8]["name"] = "window "
    categories[37]["name"] = "tub"
    stems = [f"ADE_val_{i:08d}" for i in (1, 2, 3)]
    write_panoptic(folder, "ade20k_panoptic_val", stems, ".png", categories, ADE20K)


def check_batches(data_module, expected):
    """Each of `expected`: class, instance, part of the image."""
    truth = np.zeros((*SIZE, 2), np.int32)
    truth[..., 0] = VOID
    for category, identity, part in expected:
        truth[part] = category, identity
    batches = list(data_module.val_dataloader())
    assert len(batches) == 3
    for batch in batches:
        np.testing.assert_array_equal(batch["segments"][0], truth)
        assert batch["mask"].shape == (1, *SIZE)


@pytest.mark.parametrize("by_train_id", [False, True])
@pytest.mark.parametrize("workers", [0, 1])
def test_cityscapes(open_small, tmp_path, by_train_id, workers):
    data_module = open_small("cityscapes", panoptic=True, workers=workers)
    name = "cityscapes_panoptic_val" + "_trainId" * by_train_id
    write_cityscapes(tmp_path, name, by_train_id)
    data_module.check()
    assert data_module.things == tuple(range(11, 19))
    parts = [part for *_, part in CITYSCAPES]
    expected = [(0, 7), (13, 26001), (13, 26002), (VOID, 11 + 1)]  # the last one is a crowd
    check_batches(data_module, [(*e, part) for e, part in zip(expected, parts, strict=True)])


@pytest.mark.parametrize("where", ["ADEChallengeData2016", "."])
def test_ade20k(open_small, tmp_path, where):
    data_module = open_small("ade20k", panoptic=True)
    write_ade20k(tmp_path / where)
    data_module.check()
    assert data_module.things == (8, 12, 37)
    check_batches(data_module, [(category, i, part) for i, category, _, part in ADE20K])


def test_only_where_asked_for(open_small, tmp_path):
    data_module = open_small("ade20k")
    write_ade20k(tmp_path)
    assert data_module.things is None
    assert "segments" not in next(iter(data_module.val_dataloader()))
    with pytest.raises(UserError, match="no argument 'panoptic'"):
        data.create_data_module("cocostuff", root=tmp_path, panoptic=True)
    with pytest.raises(UserError, match="exclude each other"):
        open_small("ade20k", panoptic=True, superpatches="all")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("ade20k", ["ade20k_panoptic_val.json", "prepare_ade20k_pan_seg.py"]),
        ("cityscapes", ["cityscapes_panoptic_val.json", "csCreatePanopticImgs"]),
    ],
)
def test_missing_files(open_small, tmp_path, name, words):
    data_module = open_small(name, panoptic=True)
    data_module.check(["train"])
    with pytest.raises(UserError, match=r"data\.panoptic=true, but") as error:
        data_module.check()
    for word in [*words, "found: no ", str(tmp_path)]:
        assert word in str(error.value)


def test_some_images_are_not_described(open_small, tmp_path):
    data_module = open_small("cityscapes", panoptic=True)
    write_cityscapes(tmp_path)
    path = tmp_path / "gtFine/cityscapes_panoptic_val.json"
    told = json.loads(path.read_text())
    del told["annotations"][1]
    path.write_text(json.dumps(told))
    with pytest.raises(UserError, match=r"without 1 of the .*; the first is lindau_000001_000019"):
        data_module.check()
    limited = open_small("cityscapes", panoptic=True, limit_eval=1)
    limited.check()  # those that are used are all there


def test_unknown_category(open_small, tmp_path):
    data_module = open_small("ade20k", panoptic=True)
    write_ade20k(tmp_path)
    path = tmp_path / "ade20k_panoptic_val.json"
    path.write_text(path.read_text().replace('"tub"', '"unicorn, horse"'))
    with pytest.raises(UserError, match="category 'unicorn, horse' is none of the classes"):
        data_module.check()


def test_damaged_json(open_small, tmp_path):
    data_module = open_small("ade20k", panoptic=True)
    write_ade20k(tmp_path)
    path = tmp_path / "ade20k_panoptic_val.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(UserError, match="damaged or not in COCO's panoptic format"):
        data_module.check()


def test_pngs_that_do_not_fit(open_small, tmp_path):
    data_module = open_small("ade20k", panoptic=True)
    write_ade20k(tmp_path)
    path = tmp_path / "ade20k_panoptic_val/ADE_val_00000002.png"
    colors = cv2.imread(str(path))
    images = data_module.evaluation_images()

    colors[3, 4] = (0, 1, 2)
    cv2.imwrite(str(path), colors)
    with pytest.raises(UserError, match=r"00002\.png: the JSON file beside it has no segment 258"):
        images[1]
    cv2.imwrite(str(path), colors[5:] * 0)
    with pytest.raises(UserError, match=r"00002\.png is 60x35 but the label of .* is 60x40"):
        images[1]
    path.unlink()
    with pytest.raises(UserError, match=r"00002\.png is missing"):
        images[1]
