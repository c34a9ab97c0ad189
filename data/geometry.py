"""Scale, crop and flip in one step: the window is chosen first, and only the window is resized.

Resizing the image and then cropping, as MMSegmentation, PaddleSeg and detectron2 do, resizes up to
four times the pixels that are kept. Here the same random numbers choose the same scale and place,
the crop is traced back to the image as it was read, and its sides are rounded to whole pixels
there: scales differ by half a pixel of the window at most, and are right on average.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import albumentations as A
import cv2
import numpy as np

from data.classes import IGNORE_INDEX
from segtrain.inference import keep_ratio_size

_REDRAWS = 10
#: Pixels per side of a window in which classes are counted.
_COUNTED = 64


@dataclass(frozen=True)
class Crop:
    """A crop of an image that is scaled first.

    Attributes:
        window: rows and columns of the image as it was read.
        size: (height, width) that the window is resized to.
        flip: whether left and right change places.
    """

    window: tuple[slice, slice]
    size: tuple[int, int]
    flip: bool


class RandomScaledCrop(A.DualTransform):
    """Resize by a random factor, crop a random window, flip every second one.

    The steps that EDAFormer, SegFormer and SegFormer++ share (MMSegmentation's RandomResize,
    RandomCrop, RandomFlip) and, by the options, RTFormer's (PaddleSeg's) and Mask2Former's
    (detectron2's). Where the scaled image is smaller than the crop it is kept whole; nothing is
    padded.

    Args:
        crop_size: (height, width) of the crop.
        scale: (long, short) side that the image is resized into, times a factor from ...; None for
            the image's own size.
        scale_range: (lowest, highest) factor.
        cat_max_ratio: a window is redrawn, up to 10 times, while one class covers at least this
            share of its labelled pixels; at 1 it never is.
        scale_step: between the factors that are drawn, from the lowest on; None draws any.
        shortest_edge: the factor is for the short side of `scale` alone, and the long side is a
            limit (detectron2's ResizeShortestEdge).
        joint_offset: one random number places the window in both directions (detectron2's
            FixedSizeCrop, of large-scale jitter); as images are flipped before, windows lie on
            both diagonals.
    """

    def __init__(
        self,
        crop_size: Sequence[int],
        scale: Sequence[int] | None,
        scale_range: Sequence[float],
        cat_max_ratio: float,
        scale_step: float | None = None,
        shortest_edge: bool = False,
        joint_offset: bool = False,
    ) -> None:
        super().__init__(p=1.0)
        self.crop_size = crop_size
        self.scale = scale
        self.scale_range = scale_range
        self.cat_max_ratio = cat_max_ratio
        self.scale_step = scale_step
        self.shortest_edge = shortest_edge
        self.joint_offset = joint_offset

    @property
    def targets_as_params(self) -> list[str]:
        return ["mask"]

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        return {"crop": self.draw(data["mask"], self.random_generator)}

    def draw(self, mask: np.ndarray, generator: np.random.Generator) -> Crop:
        """Choose a crop of an image with this mask, (H, W) uint8 train ids."""
        height, width = self.scaled_size(mask.shape, self._draw_factor(generator))
        size = (min(self.crop_size[0], height), min(self.crop_size[1], width))
        room = (height - size[0], width - size[1])
        flip = bool(generator.random() < 0.5)
        for redraws_left in range(_REDRAWS if self.cat_max_ratio < 1 else 0, -1, -1):
            top, left = self._draw_offset(room, generator)
            if flip:
                left = room[1] - left
            window = (
                _trace_back(top, size[0], height, mask.shape[0]),
                _trace_back(left, size[1], width, mask.shape[1]),
            )
            if not redraws_left or not one_class_dominates(mask[window], self.cat_max_ratio):
                break
        return Crop(window, size, flip)

    def scaled_size(self, size: Sequence[int], factor: float) -> tuple[int, int]:
        """(height, width) to which an image of `size` is scaled."""
        if self.scale is None:
            return int(size[0] * factor + 0.5), int(size[1] * factor + 0.5)
        if self.shortest_edge:
            longest = max(self.scale)
            shortest = min(int(min(self.scale) * factor), longest)
            return keep_ratio_size(size, (longest, shortest))
        return keep_ratio_size(size, [int(side * factor) for side in self.scale])

    def _draw_factor(self, generator: np.random.Generator) -> float:
        lowest, highest = self.scale_range
        if self.scale_step is None:
            return generator.uniform(lowest, highest)
        # Rounded first: 0.7 / 0.1 is a little below 7.
        steps = int(round((highest - lowest) / self.scale_step, 6))
        return lowest + self.scale_step * int(generator.integers(steps + 1))

    def _draw_offset(
        self, room: tuple[int, int], generator: np.random.Generator
    ) -> tuple[int, int]:
        if self.joint_offset:
            share = generator.random()
            return round(room[0] * share), round(room[1] * share)
        return int(generator.integers(room[0] + 1)), int(generator.integers(room[1] + 1))

    def apply(self, img: np.ndarray, crop: Crop, **params: Any) -> np.ndarray:
        return _cut(img, crop, cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: np.ndarray, crop: Crop, **params: Any) -> np.ndarray:
        return _cut(mask, crop, cv2.INTER_NEAREST)


def one_class_dominates(mask: np.ndarray, cat_max_ratio: float) -> bool:
    """Whether one class covers at least `cat_max_ratio` of the pixels that are not ignored.

    A mask with one class only, or with none, counts as dominated. Of large masks every nth row and
    column is looked at: shares are right within a percent, which moves no crop from one kind to
    the other but those at the very limit.
    """
    rows, columns = (max(1, side // _COUNTED) for side in mask.shape)
    counts = np.bincount(mask[::rows, ::columns].ravel(), minlength=256)[:IGNORE_INDEX]
    return bool(counts.max() >= cat_max_ratio * counts.sum() or np.count_nonzero(counts) <= 1)


def _trace_back(offset: int, length: int, scaled_side: int, side: int) -> slice:
    """What was there before scaling: `length` pixels from `offset` on, of `scaled_side` pixels."""
    pixel = side / scaled_side
    before = max(1, int(length * pixel + 0.5))
    start = min(int(offset * pixel + 0.5), side - before)
    return slice(start, start + before)


def _cut(array: np.ndarray, crop: Crop, interpolation: int) -> np.ndarray:
    array = array[crop.window]
    height, width = crop.size
    if array.shape[:2] != crop.size:
        array = cv2.resize(array, (width, height), interpolation=interpolation)
    return cv2.flip(array, 1) if crop.flip else array
