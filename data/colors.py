"""Photometric distortion, on uint8 while loading or on whole batches where the network trains."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Literal

import albumentations as A
import cv2
import numpy as np
import torch
from PIL import Image, ImageEnhance

# What rounding is to add so that it truncates.
_TRUNCATED = -0.49999

Photometric = bool | Literal["pil"]


def photometric_distortion(
    photometric: Photometric,
) -> PhotometricDistortion | PILPhotometricDistortion | None:
    """What distorts colours: MMSegmentation's way, with "pil" PaddleSeg's, or nothing."""
    if photometric == "pil":
        return PILPhotometricDistortion()
    return PhotometricDistortion() if photometric else None


class PhotometricDistortion(A.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue, each with probability one half.

    Brightness +-32 and gains of 0.5 to 1.5 on uint8, clipped and truncated after every step;
    hue +-18 of OpenCV's 180 steps. Contrast comes second or last, by a coin. This is SSD's
    distortion (Liu et al., 2016) as MMSegmentation has it, but for one thing: saturation and hue
    share a conversion to HSV and back where MMSegmentation rounds to RGB in between, which brings
    them nearer to what the formula gives without rounding.
    """

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def get_params(self) -> dict[str, Any]:
        return {"amounts": self.draw(self.random_generator)}

    def draw(self, generator: np.random.Generator) -> np.ndarray:
        """(5,) float32: brightness, contrast, saturation, hue, contrast that comes last.

        Steps that are left out have 0 or, where they are gains, 1.
        """
        brightness = generator.uniform(-32, 32) if generator.random() < 0.5 else 0
        contrast = generator.uniform(0.5, 1.5) if generator.random() < 0.5 else 1
        gains = (1, contrast) if generator.random() < 0.5 else (contrast, 1)
        saturation = generator.uniform(0.5, 1.5) if generator.random() < 0.5 else 1
        hue = generator.integers(-18, 18) if generator.random() < 0.5 else 0
        return np.array([brightness, gains[0], saturation, hue, gains[1]], dtype=np.float32)

    def apply(self, img: np.ndarray, amounts: np.ndarray, **params: Any) -> np.ndarray:
        brightness, contrast, saturation, hue, last_contrast = amounts.tolist()
        if brightness != 0:
            # Of whole numbers, truncating what is clipped at 0 leaves as much.
            img = cv2.add(img, (math.floor(brightness),) * 3)  # type: ignore[call-overload]
        if contrast != 1:
            img = scale(img, contrast)
        if saturation != 1 or hue != 0:
            img = change_saturation_and_hue(img, saturation, int(hue))
        if last_contrast != 1:
            img = scale(img, last_contrast)
        return img


def scale(values: np.ndarray, gain: float) -> np.ndarray:
    """uint8 -> gain * value, clipped to 255 and truncated to uint8, where a table takes longer.

    What is less than 0.00001 below a whole number becomes that number.
    """
    return cv2.convertScaleAbs(values, alpha=gain, beta=_TRUNCATED)


def change_saturation_and_hue(image: np.ndarray, gain: float, steps: int) -> np.ndarray:
    """Multiply the saturation by `gain` and turn the hue by `steps` of 2 degrees each.

    OpenCV keeps hues as 0..179.
    """
    hsv = cv2.cvtColor(image, cv2.COLOR_RGB2HSV)
    if steps != 0:
        turned = ((np.arange(256) + steps) % 180).astype(np.uint8)
        cv2.insertChannel(cv2.LUT(cv2.extractChannel(hsv, 0), turned), hsv, 0)
    if gain != 1:
        cv2.insertChannel(scale(cv2.extractChannel(hsv, 1), gain), hsv, 1)
    return cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)


@cache
def per_channel(values: tuple[float, ...], device: torch.device) -> torch.Tensor:
    """A number for each channel, (1, C, 1, 1) float32; to copy them at each step would wait."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(1, -1, 1, 1)


def distort_batch(
    image: torch.Tensor, amounts: torch.Tensor, content: torch.Tensor
) -> torch.Tensor:
    """`PhotometricDistortion` of a batch on its device.

    Saturation and hue are computed in float32 and rounded once, where uint8 HSV rounds hue to 2
    degrees: colours differ by a few grey levels, on average by less than one.

    Args:
        image: (B, 3, H, W) RGB, whole numbers from 0 to 255 as float32.
        amounts: (B, 5), see `PhotometricDistortion.draw`.
        content: (B, 2) height and width, from the upper left, of what is not padding; padding
            keeps its colour.

    Returns:
        as `image`.
    """
    brightness, contrast, saturation, hue, last_contrast = amounts.view(-1, 5, 1, 1, 1).unbind(1)
    changed = (image + brightness).clamp_(0, 255).floor_()
    changed = (changed * contrast).clamp_(0, 255).floor_()
    changed = _change_saturation_and_hue(changed, saturation, hue)
    changed = (changed * last_contrast).clamp_(0, 255).floor_()
    height, width = (
        torch.arange(side, device=image.device) < content[:, axis, None]
        for axis, side in enumerate(image.shape[-2:])
    )
    return torch.where((height[:, :, None] & width[:, None])[:, None], changed, image)


def _change_saturation_and_hue(
    image: torch.Tensor, gain: torch.Tensor, steps: torch.Tensor
) -> torch.Tensor:
    red, green, blue = image.split(1, dim=1)
    value = image.amax(1, keepdim=True)
    chroma = value - image.amin(1, keepdim=True)
    sixth = torch.where(
        value == red,
        green - blue,
        torch.where(value == green, blue - red + 2 * chroma, red - green + 4 * chroma),
    )
    sixth = sixth / chroma.clamp(min=1) + steps / 30
    chroma = torch.minimum(chroma * gain, value)
    # Of red, green and blue: how far each is from the corner of the hexagon of hues where it is
    # at its lowest.
    corner = per_channel((5, 3, 1), image.device)
    # Into memory of the image's layout, which sums of one channel and of three do not keep.
    distance = torch.add(sixth, corner, out=torch.empty_like(image)).remainder_(6)
    share = torch.minimum(distance, 4 - distance).clamp_(0, 1)
    return share.mul_(-chroma).add_(value).round_()


class PILPhotometricDistortion(A.ImageOnlyTransform):
    """Brightness, contrast, saturation and hue, each with probability one half, in random order.

    Gains of 0.6 to 1.4 of PIL's ImageEnhance, hue +-18 of PIL's 256 steps, all on uint8. This is
    PaddleSeg's distortion, with which RTFormer was trained.
    """

    def __init__(self) -> None:
        super().__init__(p=1.0)

    def get_params(self) -> dict[str, Any]:
        return {"amounts": self.draw(self.random_generator)}

    def draw(self, generator: np.random.Generator) -> list[tuple[str, float]]:
        """Names and amounts of the steps, in their order."""
        amounts = {
            "brightness": generator.uniform(0.6, 1.4),
            "contrast": generator.uniform(0.6, 1.4),
            "saturation": generator.uniform(0.6, 1.4),
            "hue": int(generator.integers(-18, 18)),
        }
        names = [name for name in amounts if generator.random() < 0.5]
        generator.shuffle(names)
        return [(name, amounts[name]) for name in names]

    def apply(self, img: np.ndarray, amounts: list[tuple[str, float]], **params: Any) -> np.ndarray:
        image = Image.fromarray(img)
        for name, amount in amounts:
            if name == "brightness":
                image = ImageEnhance.Brightness(image).enhance(amount)
            elif name == "contrast":
                image = ImageEnhance.Contrast(image).enhance(amount)
            elif name == "saturation":
                image = ImageEnhance.Color(image).enhance(amount)
            else:
                image = shift_pil_hue(image, int(amount))
        return np.array(image)


def shift_pil_hue(image: Image.Image, steps: int) -> Image.Image:
    """Turn the hue by `steps` of 360/256 degrees each (PIL keeps hues as 0..255)."""
    hue, saturation, value = image.convert("HSV").split()
    hue = hue.point([(h + steps) % 256 for h in range(256)])
    return Image.merge("HSV", (hue, saturation, value)).convert("RGB")
