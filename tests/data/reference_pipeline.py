"""MMSegmentation's training pipeline, restated step by step: the slow way that is exact."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np


@dataclass
class ReferenceSample:
    """A crop, and what was drawn for it.

    Attributes:
        scaled: (height, width) of the whole image when it was cropped.
        offset: top and left of the crop in it.
    """

    image: np.ndarray
    mask: np.ndarray
    scaled: tuple[int, int]
    offset: tuple[int, int]
    flip: bool


def resize(image, mask, size):
    height, width = size
    return (
        cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR),
        cv2.resize(mask, (width, height), interpolation=cv2.INTER_NEAREST),
    )


def draw_sample(image, mask, generator, crop_size, scale, scale_range, cat_max_ratio):
    """RandomResize (keep_ratio), RandomCrop, RandomFlip."""
    ratio = generator.random() * (scale_range[1] - scale_range[0]) + scale_range[0]
    long, short = (int(side * ratio) for side in scale)
    height, width = mask.shape
    factor = min(long / max(height, width), short / min(height, width))
    scaled = int(height * factor + 0.5), int(width * factor + 0.5)
    image, mask = resize(image, mask, scaled)

    def offset():
        return tuple(
            int(generator.integers(0, max(side - crop, 0) + 1))
            for side, crop in zip(scaled, crop_size, strict=True)
        )

    def crop(array, at):
        return array[at[0] : at[0] + crop_size[0], at[1] : at[1] + crop_size[1]]

    at = offset()
    if cat_max_ratio < 1:
        for _ in range(10):
            labels, counts = np.unique(crop(mask, at), return_counts=True)
            counts = counts[labels != 255]
            if len(counts) > 1 and counts.max() / counts.sum() < cat_max_ratio:
                break
            at = offset()
    flip = generator.random() < 0.5
    image, mask = crop(image, at), crop(mask, at)
    if flip:
        image, mask = image[:, ::-1], mask[:, ::-1]
    return ReferenceSample(image, mask, scaled, at, flip)


def truncate(values):
    return np.clip(values, 0, 255).astype(np.uint8)


def distort(image, brightness, contrast, saturation, hue, last_contrast):
    """PhotoMetricDistortion: uint8 between all steps, each conversion to HSV and back its own."""
    image = truncate(image.astype(np.float32) + brightness)
    image = truncate(image.astype(np.float32) * contrast)
    if saturation != 1:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 1] = truncate(hsv[..., 1].astype(np.float32) * saturation)
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    if hue != 0:
        hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
        hsv[..., 0] = (hsv[..., 0].astype(int) + int(hue)) % 180
        image = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    return truncate(image.astype(np.float32) * last_contrast)


def distort_exactly(image, brightness, contrast, saturation, hue, last_contrast):
    """The formula in floating point, rounded nowhere."""
    image = np.clip(image.astype(np.float64) + brightness, 0, 255)
    image = np.clip(image * contrast, 0, 255).astype(np.float32)
    hsv = cv2.cvtColor(image / 255, cv2.COLOR_RGB2HSV)
    hsv[..., 0] = (hsv[..., 0] + 2 * hue) % 360
    hsv[..., 1] = np.clip(hsv[..., 1] * saturation, 0, 1)
    return np.clip(cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB) * 255 * last_contrast, 0, 255)
