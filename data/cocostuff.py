"""COCO-Stuff (Caesar et al., CVPR 2018): 171 classes, 164k images or the 10k subset."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from data.classes import load_class_table
from data.files import Place, Split, first_existing
from data.module import SegmentationData, SplitName
from segtrain.errors import UserError

_CONVERTED = "_labelTrainIds.png"


class COCOStuff(SegmentationData):
    """The 164k images of COCO 2017 or the 10k subset of COCO 2014 (v1.1), with 171 classes.

    164k: images in images/{train2017,val2017}/, {train2017,val2017}/ or the zips of these names;
    label PNGs in annotations/ or stuffthingmaps/ or stuffthingmaps_trainval2017.zip. Labels that
    MMSegmentation has converted (`*_labelTrainIds.png`) are read where the originals are gone.

    10k: images/, annotations/ (.mat) and imageLists/ in `root` or in its cocostuff-10k-v1.1.zip;
    train.txt and test.txt are the training and the evaluation images.

    Args:
        variant: "164k" or "10k".
        options: of `SegmentationData`.
    """

    table = load_class_table("cocostuff")

    def __init__(
        self, root: str | Path, *, variant: Literal["164k", "10k"] = "164k", **options: Any
    ) -> None:
        super().__init__(root, **options)
        self.variant = variant
        self.title = f"COCO-Stuff {variant}"
        if variant == "164k":
            self.official_images = (118287, 5000)
            self.expected = (
                "train2017 and val2017 as folders in images/ or as zips, with .jpg files (118287"
                " and 5000), and as many .png in annotations/ or stuffthingmaps/ or"
                " stuffthingmaps_trainval2017.zip, in folders of these names"
            )
            self.how_to_get = (
                "train2017.zip (md5 cced6f7f71b7629ddf16f17bbcfab6b2) and val2017.zip (md5"
                " 442b8da7639aecaf257c1dceb8ba8c80) from https://cocodataset.org/#download,"
                " stuffthingmaps_trainval2017.zip from https://github.com/nightrome/cocostuff"
            )
        elif variant == "10k":
            self.cache_name = "segtrain_cache_10k"  # both may be in one folder
            self.official_images = (9000, 1000)
            self.expected = (
                "cocostuff-10k-v1.1.zip, or unpacked images/*.jpg and annotations/*.mat (10000"
                " each) and imageLists/{train,test}.txt"
            )
            self.how_to_get = (
                "cocostuff-10k-v1.1.zip from https://github.com/nightrome/cocostuff10k"
                " (v1.0 numbers the classes otherwise)"
            )
        else:
            raise UserError(f"data.variant={variant} is not a variant of COCO-Stuff: 164k, 10k")

    def find_split(self, split: SplitName) -> Split:
        return self._find_164k(split) if self.variant == "164k" else self._find_10k(split)

    def _find_164k(self, split: SplitName) -> Split:
        name = f"{split}2017"
        folders = [self.root / "images", self.root]
        images = first_existing(
            [Place(folder / name) for folder in folders]
            + [Place(folder / f"{name}.zip", f"{name}/") for folder in folders]
        ) or Place(self.root / "images" / name)
        labels = first_existing(
            [
                Place(self.root / "annotations" / name),
                Place(self.root / "stuffthingmaps" / name),
                Place(self.root / "stuffthingmaps_trainval2017.zip", f"{name}/"),
            ]
        ) or Place(self.root / "annotations" / name)
        label_names = labels.names(".png")
        if label_names and all(label.endswith(_CONVERTED) for label in label_names):
            converted = self.pair(images, ".jpg", labels, _CONVERTED)
            return replace(converted, table=self.table.for_converted_labels())
        # The conversion leaves its results beside the originals.
        return self.pair(
            images, ".jpg", labels, ".png", keep=lambda stem: not stem.endswith("_labelTrainIds")
        )

    def _find_10k(self, split: SplitName) -> Split:
        archive = Place(self.root / "cocostuff-10k-v1.1.zip")
        base = archive if archive.exists() else Place(self.root)
        name = {"train": "train.txt", "val": "test.txt"}[split]
        if name not in (base / "imageLists").names(".txt"):
            raise self.missing(f"no {name} in {base / 'imageLists'}")
        stems = set((base / "imageLists").read(name).decode().split())
        return self.pair(
            base / "images", ".jpg", base / "annotations", ".mat", keep=stems.__contains__
        )
