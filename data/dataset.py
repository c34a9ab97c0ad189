"""The images of a split as PyTorch data sets, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import PurePosixPath
from typing import Any, Literal

import numpy as np
from torch.utils.data import Dataset, default_collate

from data.classes import IGNORE_INDEX
from data.decoding import decode_image, decode_raw_label
from data.files import Split
from data.transforms import resize_for_evaluation, sample_generator
from segtrain.errors import UserError

OnError = Literal["raise", "skip"]
#: Makes of image, mask and random numbers what of them goes into a sample.
SampleTransform = Callable[[np.ndarray, np.ndarray, np.random.Generator], dict[str, Any]]

#: Files that cannot be read, one after the other, before they are taken to be all.
_MOST_UNREADABLE = 20


def load(split: Split, index: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Read one image and its label.

    Returns:
        name (the file's, without folder and ending), image (H, W, 3) uint8 RGB, mask (H, W) uint8
        train ids with 255 = ignored. They may be a cache's own and are not to be written to.

    Raises:
        UserError: a file is damaged, holds an id outside the table, or the sizes differ.
    """
    stem, image_name, label_name = split.files[index]
    image, mask = load_image(split, index), load_label(split, index)
    if mask.shape != image.shape[:2]:
        (image_height, image_width), (height, width) = image.shape[:2], mask.shape
        raise UserError(
            f"{split.labels}/{label_name} is {width}x{height} but {split.images}/{image_name} is"
            f" {image_width}x{image_height}: one of them is not the original, replace both by the"
            " files of the archive"
        )
    return PurePosixPath(stem).name, image, mask


def load_image(split: Split, index: int) -> np.ndarray:
    """The image of `load` alone."""
    if split.cache is not None and split.cache.has_images:
        return split.cache.image(index)
    _, name, _ = split.files[index]
    return decode_image(split.images.read(name), f"{split.images}/{name}")


def load_label(split: Split, index: int) -> np.ndarray:
    """The mask of `load` alone."""
    if split.cache is not None:
        return split.cache.label(index)
    _, _, name = split.files[index]
    file = f"{split.labels}/{name}"
    raw = decode_raw_label(split.labels.read(name), file, split.table.raw_colors)
    return split.table.to_train_ids(raw, file)


class Images(Dataset[dict[str, Any]]):
    """The images of a split with their labels.

    Args:
        split: their files.
        on_error: with "skip" the next image takes the place of one that cannot be read, and
            samples say so: "unreadable" is what was wrong, "" where nothing was.
    """

    def __init__(self, split: Split, on_error: OnError) -> None:
        self.split = split
        self.on_error = on_error

    def __len__(self) -> int:
        return len(self.split.files)

    def read(self, index: int) -> dict[str, Any]:
        """Name, image and mask, as they are on disk.

        Raises:
            UserError: they cannot be read.
        """
        name, image, mask = load(self.split, index)
        return {"name": name, "image": image, "mask": mask}

    def read_or_skip(self, index: int) -> dict[str, Any]:
        """What `read` gives, or another image in its place.

        Raises:
            UserError: it cannot be read, and neither can others if `on_error` is "skip".
        """
        if self.on_error == "raise":
            return self.read(index)
        unreadable = ""
        for following in range(min(len(self), _MOST_UNREADABLE)):
            try:
                return {**self.read((index + following) % len(self)), "unreadable": unreadable}
            except UserError as error:
                unreadable = unreadable or str(error)
        raise UserError(f"{unreadable}\n  The images after it cannot be read either")


class TrainingImages(Images):
    """Augmented samples, addressed by (epoch, index).

    Sample `index` of `epoch` under `seed` is the same image, crop and colours in any process.
    """

    def __init__(
        self,
        split: Split,
        transform: SampleTransform,
        seed: int,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(split, on_error)
        self.transform = transform
        self.seed = seed

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        sample = self.read_or_skip(index)
        generator = sample_generator(self.seed, epoch, index)
        transformed = self.transform(sample["image"], sample["mask"], generator)
        return {**sample, **transformed, "epoch": epoch, "index": index}


class EvaluationImages(Images):
    """Resized images with their labels at the original size.

    Of an image that takes another's place nothing is scored: its mask is ignored.
    """

    #: What masks hold where nothing is scored.
    ignore_index = IGNORE_INDEX

    def __init__(
        self,
        split: Split,
        scale: Sequence[int] | None,
        size_divisor: int | None,
        on_error: OnError = "raise",
    ) -> None:
        super().__init__(split, on_error)
        self.scale = scale
        self.size_divisor = size_divisor

    def __getitem__(self, index: int) -> dict[str, Any]:
        sample = self.read_or_skip(index)
        # Not a cache's memory: PyTorch warns of what cannot be written to.
        sample["image"] = np.require(self.resize(sample["image"]), requirements="W")
        if sample.get("unreadable"):
            sample["mask"] = np.full_like(sample["mask"], self.ignore_index)
        return {**sample, "index": index}

    def resize(self, image: np.ndarray) -> np.ndarray:
        return resize_for_evaluation(image, self.scale, self.size_divisor)


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
