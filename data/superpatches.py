"""Which superpatches of a label map show one class, from which CTS learns its policy (CVPR 2023).

Masks of superpatches take the place of those of pixels, so criterion, confusion matrix and curve
are those of segmentation: pixel accuracy is the share of superpatches that are told right.
"""

from __future__ import annotations

from typing import Any, Literal

import cv2
import numpy as np
from torch.utils.data import Dataset

from data.classes import IGNORE_INDEX

#: Side in pixels: 2x2 patches of 16.
SUPERPATCH = 32
#: Class 0 and class 1.
CLASS_NAMES = ("several labels", "one label")
PALETTE = np.array([[220, 90, 60], [70, 120, 180]], dtype=np.uint8)

Superpatches = Literal["all", "ignore_void_borders"]


class SuperpatchImages(Dataset[dict[str, Any]]):
    """The samples of `images`, each mask at the image's size and then as one of superpatches."""

    def __init__(self, images: Dataset[dict[str, Any]], superpatches: Superpatches) -> None:
        self.images = images
        self.superpatches = superpatches

    def __len__(self) -> int:
        return len(self.images)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> dict[str, Any]:
        sample = self.images[key]
        height, width = sample["image"].shape[:2]
        mask = cv2.resize(sample["mask"], (width, height), interpolation=cv2.INTER_NEAREST)
        labels = label_superpatches(mask, self.superpatches)
        if sample.get("unreadable") and (mask == IGNORE_INDEX).all():
            labels[:] = IGNORE_INDEX  # of another image, whose mask does not count
        return {**sample, "mask": labels}


def label_superpatches(mask: np.ndarray, superpatches: Superpatches) -> np.ndarray:
    """Whether all pixels of a superpatch have one label; void counts as a label.

    Args:
        mask: (H, W) uint8 with 255 = void. Superpatches at its lower and right border may hold
            fewer pixels than others.
        superpatches: with "ignore_void_borders" a superpatch at the border that holds one class
            and void is ignored, as on ADE20K, where void frames the images; with "all" it counts
            as one of several labels, as any other that holds both.

    Returns:
        (ceil(H/32), ceil(W/32)) uint8: 0 or 1, 255 where ignored.
    """
    height, width = (-(-side // SUPERPATCH) for side in mask.shape)
    mask = cv2.copyMakeBorder(
        mask,
        *(0, height * SUPERPATCH - mask.shape[0], 0, width * SUPERPATCH - mask.shape[1]),
        cv2.BORDER_REPLICATE,
    )

    blocks = mask.reshape(height, SUPERPATCH, width, SUPERPATCH)
    low, high = blocks.min(axis=(1, 3)), blocks.max(axis=(1, 3))
    labels = (low == high).astype(np.uint8)
    if superpatches == "ignore_void_borders":
        highest_class = np.where(blocks == IGNORE_INDEX, 0, blocks).max(axis=(1, 3))
        class_and_void = (high == IGNORE_INDEX) & (low < high) & (highest_class == low)
        class_and_void[1:-1, 1:-1] = False
        labels[class_and_void] = IGNORE_INDEX
    return labels
