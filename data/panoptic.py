"""Panoptic ground truth of evaluation images: PNGs of segments, described by one JSON file.

The form is COCO's (panopticapi): a pixel's colour is the id of its segment, R + 256 G + 65536 B,
0 where there is none; the JSON file says which class each segment has, which classes are things,
and which segments are crowds.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data.classes import IGNORE_INDEX
from data.dataset import EvaluationImages, OnError
from data.decoding import decode_image
from data.files import Place, Split
from data.module import SegmentationData, SplitName
from segtrain.errors import UserError

#: What ADE20K's panoptic files call classes that have another name among the 150.
_OTHER_NAMES = {
    "window": "windowpane",
    "tub": "bathtub",
    "rail": "railing",
    "street lamp": "streetlight",
    "tv": "television receiver",
    "plane": "airplane",
    "clothes": "apparel",
    "pool": "swimming pool",
    "falls": "waterfall",
    "trash can": "ashcan",
}


@dataclass(frozen=True)
class PanopticTruth:
    """What the JSON file says.

    Attributes:
        place: folder of the PNGs.
        files: name of an image -> name of its PNG.
        segments: name of an image -> (n, 3) segment ids in rising order, and what their pixels
            become: class and instance.
        things: train ids of the classes of which there may be several.
    """

    place: Place
    files: dict[str, str]
    segments: dict[str, np.ndarray]
    things: tuple[int, ...]

    def read(self, name: str) -> np.ndarray:
        """The segments of an image's pixels.

        Returns:
            (H, W, 2) int32: train id and segment id; (255, 0) where void, (255, c + 1) in a crowd
            of class c.

        Raises:
            UserError: the PNG is missing, damaged, or shows a segment that the JSON file lacks.
        """
        file = f"{self.place}/{self.files[name]}"
        if not self.place.has(self.files[name]):
            raise UserError(f"{file} is missing, of which the JSON file beside it tells")
        content = self.place.read(self.files[name])
        red, green, blue = np.moveaxis(decode_image(content, file).astype(np.int32), -1, 0)
        ids = red | green << 8 | blue << 16
        known = self.segments[name]
        rows = np.searchsorted(known[:, 0], ids).clip(max=len(known) - 1)
        other = known[rows, 0] != ids
        if other.any():
            raise UserError(
                f"{file}: the JSON file beside it has no segment {ids[other][0]}. Make both anew"
            )
        return known[:, 1:][rows]


class PanopticImages(EvaluationImages):
    """Evaluation images with their panoptic ground truth at the original size, "segments"."""

    def __init__(
        self,
        split: Split,
        scale: Sequence[int] | None,
        size_divisor: int | None,
        on_error: OnError,
        truth: PanopticTruth,
    ) -> None:
        super().__init__(split, scale, size_divisor, on_error)
        self.truth = truth

    def read(self, index: int) -> dict[str, Any]:
        """Name, image, mask and segments.

        Raises:
            UserError: see `PanopticTruth.read`, or the segments are of another size.
        """
        sample = super().read(index)
        name = sample["name"]
        segments = self.truth.read(name)
        if segments.shape[:2] != sample["mask"].shape:
            (height, width), (label_height, label_width) = segments.shape[:2], sample["mask"].shape
            raise UserError(
                f"{self.truth.place}/{self.truth.files[name]} is {width}x{height} but the label of"
                f" {name} is {label_width}x{label_height}"
            )
        return {**sample, "segments": segments}

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = super().__getitem__(index)
        if sample.get("unreadable"):
            sample["segments"] = np.full_like(sample["segments"], (IGNORE_INDEX, 0))
        return sample


class PanopticData(SegmentationData):
    """A data set of which there is panoptic ground truth, too.

    Args:
        root: see `SegmentationData`.
        panoptic: whether evaluation batches hold it: "segments", int32 (B, H, W, 2), the train id
            and the segment of each pixel of the mask; (255, 0) is void, (255, c + 1) a crowd of
            class c.
        options: of `SegmentationData`.
    """

    # What a data set says about these files: their name without an ending (several where there are
    # variants), what follows an image's name in that of its PNG, and the words for an error.
    panoptic_names: tuple[str, ...]
    panoptic_suffix: str
    panoptic_expected: str
    how_to_make_panoptic: str

    def __init__(self, root: str | Path, *, panoptic: bool = False, **options: Any) -> None:
        super().__init__(root, **options)
        if panoptic and self.superpatches is not None:
            raise UserError("data.panoptic and data.superpatches exclude each other")
        self.panoptic = panoptic

    @abstractmethod
    def panoptic_places(self) -> Iterable[Place]:
        """The folders that may hold the JSON file."""

    @property
    def things(self) -> tuple[int, ...] | None:
        """Train ids of the classes of which there may be several; None without panoptic=true."""
        return self._truth.things if self.panoptic else None

    def check(self, splits: Sequence[SplitName] = ("train", "val")) -> None:
        """See `SegmentationData.check`; the panoptic files are looked for as well."""
        super().check(splits)
        if self.panoptic and "val" in splits:
            _ = self._truth

    def evaluation_images(self) -> EvaluationImages:
        """The evaluation images, resized, with their segments if there shall be some."""
        if not self.panoptic:
            return super().evaluation_images()
        split = self._limited_split("val")
        return PanopticImages(split, self.eval_scale, self.size_divisor, self.on_error, self._truth)

    @cached_property
    def _truth(self) -> PanopticTruth:
        places = list(self.panoptic_places())
        for name in self.panoptic_names:
            for place in places:
                if not place.has(f"{name}.json"):
                    continue
                content, file = place.read(f"{name}.json"), f"{place}/{name}.json"
                truth = read_truth(
                    content, file, place / name, self.panoptic_suffix, self.class_names
                )
                stems = (stem for stem, _, _ in self._limited_split("val").files)
                lacking = [s for stem in stems if (s := stem.split("/")[-1]) not in truth.files]
                if lacking:
                    raise self._missing_panoptic(
                        f"{file}, without {len(lacking)} of the evaluation images; the first is"
                        f" {lacking[0]}"
                    )
                if not truth.place.names(".png"):
                    raise self._missing_panoptic(f"{file}, but no .png files in {truth.place}")
                return truth
        names = " or ".join(f"{name}.json" for name in self.panoptic_names)
        raise self._missing_panoptic(f"no {names} in {' or '.join(map(str, places))}")

    def _missing_panoptic(self, found: str) -> UserError:
        return UserError(
            f"data.panoptic=true, but the panoptic files of {self.title} are missing or incomplete"
            f" in {self.root}\n"
            f"  expected: {self.panoptic_expected}\n"
            f"  found: {found}\n"
            f"  make them: {self.how_to_make_panoptic}"
        )


def read_truth(
    content: bytes, file: str, place: Place, suffix: str, class_names: Sequence[str]
) -> PanopticTruth:
    """Read the JSON file.

    Args:
        content: of the file.
        file: names it.
        place: folder of the PNGs.
        suffix: what follows an image's name in that of its PNG.
        class_names: by train id.

    Raises:
        UserError: the file is damaged, or has a category that is none of the classes.
    """
    try:
        told = json.loads(content)
        train_ids = {c["id"]: _train_id(c["name"], file, class_names) for c in told["categories"]}
        things = sorted(train_ids[c["id"]] for c in told["categories"] if c["isthing"])
        files, segments = {}, {}
        for annotation in told["annotations"]:
            name = annotation["file_name"].removesuffix(suffix)
            files[name] = annotation["file_name"]
            segments[name] = _segment_table(annotation["segments_info"], train_ids)
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file} is damaged or not in COCO's panoptic format ({error!r}): make it anew"
        ) from None
    return PanopticTruth(place, files, segments, tuple(things))


def _segment_table(infos: Iterable[Mapping[str, Any]], train_ids: Mapping[int, int]) -> np.ndarray:
    """(n, 3) int32 id, class, instance, by rising id, void among them."""
    rows = [(0, IGNORE_INDEX, 0)]
    for info in infos:
        train_id = train_ids[info["category_id"]]
        if info.get("iscrowd", 0):
            rows.append((info["id"], IGNORE_INDEX, train_id + 1))
        else:
            rows.append((info["id"], train_id, info["id"]))
    return np.array(sorted(rows), dtype=np.int32)


def _train_id(category: str, file: str, class_names: Sequence[str]) -> int:
    """The class that a category is; its name may be followed by others, after commas."""
    name = category.split(",")[0].strip().lower()
    name = name if name in class_names else _OTHER_NAMES.get(name, name)
    if name not in class_names:
        raise UserError(f"{file}: the category '{category}' is none of the classes of the data set")
    return class_names.index(name)
