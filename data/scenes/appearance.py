"""What the things in a scene look like, and what each data set calls them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

Color = tuple[float, float, float]
_TILE = 512  # pixels


@dataclass(frozen=True)
class Look:
    """A texture, how strongly it shows, and a base colour with the spread of its random changes."""

    texture: str
    contrast: float
    color: Color
    spread: float


# Colours overlap on purpose, so that context has to decide: person and rider, wall and building,
# vegetation and terrain, truck and bus and train.
LOOKS = {
    "void": Look("clouds", 8, (60, 60, 60), 20),
    # street
    "road": Look("asphalt", 9, (92, 90, 94), 14),
    "sidewalk": Look("bricks", 9, (128, 122, 124), 14),
    "building": Look("facade", 20, (128, 112, 100), 34),
    "wall": Look("bricks", 12, (132, 118, 106), 26),
    "fence": Look("slats", 34, (128, 116, 100), 22),
    "pole": Look("flat", 4, (104, 104, 102), 24),
    "traffic light": Look("flat", 6, (44, 46, 44), 12),
    "traffic sign": Look("flat", 8, (196, 150, 60), 60),
    "vegetation": Look("leaves", 17, (70, 98, 52), 18),
    "terrain": Look("grass", 14, (92, 106, 62), 20),
    "sky": Look("clouds", 8, (150, 180, 214), 24),
    "person": Look("asphalt", 14, (110, 84, 80), 46),
    "rider": Look("asphalt", 14, (110, 84, 80), 46),
    "car": Look("flat", 6, (110, 104, 112), 58),
    "truck": Look("flat", 6, (124, 118, 116), 54),
    "bus": Look("flat", 6, (124, 118, 116), 54),
    "train": Look("flat", 6, (124, 118, 116), 54),
    "motorcycle": Look("asphalt", 16, (70, 62, 66), 30),
    "bicycle": Look("flat", 6, (66, 68, 78), 26),
    # indoor
    "room wall": Look("clouds", 6, (172, 164, 148), 30),
    "floor": Look("planks", 11, (138, 110, 84), 26),
    "ceiling": Look("clouds", 4, (204, 200, 192), 14),
    "bed": Look("clouds", 9, (172, 150, 146), 44),
    "window": Look("flat", 10, (186, 208, 222), 18),
    "cabinet": Look("planks", 8, (130, 96, 66), 26),
    "door": Look("flat", 5, (138, 104, 74), 26),
    "table": Look("planks", 9, (118, 84, 56), 24),
    "chair": Look("flat", 6, (112, 80, 62), 36),
    "lamp": Look("flat", 5, (234, 214, 150), 16),
    "painting": Look("clouds", 40, (128, 120, 110), 46),
    "curtain": Look("slats", 16, (148, 120, 120), 44),
    "sofa": Look("diamonds", 7, (126, 104, 100), 44),
    "rug": Look("diamonds", 24, (142, 104, 96), 44),
    "plant": Look("leaves", 19, (68, 100, 56), 18),
    "book": Look("slats", 30, (130, 80, 72), 46),
    "clock": Look("flat", 4, (224, 222, 214), 14),
    "bottle": Look("flat", 8, (72, 110, 82), 36),
}

# Where a data set's class has the same name as the thing, it is left out here.
_CLASS_NAMES: dict[str, dict[str, str]] = {
    "cityscapes": {},
    "ade20k": {
        "traffic sign": "signboard",
        "vegetation": "tree",
        "terrain": "grass",
        "rider": "person",
        "train": "bus",
        "motorcycle": "minibike",
        "room wall": "wall",
        "window": "windowpane",
    },
    "cocostuff": {
        "sidewalk": "pavement",
        "building": "building-other",
        "wall": "wall-brick",
        "pole": "metal",
        "traffic sign": "stop sign",
        "vegetation": "tree",
        "terrain": "grass",
        "sky": "sky-other",
        "rider": "person",
        "room wall": "wall-other",
        "floor": "floor-wood",
        "ceiling": "ceiling-other",
        "window": "window-other",
        "door": "door-stuff",
        "table": "dining table",
        "lamp": "light",
        "painting": "paper",
        "sofa": "couch",
        "plant": "potted plant",
    },
}


def train_ids(layout: str, class_names: tuple[str, ...]) -> dict[str, int]:
    """The train id of everything that the data set has a class for; the rest is ignored."""
    names = {thing: _CLASS_NAMES[layout].get(thing, thing) for thing in LOOKS}
    return {thing: class_names.index(name) for thing, name in names.items() if name in class_names}


@cache
def textures() -> tuple[list[str], np.ndarray]:
    """T names and (T, 512, 512) float32 tiles of about zero mean and unit spread.

    They are the same in every process.
    """
    generator = np.random.default_rng(12345)

    def noise(falloff: float) -> np.ndarray:
        """Noise whose spectrum falls as 1 / frequency ** falloff: the higher, the smoother."""
        vertical = np.fft.fftfreq(_TILE)[:, None]
        horizontal = np.fft.rfftfreq(_TILE)[None]
        frequency = np.hypot(vertical, horizontal)
        frequency[0, 0] = 1
        real, imaginary = generator.standard_normal((2, *frequency.shape))
        tile = np.fft.irfft2((real + 1j * imaginary) / frequency**falloff, s=(_TILE, _TILE))
        return tile / tile.std()

    y, x = np.mgrid[:_TILE, :_TILE].astype(np.float64)
    windows = (x % 22 < 11) & (y % 26 < 14)
    mortar = (y % 12 < 2) | ((x + (y // 12 % 2) * 12) % 24 < 2)
    diagonal, antidiagonal = (np.sin((x + sign * y) * 2 * np.pi / 14) for sign in (1, -1))
    tiles = {
        "flat": np.zeros_like(x),
        "clouds": noise(1.6),
        "asphalt": noise(0.9),
        "leaves": 1.2 * noise(0.5),
        "facade": 2.0 * windows - 0.8 + 0.3 * noise(1),
        "bricks": 0.2 - 1.6 * mortar + 0.3 * noise(0.8),
        "slats": 0.9 * np.sign(np.sin(x * 2 * np.pi / 8)),
        "planks": np.sin(y * 2 * np.pi / 10) + 0.4 * noise(1),
        "diamonds": 1.5 * diagonal * antidiagonal,
        "grass": 0.9 * noise(0.2),
    }
    return list(tiles), np.stack(list(tiles.values())).astype(np.float32)
