from __future__ import annotations

import numpy as np
import pytest

from data.classes import load_class_table
from data.scenes.appearance import LOOKS, train_ids
from segtrain.errors import UserError

ALL_RAW_IDS = np.arange(256, dtype=np.uint8)[None]


def allowed_ids(name: str) -> list[int]:
    table = load_class_table(name)
    allowed = []
    for raw in range(256):
        try:
            table.to_train_ids(np.array([[raw]], np.uint8), "file.png")
        except UserError:
            continue
        allowed.append(raw)
    return allowed


@pytest.mark.parametrize(
    ("name", "classes", "colors", "allowed"),
    [
        ("ade20k", 150, 149, list(range(151))),  # road and skyscraper share a colour
        ("cityscapes", 19, 19, list(range(34))),
        ("cocostuff", 171, 171, [*range(182), 255]),
    ],
)
def test_table_covers_every_class_once(name, classes, colors, allowed):
    table = load_class_table(name)
    assert len(set(table.class_names)) == classes
    assert table.palette.shape == (classes, 3)
    assert len(np.unique(table.palette, axis=0)) == colors
    assert allowed_ids(name) == allowed
    mapped = table.raw_to_train[allowed]
    assert sorted(mapped[mapped != 255]) == list(range(classes))


@pytest.mark.parametrize(
    ("name", "raw", "class_name"),
    [
        ("ade20k", 1, "wall"),
        ("ade20k", 150, "flag"),
        ("ade20k", 0, None),
        ("cityscapes", 7, "road"),
        ("cityscapes", 17, "pole"),
        ("cityscapes", 33, "bicycle"),
        ("cityscapes", 29, None),  # caravan
        ("cocostuff", 0, "person"),
        ("cocostuff", 10, "fire hydrant"),
        ("cocostuff", 11, None),  # street sign: an id without pixels
        ("cocostuff", 12, "stop sign"),
        ("cocostuff", 91, "banner"),
        ("cocostuff", 181, "wood"),
        ("cocostuff", 255, None),
    ],
)
def test_known_ids(name, raw, class_name):
    table = load_class_table(name)
    train_id = int(table.to_train_ids(np.array([[raw]], np.uint8), "file.png")[0, 0])
    assert (table.class_names[train_id] if train_id != 255 else None) == class_name


def test_raw_ids_without_pixels_in_cocostuff_are_the_eleven_removed_ones():
    table = load_class_table("cocostuff")
    ignored = np.flatnonzero(table.raw_to_train == 255)
    coco_ids = [12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91]
    assert ignored.tolist() == [i - 1 for i in coco_ids] + [255]


@pytest.mark.parametrize(
    ("class_name", "colors"),
    [
        ("sky", [(128, 128, 128)]),
        # Building, archway, bridge, tunnel and wall.
        ("building", [(128, 0, 0), (192, 0, 128), (0, 128, 64), (64, 0, 64), (64, 192, 0)]),
        ("pole", [(192, 192, 128), (0, 0, 64)]),  # and traffic cone
        ("road", [(128, 64, 128), (128, 0, 192), (192, 0, 64)]),  # and both lane markings
        ("pavement", [(0, 0, 192), (64, 192, 128), (128, 128, 192)]),  # parking block, shoulder
        ("tree", [(128, 128, 0), (192, 192, 0)]),  # and other vegetation
        ("sign symbol", [(192, 128, 128), (128, 128, 64), (0, 64, 64)]),  # text, traffic light
        ("fence", [(64, 64, 128)]),
        # Car, pickup, truck or bus, train and other moving things.
        ("car", [(64, 0, 128), (64, 128, 192), (192, 128, 192), (192, 64, 128), (128, 64, 64)]),
        # Pedestrian, child, pram and animal.
        ("pedestrian", [(64, 64, 0), (192, 128, 64), (64, 0, 192), (64, 128, 64)]),
        ("bicyclist", [(0, 128, 192), (192, 0, 192)]),  # and motorcycle
        (None, [(0, 0, 0)]),
    ],
)
def test_segnets_groups_of_the_labels_of_camvid(class_name, colors):
    table = load_class_table("camvid")
    assert len(table.raw_colors) == len(np.unique(table.raw_colors, axis=0)) == 32
    train_id = 255 if class_name is None else table.class_names.index(class_name)
    members = table.raw_colors[table.raw_to_train[:32] == train_id]
    assert {tuple(color) for color in members.tolist()} == set(colors)
    if class_name is not None:
        assert tuple(table.palette[train_id].tolist()) == colors[0]
        assert len(table.class_names) == 11


def test_id_outside_the_table_names_file_ids_and_range():
    with pytest.raises(UserError) as error:
        load_class_table("cityscapes").to_train_ids(
            np.array([[7, 255, 34]], np.uint8), "gtFine/x_labelIds.png"
        )
    message = str(error.value)
    assert message.startswith("gtFine/x_labelIds.png: label ids 34, 255 are outside the table")
    assert "0 to 33" in message
    assert "labelTrainIds" in message
    assert "\n" not in message


def test_converted_labels_pass_unchanged():
    table = load_class_table("cocostuff").for_converted_labels()
    label = np.array([[0, 170, 255]], np.uint8)
    np.testing.assert_array_equal(table.to_train_ids(label, "x"), label)
    with pytest.raises(UserError, match="171"):
        table.to_train_ids(np.array([[171]], np.uint8), "x")


@pytest.mark.parametrize(
    ("layout", "classes"), [("cityscapes", 19), ("ade20k", 34), ("cocostuff", 36)]
)
def test_scenes_show_as_many_classes_as_the_layout_has_names_for(layout, classes):
    ids = train_ids(layout, load_class_table(layout).class_names)
    assert len(set(ids.values())) == classes
    assert set(ids) <= set(LOOKS)
