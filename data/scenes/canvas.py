"""A canvas on which every drawn thing keeps its number, so that image and label agree exactly."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from data.classes import IGNORE_INDEX
from data.scenes.appearance import LOOKS, Color, textures

Point = tuple[float, float]
_OVERSAMPLING = 2  # things are drawn at twice the size, which smooths their edges in the image
_MOST_THINGS = 256  # numbers are uint8


class Canvas:
    """Things are painted back to front as numbers; colour, texture and class are looked up.

    All coordinates are pixels of the canvas, which is twice as large as the rendered image.

    Args:
        height, width: of the rendered image in pixels.
        generator: all random choices come from it.
    """

    def __init__(self, height: int, width: int, generator: np.random.Generator) -> None:
        self.random = generator
        self.height = height * _OVERSAMPLING
        self.width = width * _OVERSAMPLING
        self._numbers = np.zeros((self.height, self.width), np.uint8)
        self._things: list[str] = []
        self._colors: list[Sequence[float]] = []
        self._textures: list[str] = []
        self._contrasts: list[float] = []
        self.new("void")

    def uniform(self, low: float, high: float) -> float:
        return float(self.random.uniform(low, high))

    def chance(self, probability: float) -> bool:
        return bool(self.random.random() < probability)

    def new(
        self,
        thing: str,
        color: Color | None = None,
        texture: str | None = None,
        contrast: float | None = None,
    ) -> int:
        """Number a new thing (or a part that looks different); its look varies unless given."""
        look = LOOKS[thing]
        number = len(self._things)
        if number == _MOST_THINGS:
            raise ValueError(f"a canvas holds at most {_MOST_THINGS} things")
        self._things.append(thing)
        self._colors.append(color or self.vary(look.color, look.spread, look.spread / 3))
        self._textures.append(texture or look.texture)
        strength = look.contrast if contrast is None else contrast
        self._contrasts.append(strength * self.uniform(0.7, 1.3))
        return number

    def vary(self, color: Color, brightness: float, tint: float = 0.0) -> Color:
        """A colour near `color`: all channels together +-brightness, each alone +-tint."""
        shift = self.random.uniform(-brightness, brightness)
        red, green, blue = np.array(color) + shift + self.random.uniform(-tint, tint, 3)
        return (red, green, blue)

    def rectangle(self, number: int, left: float, top: float, right: float, bottom: float) -> None:
        cv2.rectangle(self._numbers, (int(left), int(top)), (int(right), int(bottom)), number, -1)

    def polygon(self, number: int, points: Sequence[Point]) -> None:
        cv2.fillPoly(self._numbers, [np.array(points).astype(np.int32)], number)

    def ellipse(self, number: int, x: float, y: float, radius_x: float, radius_y: float) -> None:
        axes = (max(1, int(radius_x)), max(1, int(radius_y)))
        cv2.ellipse(self._numbers, (int(x), int(y)), axes, 0, 0, 360, number, -1)

    def ring(self, number: int, x: float, y: float, radius: float, thickness: float) -> None:
        center, line = (int(x), int(y)), max(2, int(thickness))
        cv2.circle(self._numbers, center, max(2, int(radius)), number, line)

    def line(self, number: int, start: Point, end: Point, thickness: float) -> None:
        (x0, y0), (x1, y1) = start, end
        line = max(1, int(thickness))
        cv2.line(self._numbers, (int(x0), int(y0)), (int(x1), int(y1)), number, line)

    def render(self, train_ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """Turn numbers into an image with light and noise, and into its label.

        Returns:
            image (H, W, 3) uint8 RGB and mask (H, W) uint8 train ids, 255 = ignored.
        """
        names, tiles = textures()
        texture = np.array([names.index(name) for name in self._textures])
        size = tiles.shape[1]
        top, left = self.random.integers(size, size=2)
        rows = (top + np.arange(self.height))[:, None] % size
        columns = (left + np.arange(self.width))[None] % size

        drawing = np.array(self._colors, np.float32)[self._numbers]
        pattern = tiles[texture[self._numbers], rows, columns]
        drawing += (pattern * np.array(self._contrasts, np.float32)[self._numbers])[..., None]
        drawing *= self._light()[..., None]
        height, width = self.height // _OVERSAMPLING, self.width // _OVERSAMPLING
        image = cv2.resize(drawing, (width, height), interpolation=cv2.INTER_AREA)
        noise = self.random.standard_normal((height, width, 1), dtype=np.float32)
        noisy = image + noise * np.float32(self.uniform(1, 5))

        middle = slice(_OVERSAMPLING // 2, None, _OVERSAMPLING)
        of_number = [train_ids.get(thing, IGNORE_INDEX) for thing in self._things]
        mask = np.array(of_number, np.uint8)[self._numbers[middle, middle]]
        return np.clip(noisy, 0, 255).astype(np.uint8), mask

    def _light(self) -> np.ndarray:
        """(height, width) factors: brighter towards one side, and overall."""
        down, right = self.random.uniform(-0.18, 0.18, 2)
        y = np.linspace(-1, 1, self.height, dtype=np.float32)[:, None]
        x = np.linspace(-1, 1, self.width, dtype=np.float32)[None]
        light = 1 + np.float32(down) * y + np.float32(right) * x
        return light * np.float32(self.uniform(0.8, 1.15))
