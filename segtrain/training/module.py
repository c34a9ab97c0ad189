"""One LightningModule around any network."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from lightning import LightningModule
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from segtrain.inference import Inference
from segtrain.metrics import ConfusionMatrix, mean_iou, pixel_accuracy
from segtrain.networks import Network
from segtrain.reduction import Setting
from segtrain.training.logging import log_metrics
from segtrain.training.optimization import AdamW, PolynomialSchedule

#: One compiled graph for each setting, mode and image size; torch's own limit (8) is below that.
COMPILED_GRAPHS = 64


class SegmentationModule(LightningModule):
    """Trains a network and scores it at its training setting.

    Args:
        network: what is trained.
        criterion: from what the network gives in training and the labels (B, H, W) to the loss.
        optimizer: learning rate, weight decay and their exceptions.
        schedule: the learning rate over the optimiser steps.
        inference: how images are scored in validation.
        log_every: optimiser steps between two rows of training metrics.
        compile: whether the network runs through ``torch.compile``.
        config: the composed configuration, kept in every checkpoint; plain types.
    """

    def __init__(
        self,
        network: Network,
        criterion: nn.Module,
        optimizer: AdamW,
        schedule: PolynomialSchedule,
        inference: Inference | None = None,
        *,
        log_every: int = 50,
        compile: bool = False,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.criterion = criterion
        self.optimizer = optimizer
        self.schedule = schedule
        self.inference = inference or Inference()
        self.log_every = log_every
        self.config = dict(config or {})
        self.confusion = ConfusionMatrix(network.num_classes)
        # Not a submodule: its parameters are the network's own.
        self._run: list[nn.Module] = [network]
        if compile:
            torch._dynamo.config.recompile_limit = COMPILED_GRAPHS
            self._run = [torch.compile(network)]  # type: ignore[list-item]
        # What happened since training metrics were last logged.
        self._losses: list[Tensor] = []
        self._images_since_log = 0
        self._time_of_log: float | None = None

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> what the network gives."""
        return self._run[0](images)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        loss = self.criterion(self(batch["image"]), batch["mask"])
        self._losses.append(loss.detach())
        self._images_since_log += len(batch["image"])
        return loss

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        step = self.trainer.global_step
        stepped = (batch_index + 1) % self.trainer.accumulate_grad_batches == 0
        if not stepped or (step % self.log_every and step != self.trainer.max_steps):
            return
        now = time.perf_counter()
        metrics = {
            "train/loss": torch.stack(self._losses).mean().item(),
            "train/learning_rate": self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
        }
        if self._time_of_log is not None:
            images = self._images_since_log * self.trainer.world_size
            metrics["train/images_per_second"] = images / (now - self._time_of_log)
        self._losses.clear()
        self._images_since_log, self._time_of_log = 0, now
        log_metrics(self.trainer, metrics)

    @torch.inference_mode()
    def predict(
        self, batch: Mapping[str, Any], setting: str | Setting | Mapping[str, Any] | None = None
    ) -> Tensor:
        """Classes (B, H, W) of an evaluation batch at its labels' size, under a setting.

        Without a setting, the training setting is used.
        """
        chosen = self.network.training_setting if setting is None else setting
        with self.network.using(chosen):
            return self.inference(self, batch["image"], batch["mask"].shape[1:])

    def on_validation_start(self) -> None:
        # Time spent in validation is not time spent on training images.
        self._time_of_log = None

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        prediction = self.predict(batch)
        self.confusion.update(prediction, batch["mask"])
        return {"prediction": prediction}

    def on_validation_epoch_end(self) -> None:
        matrix = self.confusion.compute()[0]
        self.confusion.reset()
        metrics = {
            "val/mIoU": mean_iou(matrix).item(),
            "val/pixel_accuracy": pixel_accuracy(matrix).item(),
        }
        # For callbacks that watch a metric; the loggers get it on our own time axis.
        self.log_dict(metrics, logger=False, rank_zero_only=False)
        if not self.trainer.sanity_checking:
            log_metrics(self.trainer, metrics)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        optimizer = self.optimizer.build(self.network)
        scheduler = self.schedule.build(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["config"] = self.config
