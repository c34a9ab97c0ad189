"""Training and evaluation transforms: plain functions with thin albumentations classes around them.

The training pipeline is the one that EDAFormer, SegFormer and SegFormer++ share (MMSegmentation's
RandomResize, RandomCrop, RandomFlip, PhotoMetricDistortion, pad), and, by other options, RTFormer's
(PaddleSeg's) and Mask2Former's (detectron2's). Images are (H, W, 3) uint8 RGB, masks (H, W) uint8
train ids with 255 = ignored.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
from PIL import Image, ImageEnhance

from data.classes import IGNORE_INDEX
from segtrain.inference import IMAGE_MEAN, evaluation_sizes, keep_ratio_size

#: Normalised to about 0.
PAD_COLOR = tuple(round(value) for value in IMAGE_MEAN)

_REDRAWS = 10
_ALL_VALUES = np.arange(256, dtype=np.float32)

Photometric = bool | Literal["pil"]


def training_transform(
    crop_size: Sequence[int],
    scale: Sequence[int] | None,
    scale_range: Sequence[float],
    cat_max_ratio: float,
    photometric: Photometric,
    scale_step: float | None = None,
    *,
    shortest_edge: bool = False,
    joint_crop_offset: bool = False,
    pad_color: Sequence[int] = PAD_COLOR,
) -> A.Compose:
    """Random resize, random crop, flip, photometric distortion and padding to the crop size.

    Args:
        crop_size: (height, width) of the result.
        scale: (long, short) side that the image is resized into, times a factor from ...; None for
            the image's own size.
        scale_range: (lowest, highest) factor.
        cat_max_ratio: a crop is redrawn while one class covers at least this share of it; at 1 it
            never is.
        photometric: see `photometric_distortion`.
        scale_step: between the factors that are drawn, from the lowest on; None draws any.
        shortest_edge: the factor is for the short side of `scale` alone, and the long side is a
            limit (detectron2's ResizeShortestEdge).
        joint_crop_offset: one random number places the crop in both directions (detectron2's
            FixedSizeCrop, of large-scale jitter).
        pad_color: RGB of what padding adds to an image; it adds "ignored" to a mask.
    """
    height, width = crop_size
    crop = RandomCrop(crop_size, cat_max_ratio, joint_crop_offset)
    flip = A.HorizontalFlip(p=0.5)
    steps = [
        RandomResize(scale, scale_range, scale_step, shortest_edge),
        # One number places crops on one diagonal. Flipped before, images are cropped on both.
        *((flip, crop) if joint_crop_offset else (crop, flip)),
        *photometric_distortion(photometric),
        A.PadIfNeeded(
            min_height=height,
            min_width=width,
            position="top_left",  # where the content stays
            border_mode=cv2.BORDER_CONSTANT,
            fill=tuple(pad_color),
            fill_mask=IGNORE_INDEX,
        ),
    ]
    return A.Compose(steps)


def photometric_distortion(photometric: Photometric) -> list[A.ImageOnlyTransform]:
    """The steps that distort colours: MMSegmentation's, with "pil" PaddleSeg's, or none."""
    if photometric == "pil":
        return [PILPhotometricDistortion()]
    return [PhotometricDistortion()] if photometric else []


def seed_transform(transform: A.Compose, seed: int, epoch: int, index: int) -> None:
    """Make the next call draw what belongs to sample `index` of `epoch`, in whatever process.

    By itself albumentations 2.0.8 draws the same numbers in every DataLoader worker, and with
    `seed=` it gives every transform of the pipeline the same ones.
    """
    sequence = np.random.SeedSequence([seed, epoch, index])
    generator = np.random.Generator(np.random.PCG64(sequence))
    transform.set_random_state(generator, random.Random(int(sequence.generate_state(1)[0])))


def resize_for_evaluation(
    image: np.ndarray, scale: Sequence[int] | None, size_divisor: int | None
) -> np.ndarray:
    """Resize an image (H, W, 3) as `evaluation_sizes` has it."""
    for size in evaluation_sizes(image.shape[:2], scale, size_divisor):
        image = _resize(image, size, cv2.INTER_LINEAR)
    return image


def one_class_dominates(mask: np.ndarray, cat_max_ratio: float) -> bool:
    """Whether one class covers at least `cat_max_ratio` of the pixels that are not ignored.

    A mask with one class only, or with none, counts as dominated.
    """
    counts = np.bincount(mask.ravel(), minlength=256)[:IGNORE_INDEX]
    return bool(counts.max() >= cat_max_ratio * counts.sum() or np.count_nonzero(counts) <= 1)


def scale_and_shift(values: np.ndarray, gain: float, offset: float) -> np.ndarray:
    """uint8 -> gain * value + offset, clipped to 0..255 and truncated to uint8."""
    table = np.clip(_ALL_VALUES * np.float32(gain) + np.float32(offset), 0, 255)
    return cv2.LUT(values, table.astype(np.uint8))


def scale_saturation(image: np.ndarray, gain: float) -> np.ndarray:
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    saturation = scale_and_shift(saturation, gain, 0)
    return cv2.cvtColor(cv2.merge((hue, saturation, value)), cv2.COLOR_HSV2RGB)


def shift_hue(image: np.ndarray, steps: int) -> np.ndarray:
    """Turn the hue by `steps` of 2 degrees each (OpenCV keeps hues as 0..179)."""
    hue, saturation, value = cv2.split(cv2.cvtColor(image, cv2.COLOR_RGB2HSV))
    hue = cv2.LUT(hue, ((np.arange(256) + steps) % 180).astype(np.uint8))
    return cv2.cvtColor(cv2.merge((hue, saturation, value)), cv2.COLOR_HSV2RGB)


def shift_pil_hue(image: Image.Image, steps: int) -> Image.Image:
    """Turn the hue by `steps` of 360/256 degrees each (PIL keeps hues as 0..255)."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(h + steps) % 256 for h in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")


def _resize(array: np.ndarray, size: tuple[int, int], interpolation: int) -> np.ndarray:
    height, width = size
    if array.shape[:2] == size:
        return array
    return cv2.resize(array, (width, height), interpolation=interpolation)


class RandomResize(A.DualTransform):
    """Resize, keeping the shape, into `scale` times a factor drawn evenly from `scale_range`.

    See `training_transform` for the arguments.
    """

    def __init__(
        self,
        scale: Sequence[int] | None,
        scale_range: Sequence[float],
        scale_step: float | None = None,
        shortest_edge: bool = False,
    ) -> None:
        super().__init__(p=1.0)
        self.scale = scale
        self.scale_range = scale_range
        self.scale_step = scale_step
        self.shortest_edge = shortest_edge

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        size, factor = params["shape"][:2], self._draw_factor()
        if self.scale is None:
            return {"size": tuple(int(side * factor + 0.5) for side in size)}
        if self.shortest_edge:
            longest = max(self.scale)
            shortest = min(int(min(self.scale) * factor), longest)
            return {"size": keep_ratio_size(size, (longest, shortest))}
        return {"size": keep_ratio_size(size, [int(side * factor) for side in self.scale])}

    def _draw_factor(self) -> float:
        lowest, highest = self.scale_range
        if self.scale_step is None:
            return self.random_generator.uniform(lowest, highest)
        # Rounded first: 0.7 / 0.1 is a little below 7.
        steps = int(round((highest - lowest) / self.scale_step, 6))
        return lowest + self.scale_step * int(self.random_generator.integers(steps + 1))

    def apply(self, img: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        return _resize(img, size, cv2.INTER_LINEAR)

    def apply_to_mask(self, mask: np.ndarray, size: tuple[int, int], **params: Any) -> np.ndarray:
        return _resize(mask, size, cv2.INTER_NEAREST)


class RandomCrop(A.DualTransform):
    """Crop a random window, redrawn up to 10 times while one class dominates it.

    An image smaller than the window in one direction is kept whole in that direction. With
    `joint_offset` the window is as far from the top, of how far it can be, as from the left.
    """

    def __init__(
        self, crop_size: Sequence[int], cat_max_ratio: float, joint_offset: bool = False
    ) -> None:
        super().__init__(p=1.0)
        self.crop_size = crop_size
        self.cat_max_ratio = cat_max_ratio
        self.joint_offset = joint_offset

    @property
    def targets_as_params(self) -> list[str]:
        return ["mask"]

    def get_params_dependent_on_data(
        self, params: dict[str, Any], data: dict[str, Any]
    ) -> dict[str, Any]:
        mask = data["mask"]
        window = self._draw_window(mask.shape)
        if self.cat_max_ratio < 1:
            for _ in range(_REDRAWS):
                if not one_class_dominates(mask[window], self.cat_max_ratio):
                    break
                window = self._draw_window(mask.shape)
        return {"window": window}

    def _draw_window(self, shape: tuple[int, ...]) -> tuple[slice, slice]:
        largest = [max(s - crop, 0) for s, crop in zip(shape, self.crop_size, strict=True)]
        if self.joint_offset:
            share = self.random_generator.random()
            top, left = (round(offset * share) for offset in largest)
        else:
            top, left = (int(self.random_generator.integers(offset + 1)) for offset in largest)
        return slice(top, top + self.crop_size[0]), slice(left, left + self.crop_size[1])

    def apply(self, img: np.ndarray, window: tuple[slice, slice], **params: Any) -> np.ndarray:
        return img[window]


class PhotometricDistortion(A.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue, each with probability one half.

    Brightness +-32 and gains of 0.5 to 1.5 on uint8, clipped and truncated after every step;
    hue +-18 of OpenCV's 180 steps. Contrast comes second or last, by a coin. This is SSD's
    distortion (Liu et al., 2016) as MMSegmentation has it.
    """

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def get_params(self) -> dict[str, Any]:
        draw = self.random_generator
        return {
            "brightness": draw.uniform(-32, 32) if draw.random() < 0.5 else None,
            "contrast": draw.uniform(0.5, 1.5) if draw.random() < 0.5 else None,
            "contrast_last": draw.random() < 0.5,
            "saturation": draw.uniform(0.5, 1.5) if draw.random() < 0.5 else None,
            "hue": int(draw.integers(-18, 18)) if draw.random() < 0.5 else None,
        }

    def apply(
        self,
        img: np.ndarray,
        brightness: float | None,
        contrast: float | None,
        contrast_last: bool,
        saturation: float | None,
        hue: int | None,
        **params: Any,
    ) -> np.ndarray:
        if brightness is not None:
            img = scale_and_shift(img, 1, brightness)
        if contrast is not None and not contrast_last:
            img = scale_and_shift(img, contrast, 0)
        if saturation is not None:
            img = scale_saturation(img, saturation)
        if hue is not None:
            img = shift_hue(img, hue)
        if contrast is not None and contrast_last:
            img = scale_and_shift(img, contrast, 0)
        return img


class PILPhotometricDistortion(A.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue, each with probability one half, in random order.

    Gains of 0.6 to 1.4 of PIL's ImageEnhance, hue +-18 of PIL's 256 steps, all on uint8. This is
    PaddleSeg's distortion, with which RTFormer was trained.
    """

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def get_params(self) -> dict[str, Any]:
        draw = self.random_generator
        amounts = {
            "brightness": draw.uniform(0.6, 1.4),
            "contrast": draw.uniform(0.6, 1.4),
            "saturation": draw.uniform(0.6, 1.4),
            "hue": int(draw.integers(-18, 18)),
        }
        names = [name for name in amounts if draw.random() < 0.5]
        draw.shuffle(names)
        return {"steps": [(name, amounts[name]) for name in names]}

    def apply(self, img: np.ndarray, steps: list[tuple[str, float]], **params: Any) -> np.ndarray:
        image = Image.fromarray(img)
        for name, amount in steps:
            if name == "brightness":
                image = ImageEnhance.Brightness(image).enhance(amount)
            elif name == "contrast":
                image = ImageEnhance.Contrast(image).enhance(amount)
            elif name == "saturation":
                image = ImageEnhance.Color(image).enhance(amount)
            else:
                image = shift_pil_hue(image, int(amount))
        return np.array(image)
