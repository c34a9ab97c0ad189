"""ImageNet-1k (Russakovsky et al., IJCV 2015), or other images in a folder for each class.

Here an image has one class: a mask of one pixel. So criterion, confusion matrix and curve are
those of segmentation, and pixel accuracy is top-1 accuracy.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import albumentations as A
import numpy as np

from data.classes import ClassTable
from data.colors import Photometric, photometric_distortion
from data.dataset import EvaluationImages, OnError, TrainingImages
from data.decoding import decode_image
from data.files import Place, Split
from data.module import LoaderName, SegmentationData, SplitName
from data.transforms import seed_transform

_SUFFIX = ".JPEG"
# The side of an evaluation image, of which the centre is scored: 256 for crops of 224.
_EVALUATION_MARGIN = 256 / 224


class ImageNet(SegmentationData):
    """`root` holds train/ and val/ with a folder of .JPEG files for each class.

    The classes are the folders of train/ in alphabetical order, however many. Batches are those of
    `SegmentationData` with masks int64 (B, 1, 1): more than 255 classes leave no 255 to be ignored.

    Args:
        root: see above.
        batch_size, eval_batch_size: images per step and rank.
        workers: loading processes per rank; "auto" shares the cores out, at most 8 each.
        loader, on_error: see `SegmentationData`.
        crop_size: (height, width) that images are brought to: training ones by a random window of 8
            to 100 % of the image, evaluation ones by the centre of the image at 256/224 of it.
        photometric: see `SegmentationData`.
        seed: of order and augmentation.
        limit_train, limit_eval: use the first so many images only; None uses all.
    """

    title = "ImageNet"
    ignore_index = -1
    classifies_images = True
    official_images = (1281167, 50000)
    expected = (
        f"train/<class>/*{_SUFFIX} (1281167 in 1000 folders) and val/<class>/*{_SUFFIX} (50000 in"
        " folders of the same names, not all in one)"
    )
    how_to_get = (
        "ILSVRC2012_img_train.tar (md5 1d675b47d978889d74fa0da5fadfb00e) and ILSVRC2012_img_val.tar"
        " (md5 29b22e2961454d5413ddabcf34fc5622) from https://image-net.org/download (free"
        " registration)"
    )

    def __init__(
        self,
        root: str | Path,
        *,
        batch_size: int = 128,
        eval_batch_size: int = 128,
        workers: int | Literal["auto"] = "auto",
        loader: LoaderName = "shared_memory",
        on_error: OnError = "raise",
        crop_size: Sequence[int] = (224, 224),
        photometric: Photometric = False,
        seed: int = 0,
        limit_train: int | None = None,
        limit_eval: int | None = None,
    ) -> None:
        super().__init__(
            root,
            batch_size=batch_size,
            eval_batch_size=eval_batch_size,
            workers=workers,
            loader=loader,
            cache="none",
            on_error=on_error,
            crop_size=crop_size,
            photometric=photometric,
            eval_scale=None,
            seed=seed,
            limit_train=limit_train,
            limit_eval=limit_eval,
        )
        height, width = crop_size
        self.nominal_image_size = (height, width)

    @cached_property
    def table(self) -> ClassTable:  # type: ignore[override]
        names = tuple(self._class_folders("train"))
        palette = np.random.default_rng(0).integers(0, 256, (len(names), 3), dtype=np.uint8)
        return ClassTable(names, palette, raw_ids="", raw_to_train=np.empty(0, np.uint8))

    def find_split(self, split: SplitName) -> Split:
        base = self.root / split
        folders = self._class_folders(split)
        unknown = set(folders) - set(self.class_names)
        if unknown:
            raise self.missing(
                f"{len(unknown)} folders of {base} are not in {self.root / 'train'}, the first is"
                f" {min(unknown)}"
            )
        files = [
            (name.removesuffix(_SUFFIX), f"{folder}/{name}", folder)
            for folder in folders
            for name in sorted(entry.name for entry in os.scandir(base / folder))
            if name.endswith(_SUFFIX)
        ]
        if not files:
            raise self.missing(f"no {_SUFFIX} files in the {len(folders)} folders of {base}")
        # Folders are the labels: there are no files of them.
        return Split(Place(base), Place(base), files, self.table)

    def _class_folders(self, split: SplitName) -> list[str]:
        base = self.root / split
        names = sorted(e.name for e in os.scandir(base) if e.is_dir()) if base.is_dir() else []
        if not names:
            raise self.missing(f"no folders of classes in {base}")
        return names

    def class_counts(self) -> np.ndarray:
        """(K,) training images of each class."""
        counts = Counter(folder for _, _, folder in self._limited_split("train").files)
        return np.array([counts[name] for name in self.class_names])

    def training_images(self) -> TrainingImages:
        height, width = self.crop_size
        colors = photometric_distortion(self.photometric)
        transform = ClassificationTransform(
            [
                A.RandomResizedCrop((height, width), scale=(0.08, 1.0), area_for_downscale="image"),
                A.HorizontalFlip(p=0.5),
                *([colors] if colors else []),
            ]
        )
        split = self._limited_split("train")
        return ClassifiedTrainingImages(split, transform, self.seed, self.on_error)

    def evaluation_images(self) -> EvaluationImages:
        split = self._limited_split("val")
        return ClassifiedEvaluationImages(split, self.crop_size, self.on_error)


class ClassificationTransform:
    """Changes images alone; called as `data.transforms.TrainingTransform` is."""

    def __init__(self, steps: Sequence[A.BasicTransform]) -> None:
        self.compose = A.Compose(list(steps))

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, generator: np.random.Generator
    ) -> dict[str, Any]:
        seed_transform(self.compose, generator)
        return {"image": self.compose(image=image)["image"]}


class ClassifiedTrainingImages(TrainingImages):
    """Augmented images, each with the one pixel of its class."""

    def read(self, index: int) -> dict[str, Any]:
        return _read(self.split, index)


class ClassifiedEvaluationImages(EvaluationImages):
    """The centres of images, each with the one pixel of its class."""

    ignore_index = ImageNet.ignore_index

    def __init__(self, split: Split, crop_size: Sequence[int], on_error: OnError) -> None:
        super().__init__(split, None, None, on_error)
        height, width = crop_size
        sides = (round(height * _EVALUATION_MARGIN), round(width * _EVALUATION_MARGIN))
        self.transform = A.Compose(
            [
                A.SmallestMaxSize(max_size_hw=sides, area_for_downscale="image"),
                A.CenterCrop(height, width),
            ]
        )

    def read(self, index: int) -> dict[str, Any]:
        return _read(self.split, index)

    def resize(self, image: np.ndarray) -> np.ndarray:
        return self.transform(image=image)["image"]


def _read(split: Split, index: int) -> dict[str, Any]:
    name, file, folder = split.files[index]
    image = decode_image(split.images.read(file), f"{split.images}/{file}")
    mask = np.full((1, 1), split.table.class_names.index(folder), dtype=np.int64)
    return {"name": name, "image": image, "mask": mask}
