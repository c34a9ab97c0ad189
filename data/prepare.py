"""Say how the labels of a data set become train ids, and write such labels for other programs.

python -m data.prepare data=cityscapes data.root=FOLDER
python -m data.prepare data=cocostuff data.root=FOLDER labels=train_ids output=FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import cv2

from command_line import run_command
from data.dataset import load_label
from data.every_file import for_every, open_data_set
from data.files import Split, write_file
from data.module import SegmentationData, SplitName
from data.scenes import Scenes
from segtrain.errors import UserError, did_you_mean

OPTIONS = {
    "labels": "train_ids: write labels that hold train ids, and 255 where ignored",
    "output": "FOLDER that these are written to; those that are there already stay",
}
_USAGE = """\
Says how labels are read. They are read as distributed, so training needs nothing to be prepared;
other programs may need labels=train_ids.

usage: python -m data.prepare data=NAME data.root=FOLDER [labels=train_ids output=FOLDER]
                              [workers=N]
"""
#: Data set -> folders of both splits and the end of a file's name, as other programs expect them:
#: cityscapesScripts, MMSegmentation (COCO-Stuff) and Mask2Former (ADE20K).
NAMES = {
    "ADE20K": ("annotations_detectron2/training", "annotations_detectron2/validation", ".png"),
    "Cityscapes": ("gtFine/train", "gtFine/val", "_gtFine_labelTrainIds.png"),
    "COCO-Stuff 164k": ("annotations/train2017", "annotations/val2017", "_labelTrainIds.png"),
    "COCO-Stuff 10k": ("annotations/train2014", "annotations/test2014", "_labelTrainIds.png"),
}
_OTHER_NAMES = ("labels/train", "labels/val", ".png")


@dataclass(frozen=True)
class Converter:
    """Writes the labels of a split with train ids.

    Attributes:
        split: whose labels.
        folder: that they are written to.
        suffix: of their names, after the image's.
    """

    split: Split
    folder: Path
    suffix: str

    def __call__(self, index: int) -> bool:
        """Write a label unless it is there; whether it was written."""
        stem, _, _ = self.split.files[index]
        path = self.folder / f"{stem}{self.suffix}"
        if path.exists():
            return False
        _, content = cv2.imencode(".png", load_label(self.split, index))
        try:
            write_file(path, content.tobytes())
        except OSError as error:
            raise UserError(f"{path} cannot be written: {error.strerror}") from None
        return True


def main(arguments: list[str]) -> int:
    """Run the command line; returns its status: 0, 2 for a user's slip, 130 if interrupted."""
    return run_command(prepare, arguments)


def prepare(arguments: list[str]) -> None:
    """Describe the labels, and write converted ones if asked for."""
    opened = open_data_set(arguments, _USAGE, OPTIONS)
    if opened is None:
        return
    data_module, given = opened
    labels, output = given.values.get("labels"), given.values.get("output")
    if labels not in (None, "train_ids"):
        raise UserError(f"labels={labels}: {did_you_mean(str(labels), ['train_ids'])}")
    if (labels is None) != (output is None):
        raise UserError("labels=train_ids and output=FOLDER go together: give both or neither")
    if data_module.classifies_images:
        raise UserError(f"{data_module.title} has folders for labels: there is none to convert")
    data_module.prepare_data()
    names: tuple[SplitName, SplitName] = ("train", "val")
    splits = {name: data_module.find_split(name) for name in names}
    for name, split in splits.items():
        print(f"{name}: {len(split.files)} images in {split.images}, labels in {split.labels}")
        print(f"  {describe(split)}")
    if output is None:
        print("nothing has to be prepared")
        return
    try:
        for converter, unit in find_work(data_module, splits, Path(output)):
            items = range(len(converter.split.files))
            written = sum(for_every(converter, items, given.values["workers"], unit))
            kept = len(items) - written
            print(f"{converter.folder}: {written} {unit} written, {kept} were there")
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where this one stopped") from None


def describe(split: Split) -> str:
    """How the labels of a split become train ids while loading."""
    _, _, first = split.files[0]
    if split.table.raw_colors is not None:
        return f"labels show {len(split.table.raw_colors)} colours, looked up while loading"
    if first.endswith(".mat"):
        return "labels are MATLAB files with COCO ids, looked up while loading"
    return f"labels hold {split.table.raw_ids}, looked up in a table while loading"


def find_work(
    data_module: SegmentationData, splits: dict[SplitName, Split], output: Path
) -> Iterable[tuple[Converter, str]]:
    """What writes the labels of each split, and what these are called."""
    reader = data_module.reader if isinstance(data_module, Scenes) else data_module
    *folders, suffix = NAMES.get(reader.title, _OTHER_NAMES)
    for (name, split), folder in zip(splits.items(), folders, strict=True):
        yield Converter(split, output / folder, suffix), f"{name} labels"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
