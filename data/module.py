"""What all data sets share: loaders, seeding, normalisation and the place in the stream."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import lightning
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from data.cached import open_cache
from data.classes import IGNORE_INDEX, ClassTable
from data.colors import Photometric, distort_batch, per_channel, photometric_distortion
from data.custom_transforms import build_transforms
from data.dataset import EvaluationImages, OnError, TrainingImages, collate_evaluation, load_label
from data.files import Place, Split
from data.geometry import RandomScaledCrop
from data.loader import SegmentationLoader, automatic_workers, prepare_worker
from data.sampling import EndlessBatchSampler, RankSampler
from data.superpatches import (
    CLASS_NAMES,
    PALETTE,
    Superpatches,
    SuperpatchImages,
    label_superpatches,
)
from data.transforms import PAD_COLOR, TrainingTransform
from segtrain.classes import Classes
from segtrain.errors import UserError
from segtrain.inference import IMAGE_MEAN, IMAGE_STD, keep_ratio_size

SplitName = Literal["train", "val"]
LoaderName = Literal["shared_memory", "stock"]
PhotometricOn = Literal["auto", "device", "workers"]


class SegmentationData(lightning.LightningDataModule, ABC):
    """Images and labels of one data set, as an endless training stream and an evaluation set.

    A training batch is {"image": uint8 (B, H, W, 3) RGB, "mask": uint8 (B, H, W), "name": list of
    str, "epoch": int64 (B,), "index": int64 (B,)}; an evaluation batch holds the resized image,
    the mask at the original size, "name" and "index". With `on_error="skip"` both hold
    "unreadable": list of str, what was wrong with files whose place another image takes. With
    colours on the device training batches hold "distortion" and "content" for
    `data.colors.distort_batch`. On the device images become float32
    (B, 3, H, W), normalised, in channels-last memory, and masks int64.

    The defaults are EDAFormer's recipe for ADE20K and COCO-Stuff.

    Args:
        root: folder that holds the data set as distributed.
        batch_size: training images per step and rank.
        eval_batch_size: evaluation images per step and rank; more than 1 needs equal sizes.
        workers: loading processes per rank; "auto" shares the cores out, at most 8 each.
        loader: how they hand batches over: through shared memory that is there from the start, or
            with "stock" as PyTorch does.
        cache: folder of a cache that `python -m data.cache` made; "auto" for the one in `root` if
            there is one, "none" for the files.
        on_error: what a file that cannot be read does: "raise" stops, "skip" takes another image
            (see `data.dataset.Images`).
        crop_size: (height, width) of training crops.
        train_scale: (long, short) side that training images are resized into, times a factor; None
            for the size that they have.
        scale_range: lowest and highest factor.
        scale_step: between the factors that are drawn; None draws any.
        shortest_edge: the factor is for the short side alone, and the long side is a limit.
        cat_max_ratio: crops are redrawn while one class covers at least this share; 1 never does.
        joint_crop_offset: one random number places crops in both directions, as in large-scale
            jitter.
        photometric: whether training colours are distorted; "pil" for PaddleSeg's distortion
            instead of MMSegmentation's.
        photometric_on: where: while loading, or on the device of the network for a whole batch;
            "auto" for a GPU if there is one. PaddleSeg's is done while loading.
        pad_color: RGB of what pads images to the size of crops.
        transforms: of albumentations, by name, between crop and colours (see
            `data.custom_transforms.build_transforms`).
        eval_scale: (long, short) side that evaluation images are resized into; None keeps them.
        size_divisor: evaluation images are resized up to multiples of it; None keeps them.
        superpatches: masks say of 32x32 pixels of the resized images whether they show one class,
            by `label_superpatches`; None leaves masks of pixels.
        seed: of order and augmentation.
        limit_train, limit_eval: use the first so many images only; None uses all.
    """

    ignore_index: int = IGNORE_INDEX
    #: Whether an image has one class, in a mask of one pixel.
    classifies_images: bool = False
    nominal_image_size: tuple[int, int] = (512, 512)  # height, width
    #: Of the folder in `root` where a cache belongs.
    cache_name: str = "segtrain_cache"
    #: Where `pair` notes the files that others lack as counterparts; None raises for them.
    unpaired: list[tuple[Place, str]] | None = None
    # What a data set says about itself: its name, classes, and files as distributed.
    title: str
    table: ClassTable
    official_images: tuple[int, int]  # training, evaluation
    expected: str
    how_to_get: str

    def __init__(
        self,
        root: str | Path,
        *,
        batch_size: int = 4,
        eval_batch_size: int = 1,
        workers: int | Literal["auto"] = "auto",
        loader: LoaderName = "shared_memory",
        cache: str | Path = "auto",
        on_error: OnError = "raise",
        crop_size: Sequence[int] = (512, 512),
        train_scale: Sequence[int] | None = (2048, 512),
        scale_range: Sequence[float] = (0.5, 2.0),
        scale_step: float | None = None,
        shortest_edge: bool = False,
        cat_max_ratio: float = 0.75,
        joint_crop_offset: bool = False,
        photometric: Photometric = True,
        photometric_on: PhotometricOn = "auto",
        pad_color: Sequence[int] = PAD_COLOR,
        transforms: Sequence[Mapping[str, Any]] = (),
        eval_scale: Sequence[int] | None = (2048, 512),
        size_divisor: int | None = 32,
        superpatches: Superpatches | None = None,
        seed: int = 0,
        limit_train: int | None = None,
        limit_eval: int | None = None,
    ) -> None:
        super().__init__()
        if shortest_edge and train_scale is None:
            raise UserError(
                "data.shortest_edge=true needs sides to resize to, and data.train_scale is null"
            )
        if photometric == "pil" and photometric_on == "device":
            raise UserError(
                "data.photometric=pil distorts colours while loading only: set"
                " data.photometric_on=workers, or data.photometric=true"
            )
        self.root = Path(root)
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.workers = workers
        self.loader = loader
        self.cache = cache
        self.on_error = on_error
        self.crop_size = crop_size
        self.train_scale = train_scale
        self.scale_range = scale_range
        self.scale_step = scale_step
        self.shortest_edge = shortest_edge
        self.cat_max_ratio = cat_max_ratio
        self.joint_crop_offset = joint_crop_offset
        self.photometric = photometric
        self.photometric_on = photometric_on
        self.pad_color = pad_color
        self.transforms = build_transforms(transforms, crop_size, pad_color)
        self.eval_scale = eval_scale
        self.size_divisor = size_divisor
        self.superpatches = superpatches
        self.seed = seed
        self.limits: dict[SplitName, int | None] = {"train": limit_train, "val": limit_eval}
        self._splits: dict[SplitName, Split] = {}
        self._start = 0
        self._start_step: int | None = None

    @abstractmethod
    def find_split(self, split: SplitName) -> Split:
        """Find and pair the files of a split.

        Raises:
            UserError: they are missing or incomplete: what was expected, what was found, and how
                to get it.
        """

    @property
    def image_size_for_cost(self) -> tuple[int, int]:
        """(height, width) of an image of the nominal shape, resized as for evaluation."""
        if self.eval_scale is None:
            return self.nominal_image_size
        return keep_ratio_size(self.nominal_image_size, self.eval_scale)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def class_names(self) -> tuple[str, ...]:
        return self.table.class_names if self.superpatches is None else CLASS_NAMES

    @property
    def palette(self) -> np.ndarray:
        """(K, 3) uint8 RGB."""
        return self.table.palette if self.superpatches is None else PALETTE

    @property
    def classes(self) -> Classes:
        """Names and colours, as checkpoints hold them."""
        palette = tuple((int(r), int(g), int(b)) for r, g, b in self.palette)
        return Classes(tuple(self.class_names), palette, self.ignore_index)

    def check(self, splits: Sequence[SplitName] = ("train", "val")) -> None:
        """Look whether the files are there, before anything expensive is built.

        Raises:
            UserError: see `find_split`.
        """
        for name in splits:
            found = len(self._split(name).files)
            official = self.official_images[("train", "val").index(name)]
            if found != official:
                rank_zero_warn(
                    f"{self.title} {name}: {found} images in {self.root}, officially {official}"
                )

    def pair(
        self,
        images: Place,
        image_suffix: str,
        labels: Place,
        label_suffix: str,
        keep: Callable[[str], bool] = lambda stem: True,
    ) -> Split:
        """Pair the files of two places that end in these suffixes, for `find_split`.

        Args:
            keep: which stems (file names without the suffix) belong to the split.

        Raises:
            UserError: there are none, or some have no counterpart.
        """
        image_of, label_of = (
            {stem: name for name in place.names(suffix) if keep(stem := name.removesuffix(suffix))}
            for place, suffix in ((images, image_suffix), (labels, label_suffix))
        )
        found = (
            f"{len(image_of)} {image_suffix} files in {images},"
            f" {len(label_of)} {label_suffix} files in {labels}"
        )
        # Sorted lists of both are not simply zipped: one missing file would shift all pairs.
        for alone, what in (
            (image_of.keys() - label_of.keys(), "images have no label"),
            (label_of.keys() - image_of.keys(), "labels have no image"),
        ):
            if alone and self.unpaired is None:
                raise self.missing(f"{found}; {len(alone)} {what}, the first is {min(alone)}")
        pairs = image_of.keys() & label_of.keys()
        if not pairs:
            raise self.missing(found)
        if self.unpaired is not None:
            self.unpaired += [(labels, s + label_suffix) for s in sorted(image_of.keys() - pairs)]
            self.unpaired += [(images, s + image_suffix) for s in sorted(label_of.keys() - pairs)]
        files = [(stem, image_of[stem], label_of[stem]) for stem in sorted(pairs)]
        return Split(images, labels, files, self.table)

    def missing(self, found: str) -> UserError:
        """The one error for files that are not there."""
        if not self.root.exists():
            found = f"no folder {self.root}"
        return UserError(
            f"{self.title} is missing or incomplete in {self.root}\n"
            f"  expected: {self.expected}\n"
            f"  found: {found}\n"
            f"  get it: {self.how_to_get}"
        )

    @property
    def cache_folder(self) -> Path:
        """Where `python -m data.cache` puts the cache, and where it is looked for."""
        return self.root / self.cache_name if self.cache == "auto" else Path(self.cache)

    def _split(self, name: SplitName) -> Split:
        if name not in self._splits:
            split = self.find_split(name)
            if self.cache != "none":
                split = replace(split, cache=open_cache(split, self.cache_folder / name))
            self._splits[name] = split
        return self._splits[name]

    def _limited_split(self, name: SplitName) -> Split:
        split = self._split(name)
        return replace(split, files=split.files[: self.limits[name]])

    def class_counts(self) -> np.ndarray:
        """(K,) labelled pixels of each class, over at most 2,000 evenly spaced training images.

        With superpatches it is those of the images at their own size.
        """
        split = self._limited_split("train")
        counts = np.zeros(256, dtype=np.int64)
        for index in range(0, len(split.files), -(-len(split.files) // 2000)):
            try:
                mask = load_label(split, index)
            except UserError:
                if self.on_error == "raise":
                    raise
                continue
            if self.superpatches is not None:
                mask = label_superpatches(mask, self.superpatches)
            counts += np.bincount(mask.ravel(), minlength=256)
        return counts[: self.num_classes]

    @property
    def samples_seen(self) -> int:
        """Training samples that all ranks together have consumed in optimiser steps so far."""
        if self.trainer is None or self._start_step is None:
            return self._start
        steps = self.trainer.global_step - self._start_step
        batches = steps * self.trainer.accumulate_grad_batches
        return self._start + batches * self.batch_size * self.trainer.world_size

    def state_dict(self) -> dict[str, Any]:
        return {"samples_seen": self.samples_seen}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start = state_dict["samples_seen"]
        self._start_step = None

    def training_images(self) -> TrainingImages:
        """The training images, augmented."""
        crop = RandomScaledCrop(
            self.crop_size,
            self.train_scale,
            self.scale_range,
            self.cat_max_ratio,
            self.scale_step,
            self.shortest_edge,
            self.joint_crop_offset,
        )
        transform = TrainingTransform(
            crop,
            self.transforms,
            photometric_distortion(self.photometric),
            colors_on_device=self._colors_on_device(),
            pad_color=self.pad_color,
        )
        split = self._limited_split("train")
        return TrainingImages(split, transform, self.seed, self.on_error)

    def _colors_on_device(self) -> bool:
        if self.photometric is not True:
            return False
        if self.photometric_on == "auto":
            return self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        return self.photometric_on == "device"

    def evaluation_images(self) -> EvaluationImages:
        """The evaluation images, resized."""
        split = self._limited_split("val")
        return EvaluationImages(split, self.eval_scale, self.size_divisor, self.on_error)

    def _labelled(
        self, images: TrainingImages | EvaluationImages
    ) -> TrainingImages | EvaluationImages | SuperpatchImages:
        return images if self.superpatches is None else SuperpatchImages(images, self.superpatches)

    def train_dataloader(self) -> DataLoader[dict[str, Any]]:
        """An endless loader that starts behind the samples already seen."""
        self._start = self.samples_seen
        self._start_step = self.trainer.global_step if self.trainer else None
        dataset = self._labelled(self.training_images())
        rank, world_size = self._rank_and_world_size()
        batches = EndlessBatchSampler(
            len(dataset),
            self.batch_size,
            seed=self.seed,
            start=self._start,
            rank=rank,
            world_size=world_size,
        )
        return self._loader(dataset, batch_sampler=batches)

    def val_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every evaluation image once, split over the ranks without padding.

        Raises:
            UserError: there are fewer images than ranks.
        """
        return self._evaluation_loader(self.evaluation_images(), "evaluation", "data.limit_eval")

    def predict_dataloader(self) -> DataLoader[dict[str, Any]]:
        """Every training image once, resized as for evaluation, split over the ranks.

        Raises:
            UserError: there are fewer images than ranks.
        """
        split = self._limited_split("train")
        images = EvaluationImages(split, self.eval_scale, self.size_divisor, self.on_error)
        return self._evaluation_loader(images, "training", "data.limit_train")

    def _evaluation_loader(
        self, images: EvaluationImages, kind: str, limit: str
    ) -> DataLoader[dict[str, Any]]:
        dataset = self._labelled(images)
        rank, world_size = self._rank_and_world_size()
        if len(dataset) < world_size:
            # A rank without a batch would skip what the others then wait for.
            raise UserError(
                f"{len(dataset)} {kind} images cannot be shared by {world_size} processes:"
                f" use fewer trainer.devices or more images ({limit})"
            )
        return self._loader(
            dataset,
            batch_size=self.eval_batch_size,
            sampler=RankSampler(len(dataset), rank=rank, world_size=world_size),
            collate_fn=collate_evaluation,
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        image = batch["image"].permute(0, 3, 1, 2).float()  # keeps the memory: channels last
        if "distortion" in batch:
            image = distort_batch(image, batch["distortion"], batch["content"])
        mean, std = (per_channel(values, image.device) for values in (IMAGE_MEAN, IMAGE_STD))
        return {**batch, "image": image.sub_(mean).div_(std), "mask": batch["mask"].long()}

    def _rank_and_world_size(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def _loader(self, dataset: Dataset[dict[str, Any]], **options: Any) -> SegmentationLoader:
        ranks_here = self.trainer.num_devices if self.trainer else 1
        workers = automatic_workers(ranks_here) if self.workers == "auto" else self.workers
        device = self.trainer.strategy.root_device if self.trainer else None
        return SegmentationLoader(
            dataset,
            stock=self.loader == "stock",
            device=device,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=prepare_worker,
            **options,
        )
