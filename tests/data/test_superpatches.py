"""Label maps of superpatches, from which the policy of CTS learns."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

import data
from data.superpatches import label_superpatches

pytestmark = pytest.mark.filterwarnings("ignore:.*(officially|many workers)")

VOID = 255


def expected(mask: np.ndarray, superpatches: str) -> list[list[int]]:
    """The same, superpatch by superpatch."""
    rows, columns = (range(0, side, 32) for side in mask.shape)

    def label(top: int, left: int) -> int:
        labels = set(mask[top : top + 32, left : left + 32].flatten().tolist())
        at_border = top in (rows[0], rows[-1]) or left in (columns[0], columns[-1])
        if superpatches == "ignore_void_borders" and at_border and VOID in labels:
            return VOID if len(labels) == 2 else int(len(labels) == 1)
        return int(len(labels) == 1)

    return [[label(top, left) for left in columns] for top in rows]


@pytest.mark.parametrize("superpatches", ["all", "ignore_void_borders"])
@pytest.mark.parametrize("size", [(128, 160), (70, 33), (32, 32), (5, 7), (1, 100)])
def test_a_superpatch_has_one_label_or_several(superpatches, size):
    generator = np.random.default_rng(0)
    for _ in range(20):
        coarse = generator.choice(np.array([0, 3, VOID], np.uint8), (4, 4))
        mask = cv2.resize(coarse, size[::-1], interpolation=cv2.INTER_NEAREST)
        assert label_superpatches(mask, superpatches).tolist() == expected(mask, superpatches)


def test_void_beside_a_class():
    mask = np.zeros((96, 96), np.uint8)
    mask[0] = VOID  # a frame above
    mask[40, 40] = VOID  # a pixel in the middle
    mask[64:, 64:] = VOID  # a corner
    assert label_superpatches(mask, "all").tolist() == [[0, 0, 0], [1, 0, 1], [1, 1, 1]]
    ignored = label_superpatches(mask, "ignore_void_borders")
    assert ignored.tolist() == [[VOID, VOID, VOID], [1, 0, 1], [1, 1, 1]]
    mask[5, :] = 7  # two classes and void
    assert label_superpatches(mask, "ignore_void_borders")[0].tolist() == [0, 0, 0]


def test_batches_hold_superpatches_of_the_images_as_networks_see_them(open_small):
    options = {"crop_size": (64, 96), "train_scale": (120, 80), "eval_scale": (240, 160)}
    pixels = open_small("ade20k", **options)
    superpatches = open_small("ade20k", superpatches="all", **options)
    assert superpatches.num_classes == 2
    assert superpatches.class_names == ("several labels", "one label")
    assert superpatches.palette.shape == (2, 3)

    fine, coarse = (next(iter(module.train_dataloader())) for module in (pixels, superpatches))
    assert torch.equal(fine["image"], coarse["image"])
    assert coarse["mask"].dtype == torch.uint8
    for mask, label in zip(fine["mask"].numpy(), coarse["mask"].tolist(), strict=True):
        assert label == expected(mask, "all")

    fine, coarse = (next(iter(module.val_dataloader())) for module in (pixels, superpatches))
    assert torch.equal(fine["image"], coarse["image"])
    height, width = fine["image"].shape[1:3]
    mask = cv2.resize(fine["mask"][0].numpy(), (width, height), interpolation=cv2.INTER_NEAREST)
    assert coarse["mask"][0].tolist() == expected(mask, "all")


def test_class_counts_are_of_superpatches(open_small):
    counts = open_small("ade20k", superpatches="all").class_counts()
    assert counts.shape == (2,)
    assert counts.sum() == 5 * 2 * 2  # images of 40x60


def test_scenes_have_superpatches_too(tmp_path):
    scenes = data.Scenes(
        tmp_path, train_images=2, eval_images=1, batch_size=2, workers=0, superpatches="all"
    )
    scenes.prepare_data()
    (batch,) = scenes.val_dataloader()
    assert batch["mask"].shape == (1, 4, 8)
    assert set(batch["mask"].flatten().tolist()) == {0, 1}
