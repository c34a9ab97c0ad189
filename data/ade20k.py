"""ADE20K scene parsing (Zhou et al., CVPR 2017): 150 classes, ADEChallengeData2016."""

from __future__ import annotations

from data.classes import load_class_table
from data.files import Place, Split, first_existing
from data.module import SegmentationData, SplitName

_NAME = "ADEChallengeData2016"


class ADE20K(SegmentationData):
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

    def find_split(self, split: SplitName) -> Split:
        folder = {"train": "training", "val": "validation"}[split]
        places = [Place(self.root / _NAME), Place(self.root / f"{_NAME}.zip", f"{_NAME}/")]
        base = first_existing(places) or Place(self.root)
        return self.pair(base / "images" / folder, ".jpg", base / "annotations" / folder, ".png")
