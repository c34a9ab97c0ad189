"""A file that cannot be read: the run stops with its name, or goes on without it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from segtrain.errors import UserError
from tests.data.test_panoptic import write_cityscapes


def cut_short(path):
    path.write_bytes(path.read_bytes()[:60])


def ade20k(root, kind, split, number):
    ending = "jpg" if kind == "images" else "png"
    name = {"training": "train", "validation": "val"}[split]
    return root / f"ADEChallengeData2016/{kind}/{split}/ADE_{name}_{number:08d}.{ending}"


def epoch_of(images, epoch=0):
    return [images[epoch, index] for index in range(len(images))]


def test_by_default_it_stops(open_small, tmp_path):
    images = open_small("ade20k").training_images()
    cut_short(ade20k(tmp_path, "images", "training", 3))
    with pytest.raises(UserError, match=r"ADE_train_00000003.jpg is damaged or cut short"):
        epoch_of(images)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_the_next_image_takes_its_place(open_small, tmp_path, kind):
    intact = epoch_of(open_small("ade20k").training_images())
    assert not any("unreadable" in sample for sample in intact)
    path = ade20k(tmp_path, kind, "training", 3)
    cut_short(path)
    samples = epoch_of(open_small("ade20k", on_error="skip").training_images())
    assert [sample["name"][-1] for sample in samples] == ["1", "2", "4", "4", "5"]
    assert [sample["index"] for sample in samples] == [0, 1, 2, 3, 4]
    assert [bool(sample["unreadable"]) for sample in samples] == [0, 0, 1, 0, 0]
    assert samples[2]["unreadable"].startswith(f"{path} is damaged")
    for i in (0, 1, 3, 4):
        np.testing.assert_array_equal(samples[i]["image"], intact[i]["image"])
        np.testing.assert_array_equal(samples[i]["mask"], intact[i]["mask"])
    assert (samples[2]["image"] != samples[3]["image"]).any()  # another crop of it


def test_batches_are_the_same_with_any_number_of_workers(open_small, tmp_path):
    data = [open_small("ade20k", on_error="skip", workers=workers) for workers in (0, 2)]
    cut_short(ade20k(tmp_path, "images", "training", 5))
    for left, right, _ in zip(*(d.train_dataloader() for d in data), range(5), strict=False):
        assert left.keys() == right.keys()
        for key, value in left.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, right[key])
            else:
                assert value == right[key]


def test_what_stands_in_for_an_evaluation_image_is_not_scored(open_small, tmp_path):
    data = open_small("ade20k", on_error="skip")
    cut_short(ade20k(tmp_path, "annotations", "validation", 3))
    batches = list(data.val_dataloader())
    assert [batch["index"].tolist() for batch in batches] == [[0], [1], [2]]
    assert [(batch["mask"] == 255).all() for batch in batches] == [False, False, True]
    assert ["" if not batch["unreadable"][0] else "x" for batch in batches] == ["", "", "x"]


def test_nor_are_its_segments(open_small, tmp_path):
    open_small("cityscapes")
    write_cityscapes(tmp_path)
    data = open_small("cityscapes", on_error="skip", panoptic=True)
    (path,) = tmp_path.glob("leftImg8bit/val/*/*_000001_*")
    cut_short(path)
    _, batch, _ = data.val_dataloader()
    assert (batch["mask"] == 255).all()
    assert (batch["segments"] == torch.tensor([255, 0])).all()


def test_nor_are_its_superpatches(open_small, tmp_path):
    data = open_small("ade20k", on_error="skip", superpatches="all")
    cut_short(ade20k(tmp_path, "images", "validation", 1))
    masks = [batch["mask"] for batch in data.val_dataloader()]
    assert [(mask == 255).any() for mask in masks] == [True, False, False]
    assert (masks[0] == 255).all()
    cut_short(ade20k(tmp_path, "images", "training", 1))
    masks = [batch["mask"] for batch, _ in zip(data.train_dataloader(), range(3), strict=False)]
    assert not any((mask == 255).any() for mask in masks)


def test_labels_that_cannot_be_read_are_not_counted(open_small, tmp_path):
    counts = open_small("ade20k").class_counts()
    path = ade20k(tmp_path, "annotations", "training", 2)
    cut_short(path)
    without = open_small("ade20k", on_error="skip").class_counts()
    assert 0 < without.sum() < counts.sum()
    with pytest.raises(UserError, match=path.name):
        open_small("ade20k").class_counts()


def test_where_nothing_can_be_read_it_stops_all_the_same(open_small, tmp_path):
    images = open_small("ade20k", on_error="skip").training_images()
    for number in range(1, 6):
        cut_short(ade20k(tmp_path, "images", "training", number))
    with pytest.raises(UserError, match=r"00000003.jpg is damaged.*\n.*after it cannot be read"):
        images[0, 2]
