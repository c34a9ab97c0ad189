"""Writes rendered scenes in the on-disk layout of a real data set, never half a file."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from filelock import FileLock
from rich.console import Console
from rich.progress import track

from data.classes import IGNORE_INDEX, ClassTable, load_class_table
from data.files import write_file
from data.scenes.appearance import train_ids
from data.scenes.canvas import Canvas
from data.scenes.indoor import draw_room
from data.scenes.street import draw_street

Layout = Literal["cityscapes", "ade20k", "cocostuff"]
# Counts up whenever the same settings would draw other pixels.
_VERSION = 1
_CITIES = {
    "train": ("aachen", "bochum", "bremen"),
    "val": ("frankfurt", "lindau", "munster"),
}
_JPEG_QUALITY = 92


@dataclass(frozen=True)
class Rendering:
    """Which scenes to draw, and in which layout. Equal values give equal files.

    Args:
        layout: of Cityscapes (street scenes only), ADE20K or COCO-Stuff 164k (rooms as well).
        train_images, eval_images: how many of each split.
        height, width: of the images in pixels.
    """

    layout: Layout
    train_images: int
    eval_images: int
    height: int
    width: int
    version: int = _VERSION

    @property
    def folder(self) -> str:
        """Other settings, other folder: a file that is there is always the right one."""
        size, counts = f"{self.height}x{self.width}", f"{self.train_images}-{self.eval_images}"
        return f"{self.layout}-{size}-{counts}-v{self.version}"

    def write(self, root: Path) -> Path:
        """Draw what is not there yet into `root`/`folder`, and return that folder.

        Every file appears under its name only when it is complete, so an interrupted rendering
        goes on where it stopped. A lock keeps other processes waiting meanwhile.
        """
        folder = root / self.folder
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            missing = [
                (paths, key)
                for paths, key in self._scenes(folder)
                if not all(path.exists() for path in paths)
            ]
            if missing:
                table = load_class_table(self.layout)
                console = Console(stderr=True)
                text = f"Rendering scenes into {folder}"
                for (image_path, label_path), key in track(missing, text, console=console):
                    image, mask = self.draw(key, table)
                    _write_image(image_path, cv2.cvtColor(image, cv2.COLOR_RGB2BGR))
                    _write_image(label_path, cv2.LUT(mask, _raw_ids(table)))
        return folder

    def draw(self, key: tuple[int, int], table: ClassTable) -> tuple[np.ndarray, np.ndarray]:
        """Scene `key` = (split number, index): image (H, W, 3) RGB and train ids (H, W), uint8."""
        generator = np.random.default_rng([*key, *self.layout.encode()])
        canvas = Canvas(self.height, self.width, generator)
        if self.layout == "cityscapes" or canvas.chance(0.5):
            draw_street(canvas)
        else:
            draw_room(canvas)
        return canvas.render(train_ids(self.layout, table.class_names))

    def _scenes(self, folder: Path) -> Iterator[tuple[tuple[Path, Path], tuple[int, int]]]:
        """(image path, label path) and key of every scene."""
        counts = {"train": self.train_images, "val": self.eval_images}
        for number, (split, count) in enumerate(counts.items()):
            for index in range(count):
                image, label = _file_names(self.layout, split, index)
                yield (folder / image, folder / label), (number, index)


def _file_names(layout: Layout, split: str, index: int) -> tuple[str, str]:
    """Where the real data set would keep an image and its label."""
    if layout == "cityscapes":
        cities = _CITIES[split]
        city, sequence = cities[index % len(cities)], index // len(cities)
        stem = f"{split}/{city}/{city}_{sequence:06d}_000019"
        return f"leftImg8bit/{stem}_leftImg8bit.png", f"gtFine/{stem}_gtFine_labelIds.png"
    if layout == "ade20k":
        folder = {"train": "training", "val": "validation"}[split]
        stem = f"{folder}/ADE_{split}_{index + 1:08d}"
        base = "ADEChallengeData2016"
        return f"{base}/images/{stem}.jpg", f"{base}/annotations/{stem}.png"
    stem = f"{split}2017/{index + 1:012d}"
    return f"images/{stem}.jpg", f"stuffthingmaps/{stem}.png"


def _raw_ids(table: ClassTable) -> np.ndarray:
    """(256,) uint8, train id -> the raw id that the data set's label files use for it."""
    raw_ids = np.zeros(256, np.uint8)
    for train_id in range(len(table.class_names)):
        raw_ids[train_id] = np.flatnonzero(table.raw_to_train == train_id)[0]
    if table.raw_to_train[IGNORE_INDEX] == IGNORE_INDEX:
        raw_ids[IGNORE_INDEX] = IGNORE_INDEX
    return raw_ids


def _write_image(path: Path, pixels: np.ndarray) -> None:
    options = [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY] if path.suffix == ".jpg" else []
    _, content = cv2.imencode(path.suffix, pixels, options)
    write_file(path, content.tobytes())
