"""Cityscapes, fine annotations (Cordts et al., CVPR 2016): 19 classes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.classes import load_class_table
from data.files import Place, Split, first_existing
from data.module import SplitName
from data.panoptic import PanopticData

_LABELS, _CONVERTED = "_gtFine_labelIds.png", "_gtFine_labelTrainIds.png"


class Cityscapes(PanopticData):
    """`root` holds leftImg8bit/ and gtFine/, or the zips with these folders.

    Labels are read from the `labelIds` files as distributed; where these are gone, from the
    `labelTrainIds` files that cityscapesScripts or `python -m data.prepare` makes of them. The
    defaults are EDAFormer's recipe: crops of 1024x1024, evaluation at 1024x2048 as the images are.
    """

    title = "Cityscapes"
    table = load_class_table("cityscapes")
    official_images = (2975, 500)
    nominal_image_size = (1024, 2048)
    expected = (
        "leftImg8bit/ or leftImg8bit_trainvaltest.zip, with {train,val}/<city>/*_leftImg8bit.png"
        " (2975 and 500), and gtFine/ or gtFine_trainvaltest.zip, with as many"
        " {train,val}/<city>/*_gtFine_labelIds.png"
    )
    how_to_get = (
        "leftImg8bit_trainvaltest.zip (md5 0a6e97e94b616a514066c9e2adb0c97f) and"
        " gtFine_trainvaltest.zip (md5 4237c19de34c8a376e9ba46b495d6f66) from"
        " https://www.cityscapes-dataset.com/downloads (free registration)"
    )
    panoptic_names = ("cityscapes_panoptic_val", "cityscapes_panoptic_val_trainId")
    panoptic_suffix = "_gtFine_panoptic.png"
    panoptic_expected = (
        "in gtFine/, or in data.root: cityscapes_panoptic_val.json, and cityscapes_panoptic_val/"
        " with *_gtFine_panoptic.png (500)"
    )
    how_to_make_panoptic = (
        "csCreatePanopticImgs (createPanopticImgs) of cityscapesScripts, with CITYSCAPES_DATASET"
        " set to data.root and gtFine/ unpacked there"
    )

    def __init__(
        self,
        root: str | Path,
        *,
        batch_size: int = 2,
        crop_size: Sequence[int] = (1024, 1024),
        train_scale: Sequence[int] = (2048, 1024),
        eval_scale: Sequence[int] | None = None,
        size_divisor: int | None = None,
        panoptic: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            panoptic=panoptic,
            batch_size=batch_size,
            crop_size=crop_size,
            train_scale=train_scale,
            eval_scale=eval_scale,
            size_divisor=size_divisor,
            **options,
        )

    def find_split(self, split: SplitName) -> Split:
        images, labels = self._folder("leftImg8bit") / split, self._folder("gtFine") / split
        if labels.names(_CONVERTED) and not labels.names(_LABELS):
            converted = self.pair(images, "_leftImg8bit.png", labels, _CONVERTED)
            return replace(converted, table=self.table.for_converted_labels())
        return self.pair(images, "_leftImg8bit.png", labels, _LABELS)

    def panoptic_places(self) -> Iterable[Place]:
        return self._folder("gtFine"), Place(self.root)

    def _folder(self, name: str) -> Place:
        folder = Place(self.root / name)
        archive = Place(self.root / f"{name}_trainvaltest.zip", f"{name}/")
        return first_existing([folder, archive]) or folder
