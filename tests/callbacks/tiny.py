"""A real network and module on a few small images in memory."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import lightning
import numpy as np
import torch
from lightning.pytorch import Trainer
from torch.utils.data import DataLoader, Dataset, Sampler

from segtrain import create_network
from segtrain.training import AdamW, CrossEntropy, PolynomialSchedule, SegmentationModule

NUM_CLASSES = 4
NUM_IMAGES = 7
#: Of the network below, the training one first and the most reduced last.
SETTINGS = list(create_network("edaformer_nano", num_classes=NUM_CLASSES).settings)


class Images(Dataset):
    """Coloured blocks with their classes; counts how often each is read."""

    def __init__(self, seed):
        random = np.random.default_rng(seed)
        blocks = random.integers(0, NUM_CLASSES, (NUM_IMAGES, 4, 4))
        self.masks = blocks.repeat(16, axis=1).repeat(24, axis=2).astype(np.uint8)
        noise = random.integers(0, 60, (*self.masks.shape, 3))
        self.images = (self.masks[..., None] * 60 + noise).astype(np.uint8)
        self.masks[:, :5] = 255
        self.reads = [0] * NUM_IMAGES

    def __len__(self):
        return NUM_IMAGES

    def __getitem__(self, index):
        self.reads[index] += 1
        return {
            "image": self.images[index][:, ::2],  # labels keep their original size
            "mask": self.masks[index],
            "name": f"image {index}",
            "index": index,
        }


class Endless(Sampler):
    def __init__(self, start):
        self.start = start

    def __iter__(self):
        position = self.start
        while True:
            yield position % NUM_IMAGES
            position += 1


class TinyData(lightning.LightningDataModule):
    class_names = ("sky", "road", "car", "tree")
    palette = np.array([[0, 0, 255], [90, 90, 90], [255, 0, 0], [0, 255, 0]], np.uint8)
    image_size_for_cost = (64, 64)

    def __init__(self):
        super().__init__()
        self.train, self.val = Images(0), Images(1)
        self.start = 0

    def train_dataloader(self):
        return DataLoader(self.train, batch_size=2, sampler=Endless(self.start))

    def val_dataloader(self):
        return DataLoader(self.val, batch_size=2)

    def state_dict(self):
        batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
        return {"samples_seen": 2 * batches}

    def load_state_dict(self, state_dict):
        self.start = state_dict["samples_seen"]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        image = batch["image"].permute(0, 3, 1, 2).float()
        mean = image.new_tensor([123.675, 116.28, 103.53]).view(3, 1, 1)
        deviation = image.new_tensor([58.395, 57.12, 57.375]).view(3, 1, 1)
        return {**batch, "image": (image - mean) / deviation, "mask": batch["mask"].long()}


class SameSize(CrossEntropy):
    """Training images of TinyData are half as wide as their labels."""

    def forward(self, scores, mask):
        return super().forward(scores, mask[..., ::2])


def create_module(seed=0, network=None):
    torch.manual_seed(seed)
    network = network or create_network(
        "edaformer_nano",
        NUM_CLASSES,
        widths=(8, 16, 32, 64),
        depths=(1, 1, 1, 1),
        fuse_width=16,
        dropout=0.0,
    )
    return SegmentationModule(
        network,
        SameSize(),
        AdamW(learning_rate=2e-3, weight_decay=0.01),
        PolynomialSchedule(steps=1000, warmup_steps=2),
        log_every=1,
    )


def create_trainer(callbacks, loggers=(), steps=4, validate_every=2, accumulate=1, **more):
    return Trainer(
        accelerator="cpu",
        max_steps=steps,
        max_epochs=-1,
        val_check_interval=validate_every * accumulate,
        check_val_every_n_epoch=None,
        accumulate_grad_batches=accumulate,
        use_distributed_sampler=False,
        callbacks=list(callbacks),
        logger=list(loggers) or False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"num_sanity_val_steps": 0, **more},
    )


def wandb_file(run_folder: Path) -> Path:
    (path,) = run_folder.glob("wandb/offline-run-*/run-*.wandb")
    return path


def wandb_records(run_folder: Path):
    """Records of an offline W&B run: LevelDB log blocks behind a header of seven bytes."""
    from wandb.proto import wandb_internal_pb2

    data, position, payload = wandb_file(run_folder).read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:  # a chunk header does not cross blocks
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        payload += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, last of several
            yield wandb_internal_pb2.Record.FromString(payload)
            payload = b""


def wandb_history(run_folder: Path):
    """Logged rows: key -> value, nested keys joined by dots."""
    return [
        {
            item.key or ".".join(item.nested_key): json.loads(item.value_json)
            for item in record.history.item
        }
        for record in wandb_records(run_folder)
        if record.WhichOneof("record_type") == "history"
    ]


def wandb_config(run_folder: Path):
    (run,) = (r.run for r in wandb_records(run_folder) if r.WhichOneof("record_type") == "run")
    return {item.key: json.loads(item.value_json) for item in run.config.update}


def wandb_artifacts(run_folder: Path):
    """Logged artifacts but those that W&B makes itself, oldest first."""
    records = [r for r in wandb_records(run_folder) if r.WhichOneof("record_type") == "request"]
    artifacts = [r.artifact for r in wandb_records(run_folder) if r.HasField("artifact")]
    artifacts += [
        r.request.log_artifact.artifact for r in records if r.request.HasField("log_artifact")
    ]
    return [artifact for artifact in artifacts if artifact.type == "model"]
