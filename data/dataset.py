"""The images of a split as PyTorch data sets, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

import albumentations as A
import numpy as np
from torch.utils.data import Dataset, default_collate

from data.decoding import (
    decode_colored_label,
    decode_image,
    decode_label,
    decode_matlab_label,
)
from data.files import Split
from data.transforms import resize_for_evaluation, seed_transform
from segtrain.errors import UserError


def load(split: Split, index: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Read one image and its label.

    Returns:
        name (the file's, without folder and ending), image (H, W, 3) uint8 RGB, mask (H, W) uint8
        train ids with 255 = ignored.

    Raises:
        UserError: a file is damaged, holds an id outside the table, or the sizes differ.
    """
    stem, image_name, label_name = split.files[index]
    image_file, label_file = f"{split.images}/{image_name}", f"{split.labels}/{label_name}"
    image = decode_image(split.images.read(image_name), image_file)
    mask = load_label(split, index)
    if mask.shape != image.shape[:2]:
        (image_height, image_width), (height, width) = image.shape[:2], mask.shape
        raise UserError(
            f"{label_file} is {width}x{height} but {image_file} is {image_width}x{image_height}:"
            " one of them is not the original, replace both by the files of the archive"
        )
    return PurePosixPath(stem).name, image, mask


def load_label(split: Split, index: int) -> np.ndarray:
    """The mask of `load` alone."""
    _, _, name = split.files[index]
    file = f"{split.labels}/{name}"
    content = split.labels.read(name)
    if split.table.raw_colors is not None:
        raw = decode_colored_label(content, file, split.table.raw_colors)
    else:
        decode = decode_matlab_label if name.endswith(".mat") else decode_label
        raw = decode(content, file)
    return split.table.to_train_ids(raw, file)


class TrainingImages(Dataset[dict[str, Any]]):
    """Augmented samples, addressed by (epoch, index).

    Sample `index` of `epoch` under `seed` is the same image, crop and colours in any process.
    """

    def __init__(self, split: Split, transform: A.Compose, seed: int) -> None:
        self.split = split
        self.transform = transform
        self.seed = seed

    def __len__(self) -> int:
        return len(self.split.files)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        seed_transform(self.transform, self.seed, epoch, index)
        return {**self.sample(index), "epoch": epoch, "index": index}

    def sample(self, index: int) -> dict[str, Any]:
        """Image, mask and name, transformed by what was seeded last."""
        name, image, mask = load(self.split, index)
        return {**self.transform(image=image, mask=mask), "name": name}


class EvaluationImages(Dataset[dict[str, Any]]):
    """Resized images with their labels at the original size."""

    def __init__(self, split: Split, scale: Sequence[int] | None, size_divisor: int | None) -> None:
        self.split = split
        self.scale = scale
        self.size_divisor = size_divisor

    def __len__(self) -> int:
        return len(self.split.files)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {**self.sample(index), "index": index}

    def sample(self, index: int) -> dict[str, Any]:
        """Resized image, mask and name."""
        name, image, mask = load(self.split, index)
        image = resize_for_evaluation(image, self.scale, self.size_divisor)
        return {"image": image, "mask": mask, "name": name}


def collate_evaluation(samples: list[dict[str, Any]]) -> dict[str, Any]:
    """Stack samples of one size.

    Raises:
        UserError: their sizes differ.
    """
    first = samples[0]
    for sample in samples[1:]:
        if any(sample[key].shape != first[key].shape for key in ("image", "mask")):
            (height, width), (other_height, other_width) = first["mask"].shape, sample["mask"].shape
            raise UserError(
                f"evaluation images of different sizes cannot share a batch: {first['name']} is"
                f" {width}x{height}, {sample['name']} {other_width}x{other_height}."
                " Set data.eval_batch_size=1"
            )
    return default_collate(samples)
