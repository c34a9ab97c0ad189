"""A trained network in somebody else's program: from a run to label maps in one line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from segtrain.checkpoints import find_checkpoint, read_checkpoint
from segtrain.classes import Classes
from segtrain.errors import UserError, first_line
from segtrain.inference import IMAGE_MEAN, IMAGE_STD, Inference, evaluation_sizes
from segtrain.networks import Network, create_network
from segtrain.reduction import Setting
from segtrain.weights import load_weights

_AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}


@dataclass
class TrainedNetwork:
    """A network with all that leads from pictures to label maps as in its validations.

    Attributes:
        network: in evaluation mode, under the setting that is asked for.
        classes: that it tells apart: names, palette, the number that is ignored.
        inference: how images are scored.
        eval_scale: (long, short) side that images are resized into; None keeps them.
        size_divisor: images are resized up to multiples of it; None keeps them.
        step: optimiser steps of the training; None if unknown.
        config: of the run; empty if unknown.
    """

    network: Network
    classes: Classes
    inference: Inference
    eval_scale: Sequence[int] | None = None
    size_divisor: int | None = None
    step: int | None = None
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @torch.inference_mode()
    def predict(self, images: np.ndarray | Tensor) -> np.ndarray:
        """Classes of one image (H, W, 3) or several of one size (B, H, W, 3), uint8 RGB.

        Args:
            images: an array, a tensor, or what `numpy.asarray` makes one of, as a PIL image.

        Returns:
            (H, W) or (B, H, W) int64, at the images' size.

        Raises:
            UserError: these are no such images, or the network labels whole images.
        """
        if self.network.classifies_images:
            raise UserError(
                "this network gives one class to a whole image: there are no label maps; "
                "trained.network(images) gives its scores"
            )
        batch = _as_batch(images)
        size = batch.shape[1], batch.shape[2]
        kind = _AUTOCAST.get(str((self.config.get("trainer") or {}).get("precision")))
        with torch.autocast(self.device.type, kind, enabled=kind is not None):
            found = self.inference(self.network, self.preprocess(batch), size)
        classes = found.cpu().numpy()
        return classes if np.ndim(images) == 4 else classes[0]

    def preprocess(self, images: Tensor) -> Tensor:
        """(B, H, W, 3) uint8 RGB -> (B, 3, h, w) float32, resized as in validations, normalised."""
        pixels = images.to(self.device).permute(0, 3, 1, 2).float()
        size = images.shape[1], images.shape[2]
        for wanted in evaluation_sizes(size, self.eval_scale, self.size_divisor):
            if wanted != (pixels.shape[2], pixels.shape[3]):
                # Data modules have OpenCV do it, which is off by at most one grey level.
                pixels = F.interpolate(pixels, wanted, mode="bilinear").round_()
        mean, std = (pixels.new_tensor(v).view(1, 3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        return pixels.sub_(mean).div_(std)

    def color(self, classes: np.ndarray) -> np.ndarray:
        """(H, W) classes -> (H, W, 3) uint8 in the colours of the palette, black where of none."""
        table = np.zeros((max(256, len(self.classes.palette)), 3), np.uint8)
        table[: len(self.classes.palette)] = self.classes.palette
        return table[classes]


def _as_batch(images: np.ndarray | Tensor) -> Tensor:
    """(B, H, W, 3) uint8 of one image or several; raises UserError for anything else."""
    if not isinstance(images, Tensor):
        # torch takes neither reversed arrays nor, without a warning, those that PIL holds.
        images = torch.from_numpy(_as_own_array(images))
    batch = images[None] if images.ndim == 3 else images
    if batch.ndim != 4 or batch.shape[3] != 3 or batch.dtype != torch.uint8 or not batch.numel():
        raise UserError(
            "an image is (height, width, 3) of uint8, red, green and blue; this is "
            f"{tuple(images.shape)} of {str(images.dtype).removeprefix('torch.')}: "
            "PIL's image.convert('RGB') makes one of grey, palette and RGBA images"
        )
    return batch


def _as_own_array(images: Any) -> np.ndarray:
    array = np.require(images, requirements=["C", "W"])
    if array.dtype.kind not in "biuf":
        raise UserError(f"an image is (height, width, 3) of uint8; this is {type(images).__name__}")
    return array


def from_run(
    source: str | Path,
    checkpoint: str = "best",
    setting: str | Setting | Mapping[str, Any] | None = None,
    device: str | torch.device | None = None,
) -> TrainedNetwork:
    """The network of a run, ready to label images. Nothing else is downloaded.

    Where the run averaged its weights, it is the average that its validations scored.

    Args:
        source: a run's folder, a checkpoint of one, or ``wandb:entity/project/RUN_ID[:alias]``.
        checkpoint: which of a run's: ``best``, or ``last`` where there is no best, ...
        setting: what the network computes under; its training setting if None.
        device: where it computes; a GPU if there is one.

    Raises:
        UserError: there is no such checkpoint, or it is damaged, or of no run, or the network has
            no such setting.
    """
    path = find_checkpoint(source, checkpoint)
    return open_checkpoint(path, read_checkpoint(path), setting, device)


def open_checkpoint(
    path: Path,
    content: Mapping[str, Any],
    setting: str | Setting | Mapping[str, Any] | None,
    device: str | torch.device | None,
) -> TrainedNetwork:
    """The network of a checkpoint whose content was read; see `from_run`."""
    if "classes" not in content:
        raise UserError(
            f"{path} was written before checkpoints held the names of classes: load it by "
            "create_network and load_weights; predict.py takes the names from the data set"
        )
    config = content["config"]
    try:
        classes = Classes.from_values(content["classes"])
        network = create_network(
            **without_download(config["model"]), num_classes=len(classes.names)
        )
        size_divisor = config["data"].get("size_divisor")
        inference = Inference(**config["inference"], size_divisor=size_divisor)
    except (TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit this version of segtrain: {first_line(error)}"
        ) from error
    load_weights(network, path)
    return make_ready(
        TrainedNetwork(
            network=network,
            classes=classes,
            inference=inference,
            eval_scale=config["data"].get("eval_scale"),
            size_divisor=size_divisor,
            step=content.get("global_step"),
            config=config,
        ),
        setting,
        device,
    )


def without_download(model: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of a network that is about to get all its weights from a file."""
    return {**model, "pretrained": False} if "pretrained" in model else dict(model)


def make_ready(
    trained: TrainedNetwork,
    setting: str | Setting | Mapping[str, Any] | None,
    device: str | torch.device | None,
) -> TrainedNetwork:
    """The same network on a device, in evaluation mode, under a setting.

    Raises:
        UserError: there is no such setting or device.
    """
    network = trained.network
    if setting is not None:
        network.setting = network.resolve_setting(setting)
    network.step = trained.step or network.step
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        network.to(device)
    except (RuntimeError, AssertionError, TypeError) as error:
        raise UserError(f"device={device}: {first_line(error)}") from error
    network.eval().requires_grad_(False)
    return trained
