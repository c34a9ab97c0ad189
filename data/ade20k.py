"""ADE20K scene parsing (Zhou et al., CVPR 2017): 150 classes, ADEChallengeData2016."""

from __future__ import annotations

from collections.abc import Iterable

from data.classes import load_class_table
from data.files import Place, Split, first_existing
from data.module import SplitName
from data.panoptic import PanopticData

_NAME = "ADEChallengeData2016"


class ADE20K(PanopticData):
    """`root` holds ADEChallengeData2016/ or ADEChallengeData2016.zip, or is that folder itself.

    Raw id 0 ("other objects") is ignored, raw ids 1 to 150 are train ids 0 to 149.
    """

    title = "ADE20K"
    table = load_class_table("ade20k")
    official_images = (20210, 2000)
    expected = (
        f"{_NAME}/ or {_NAME}.zip, with .jpg files in images/training (20210) and"
        " images/validation (2000), .png files of the same names in annotations/"
    )
    how_to_get = (
        f"{_NAME}.zip (md5 7328b3957e407ddae1d3cbf487f149ef), the scene parsing benchmark of"
        " http://sceneparsing.csail.mit.edu"
    )
    panoptic_names = ("ade20k_panoptic_val",)
    panoptic_suffix = ".png"
    panoptic_expected = (
        "beside images/, or in data.root: ade20k_panoptic_val.json, and ade20k_panoptic_val/ with"
        " .png files (2000)"
    )
    how_to_make_panoptic = (
        "datasets/prepare_ade20k_pan_seg.py of Mask2Former's repository makes them from"
        " annotations/ and the instance annotations (annotations_instance.tar, same site)"
    )

    def find_split(self, split: SplitName) -> Split:
        folder = {"train": "training", "val": "validation"}[split]
        base = self._base()
        return self.pair(base / "images" / folder, ".jpg", base / "annotations" / folder, ".png")

    def panoptic_places(self) -> Iterable[Place]:
        return self._base(), Place(self.root)

    def _base(self) -> Place:
        places = [Place(self.root / _NAME), Place(self.root / f"{_NAME}.zip", f"{_NAME}/")]
        return first_existing(places) or Place(self.root)
