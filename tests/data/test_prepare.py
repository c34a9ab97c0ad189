"""Converted labels are those that the data modules read, in files that they read again."""

from __future__ import annotations

import re

import cv2
import numpy as np
import pytest

from data import prepare
from data.dataset import load_label
from tests.data.layouts import WRITERS, zip_dataset


def masks(data_module):
    """Of both splits, by the name of the image."""
    return {
        split.files[index][0]: load_label(split, index)
        for split in (data_module.find_split("train"), data_module.find_split("val"))
        for index in range(len(split.files))
    }


def convert(name, root, output):
    kind, *variant = name.split()
    arguments = [f"data={kind}", f"data.root={root}", *(f"data.variant={v}" for v in variant)]
    return prepare.main([*arguments, "labels=train_ids", f"output={output}", "workers=0"])


@pytest.mark.parametrize(
    ("name", "files"),
    [
        ("ade20k", "annotations_detectron2/{training,validation}/{}.png"),
        ("camvid", "labels/{train,val}/{}.png"),
        ("cityscapes", "gtFine/{train,val}/{}_gtFine_labelTrainIds.png"),
        ("cocostuff", "annotations/{train2017,val2017}/{}_labelTrainIds.png"),
        ("cocostuff 10k", "annotations/{train2014,test2014}/{}_labelTrainIds.png"),
    ],
)
def test_converted_labels(open_small, tmp_path, name, files):
    (tmp_path / "data").mkdir()
    WRITERS[name](tmp_path / "data")
    zip_dataset(name, tmp_path / "data")
    data_module = open_small(name, root=tmp_path / "data")
    assert convert(name, tmp_path / "data", tmp_path / "out") == 0
    head, folders, tail = re.fullmatch(r"(.*?){(.*?)}(.*)", files).groups()
    written = 0
    for split_name, folder in zip(("train", "val"), folders.split(","), strict=True):
        split = data_module.find_split(split_name)
        for index, (stem, _, _) in enumerate(split.files):
            path = tmp_path / "out" / f"{head}{folder}{tail.format(stem)}"
            label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
            np.testing.assert_array_equal(label, load_label(split, index))
            written += 1
    assert written == sum(path.is_file() for path in (tmp_path / "out").rglob("*")) == 8


@pytest.mark.parametrize("name", ["cityscapes", "cocostuff"])
def test_converted_labels_are_read_where_the_originals_are_gone(open_small, tmp_path, name):
    data_module = open_small(name)
    expected = masks(data_module)
    originals = {
        tmp_path / str(split.labels.path) / label
        for split in (data_module.find_split("train"), data_module.find_split("val"))
        for _, _, label in split.files
    }
    assert convert(name, tmp_path, tmp_path) == 0
    for path in originals:
        path.unlink()
    assert not [path for path in originals if path.exists()]
    converted = masks(open_small(name))
    assert converted.keys() == expected.keys()
    for key, mask in expected.items():
        np.testing.assert_array_equal(converted[key], mask)


def test_it_goes_on_where_it_was_stopped(open_small, tmp_path, capsys):
    open_small("cityscapes")
    assert convert("cityscapes", tmp_path, tmp_path / "out") == 0
    written = sorted((tmp_path / "out").rglob("*.png"))
    times = {path: path.stat().st_mtime_ns for path in written}
    written[3].unlink()
    capsys.readouterr()
    assert convert("cityscapes", tmp_path, tmp_path / "out") == 0
    assert sorted((tmp_path / "out").rglob("*.png")) == written
    changed = [path for path in written if path.stat().st_mtime_ns != times[path]]
    assert changed == [written[3]]
    assert "1 train labels written, 4 were there" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("ade20k", "labels hold 0 to 150 (0 = other objects), looked up"),
        ("camvid", "labels show 32 colours, looked up"),
        ("cocostuff 10k", "labels are MATLAB files with COCO ids, looked up"),
    ],
)
def test_what_is_looked_up_while_loading(open_small, tmp_path, capsys, name, told):
    open_small(name)
    kind, *variant = name.split()
    options = [f"data.variant={v}" for v in variant]
    assert prepare.main([f"data={kind}", f"data.root={tmp_path}", *options]) == 0
    printed = capsys.readouterr().out
    assert told in printed
    assert "nothing has to be prepared" in printed


def test_slips(open_small, tmp_path, capsys):
    open_small("ade20k")
    given = ["data=ade20k", f"data.root={tmp_path}"]
    for arguments, message in (
        ([*given, "labels=raw", "output=x"], "labels=raw: Have: train_ids"),
        ([*given, "labels=train_ids"], "go together"),
        ([*given, f"output={tmp_path}"], "go together"),
        (["data=imagenet", f"data.root={tmp_path}"], "folders for labels"),
        (["data=ade20k", f"data.root={tmp_path / 'nowhere'}"], "missing or incomplete"),
    ):
        assert prepare.main(arguments) == 2
        assert message in capsys.readouterr().err
    (tmp_path / "file").write_bytes(b"")
    assert convert("ade20k", tmp_path, tmp_path / "file") == 2
    assert "cannot be written" in capsys.readouterr().err


def test_processes(open_small, tmp_path):
    open_small("cocostuff")
    given = ["data=cocostuff", f"data.root={tmp_path}", "workers=2"]
    assert prepare.main([*given, "labels=train_ids", f"output={tmp_path / 'out'}"]) == 0
    assert len(list((tmp_path / "out").rglob("*_labelTrainIds.png"))) == 8
