"""What happens to the pixels of a sample: the pipeline of training, and the resize of evaluation.

Images are (H, W, 3) uint8 RGB, masks (H, W) uint8 train ids with 255 = ignored. The training
pipeline calls the albumentations transforms of `data.geometry` and `data.colors` directly, as
`A.Compose` takes longer to prepare a sample than they take to make it; the user's own transforms
run in one.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import albumentations as A
import cv2
import numpy as np

from data.classes import IGNORE_INDEX
from data.colors import PhotometricDistortion, PILPhotometricDistortion
from data.geometry import RandomScaledCrop
from segtrain.errors import UserError
from segtrain.inference import IMAGE_MEAN, evaluation_sizes

#: Normalised to about 0.
PAD_COLOR = tuple(round(value) for value in IMAGE_MEAN)


def sample_generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of sample `index` of `epoch`, the same in whatever process."""
    return np.random.default_rng([seed, epoch, index])


def seed_transform(transform: A.Compose, generator: np.random.Generator) -> None:
    """Make the next call of an albumentations pipeline draw from `generator`.

    By itself albumentations 2.0.8 draws the same numbers in every DataLoader worker, and with
    `seed=` it gives every transform of the pipeline the same ones.
    """
    transform.set_random_state(generator, random.Random(int(generator.integers(2**63))))


class TrainingTransform:
    """Crop out of the scaled image, the user's own transforms, colours, padding to the crop size.

    Args:
        crop: chooses and cuts the crop.
        custom: the user's own transforms.
        colors: distorts colours; None leaves them.
        colors_on_device: amounts are drawn only, for `data.colors.distort_batch`.
        pad_color: RGB of what padding adds to an image, below and on the right; it adds "ignored"
            to a mask.
    """

    def __init__(
        self,
        crop: RandomScaledCrop,
        custom: Sequence[A.BasicTransform | A.BaseCompose] = (),
        colors: PhotometricDistortion | PILPhotometricDistortion | None = None,
        *,
        colors_on_device: bool = False,
        pad_color: Sequence[int] = PAD_COLOR,
    ) -> None:
        self.crop = crop
        self.custom = A.Compose(list(custom)) if custom else None
        self.colors = colors
        self.colors_on_device = colors_on_device
        self.pad_color = tuple(pad_color)

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, generator: np.random.Generator
    ) -> dict[str, Any]:
        """Make a sample, with all random numbers from `generator`.

        Returns:
            "image" and "mask" of the crop size; with colours on the device "distortion", (5,)
            float32, and "content", (2,) int64 height and width of what is not padding.

        Raises:
            UserError: the user's transforms make the image larger than the crop size.
        """
        crop = self.crop.draw(mask, generator)
        image, mask = self.crop.apply(image, crop), self.crop.apply_to_mask(mask, crop)
        if self.custom is not None:
            seed_transform(self.custom, generator)
            transformed = self.custom(image=image, mask=mask)
            image, mask = transformed["image"], transformed["mask"]
        sample: dict[str, Any] = {}
        if self.colors is not None:
            amounts: Any = self.colors.draw(generator)
            if self.colors_on_device:
                sample = {"distortion": amounts, "content": np.array(mask.shape)}
            else:
                image = self.colors.apply(image, amounts)
        return {
            "image": self._pad(image, self.pad_color),
            "mask": self._pad(mask, (IGNORE_INDEX,)),
            **sample,
        }

    def _pad(self, array: np.ndarray, value: tuple[int, ...]) -> np.ndarray:
        (height, width), size = self.crop.crop_size, array.shape[:2]
        below, right = height - size[0], width - size[1]
        if below < 0 or right < 0:
            raise UserError(
                f"data.transforms turn a crop into {size[1]}x{size[0]} pixels, and data.crop_size"
                f" is {width}x{height} (width x height): end them with what brings it to that size"
            )
        if not below and not right:
            return np.require(array, requirements="W")  # not a cache's memory; PyTorch would warn
        return cv2.copyMakeBorder(array, 0, below, 0, right, cv2.BORDER_CONSTANT, value=value)


def resize_for_evaluation(
    image: np.ndarray, scale: Sequence[int] | None, size_divisor: int | None
) -> np.ndarray:
    """Resize an image (H, W, 3) as `evaluation_sizes` has it."""
    for height, width in evaluation_sizes(image.shape[:2], scale, size_divisor):
        if image.shape[:2] != (height, width):
            image = cv2.resize(image, (width, height), interpolation=cv2.INTER_LINEAR)
    return image
