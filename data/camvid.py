"""CamVid (Brostow et al., Pattern Recognition Letters 2009): 32 labels, grouped to 11 classes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.classes import load_class_table
from data.files import Place, Split, first_existing
from data.module import SegmentationData, SplitName

_IMAGES, _LABELS = "701_StillsRaw_full", "LabeledApproved_full"


class CamVid(SegmentationData):
    """`root` holds 701_StillsRaw_full/ and LabeledApproved_full/, or their zips, 720x960 each.

    Labels are the coloured ones as distributed; the classes are SegNet's groups of them
    (Badrinarayanan et al., PAMI 2017), and so is the split, by sequence: 367 images for training
    and 101 for validation, which are trained on here together, and 233 for evaluation.

    Where `root` holds SegNet's copy of 360x480 instead (train/, val/ and test/ with labels 0 to 11
    in trainannot/, valannot/ and testannot/), that is read.
    """

    title = "CamVid"
    table = load_class_table("camvid")
    official_images = (468, 233)
    nominal_image_size = (720, 960)
    expected = (
        f"{_IMAGES}/ or {_IMAGES}.zip, with *.png (701), and {_LABELS}/ or {_LABELS}.zip, with"
        " *_L.png (701); or SegNet's train/, trainannot/, val/, valannot/, test/ and testannot/,"
        " with *.png (367, 101 and 233)"
    )
    how_to_get = (
        f"http://web4.cs.ucl.ac.uk/staff/g.brostow/MotionSegRecData/files/{_IMAGES}.zip and"
        f" http://web4.cs.ucl.ac.uk/staff/g.brostow/MotionSegRecData/data/{_LABELS}.zip"
    )

    def __init__(
        self,
        root: str | Path,
        *,
        crop_size: Sequence[int] = (720, 960),
        train_scale: Sequence[int] | None = None,
        eval_scale: Sequence[int] | None = None,
        size_divisor: int | None = None,
        **options: Any,
    ) -> None:
        super().__init__(
            root,
            crop_size=crop_size,
            train_scale=train_scale,
            eval_scale=eval_scale,
            size_divisor=size_divisor,
            **options,
        )
        self._is_segnet = (self.root / "testannot").is_dir()
        if self._is_segnet:
            self.nominal_image_size = (360, 480)

    def find_split(self, split: SplitName) -> Split:
        if self._is_segnet:
            return self._find_segnet(["train", "val"] if split == "train" else ["test"])
        images = first_existing(
            [
                Place(self.root / _IMAGES),
                Place(self.root / f"{_IMAGES}.zip", f"{_IMAGES}/"),
            ]
        ) or Place(self.root / _IMAGES)
        # This zip has no folder inside.
        labels = first_existing(
            [Place(self.root / _LABELS), Place(self.root / f"{_LABELS}.zip")]
        ) or Place(self.root / _LABELS)
        return self.pair(
            images,
            ".png",
            labels,
            "_L.png",
            keep=lambda stem: _is_for_evaluation(stem) == (split == "val"),
        )

    def _find_segnet(self, folders: Sequence[str]) -> Split:
        root = Place(self.root)
        files = []
        for folder in folders:
            labels = f"{folder}annot"
            pairs = self.pair(root / folder, ".png", root / labels, ".png").files
            files += [
                (stem, f"{folder}/{image}", f"{labels}/{label}") for stem, image, label in pairs
            ]
        return Split(root, root, files, self.table.for_converted_labels(ignored=11))


def _is_for_evaluation(stem: str) -> bool:
    """Whether an image belongs to SegNet's test set: one sequence, and half of another."""
    return stem.startswith("Seq05VD_") or "0001TP_008550" <= stem <= "0001TP_010380"
