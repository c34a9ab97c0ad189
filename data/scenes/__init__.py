"""The embedded data set: scenes that it draws itself, read like real ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.ade20k import ADE20K
from data.cityscapes import Cityscapes
from data.cocostuff import COCOStuff
from data.files import Split
from data.module import SegmentationData, SplitName
from data.scenes.writer import Layout, Rendering
from segtrain.errors import UserError, did_you_mean

_LAYOUTS: dict[str, type[SegmentationData]] = {
    "cityscapes": Cityscapes,
    "ade20k": ADE20K,
    "cocostuff": COCOStuff,
}


class Scenes(SegmentationData):
    """Street scenes, in other layouts rooms as well, with exact labels.

    They are rendered below `root` on first use (about 10 ms an image) in the files of a real data
    set, whose class then reads them.

    Args:
        layout: the data set whose files and classes are used: cityscapes, ade20k or cocostuff.
        train_images, eval_images: how many are rendered.
        image_size: (height, width) of the images.
        options: of `SegmentationData`.
    """

    title = "Scenes"

    def __init__(
        self,
        root: str | Path,
        *,
        layout: Layout = "cityscapes",
        train_images: int = 600,
        eval_images: int = 100,
        image_size: Sequence[int] = (128, 256),
        batch_size: int = 16,
        eval_batch_size: int = 10,
        crop_size: Sequence[int] = (128, 128),
        train_scale: Sequence[int] = (256, 128),
        scale_range: Sequence[float] = (0.75, 1.5),
        photometric: bool = False,
        eval_scale: Sequence[int] | None = None,
        size_divisor: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            crop_size=crop_size,
            train_scale=train_scale,
            scale_range=scale_range,
            photometric=photometric,
            eval_scale=eval_scale,
            size_divisor=size_divisor,
            **options,
        )
        if layout not in _LAYOUTS:
            raise UserError(f"data.layout={layout}: {did_you_mean(layout, _LAYOUTS)}")
        height, width = image_size
        self.rendering = Rendering(layout, train_images, eval_images, height, width)
        self.official_images = (train_images, eval_images)
        self.nominal_image_size = (height, width)
        self.reader = _LAYOUTS[layout](self.root / self.rendering.folder)
        self.cache_name = f"{self.rendering.folder}/{self.cache_name}"
        self.table = self.reader.table

    def prepare_data(self) -> None:
        """Render what is not there yet."""
        self.rendering.write(self.root)

    def check(self, splits: Sequence[SplitName] = ("train", "val")) -> None:
        self.prepare_data()
        super().check(splits)

    def find_split(self, split: SplitName) -> Split:
        return self.reader.find_split(split)
