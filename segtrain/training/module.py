"""One LightningModule around any network."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed
from lightning import LightningModule
from lightning.pytorch.callbacks import WeightAveraging
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from segtrain.classes import Classes
from segtrain.errors import UserError
from segtrain.inference import Inference
from segtrain.metrics import ConfusionMatrix, mean_iou, pixel_accuracy
from segtrain.networks import Network
from segtrain.networks.mask_prediction import MaskPrediction
from segtrain.reduction import Setting
from segtrain.training.finite import Buffers, Loss, NonFiniteLoss, all_finite, first_problem
from segtrain.training.logging import log_metrics
from segtrain.training.optimization import Optimizer, PolynomialSchedule
from segtrain.training.recomputation import recompute_blocks
from segtrain.training.sharding import FullySharded

#: One compiled graph for each setting, mode and image size; torch's own limit (8) is below that.
COMPILED_GRAPHS = 64


class SegmentationModule(LightningModule):
    """Trains a network and scores it, at its training setting unless told another.

    Args:
        network: what is trained.
        criterion: from what the network gives in training and the labels (B, H, W) to the loss.
        optimizer: which it is, learning rate, weight decay and their exceptions.
        schedule: the learning rate over the optimiser steps.
        inference: how images are scored in validation.
        log_every: optimiser steps between two rows of training metrics.
        compile: whether the network runs through ``torch.compile``.
        activation_checkpointing: whether blocks are computed again in the backward pass instead of
            kept in memory.
        setting: under which validations score; the training setting if None.
        nonfinite: what a NaN or infinite loss does: ``stop`` raises `NonFiniteLoss`, at the latest
            one step later, and saves nothing after it; ``skip`` leaves weights, optimiser and
            buffers as they were before its optimiser step, on all ranks, and counts the step in
            ``skipped_steps``. The step passes all the same: schedule and data go on.
        ignore_index: label of the pixels that validations do not count.
        classes: that the network tells apart, kept in every checkpoint.
        config: the composed configuration, kept in every checkpoint; plain types. Its ``seed`` is
            that of the random numbers drawn in training, 0 without one.
    """

    def __init__(
        self,
        network: Network,
        criterion: nn.Module,
        optimizer: Optimizer,
        schedule: PolynomialSchedule,
        inference: Inference | None = None,
        *,
        log_every: int = 50,
        compile: bool = False,
        activation_checkpointing: bool = False,
        setting: str | Setting | Mapping[str, Any] | None = None,
        nonfinite: Literal["stop", "skip"] = "stop",
        ignore_index: int = 255,
        classes: Classes | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.criterion = criterion
        self.optimizer = optimizer
        self.schedule = schedule
        self.inference = inference or Inference()
        self.log_every = log_every
        self.nonfinite = nonfinite
        self.skipped_steps = 0
        self.classes = classes
        self.config = dict(config or {})
        self.seed = int(self.config.get("seed", 0))
        self.confusion = ConfusionMatrix(network.num_classes, ignore_index=ignore_index)
        self.setting = network.training_setting
        if setting is not None:
            self.setting = network.resolve_setting(setting)
        if activation_checkpointing:
            recompute_blocks(network)
        # Not a submodule: its parameters are the network's own.
        self._run: list[nn.Module] = [network]
        self._compiled_masks: Callable[[Tensor], MaskPrediction] | None = None
        if compile:
            torch._dynamo.config.recompile_limit = COMPILED_GRAPHS
            # A setting's numbers belong into its graph, or image sizes would become unknowns there.
            torch._dynamo.config.specialize_float = True
            # Graphs split for DDP take neither images of changing sizes nor recomputed blocks.
            torch._dynamo.config.optimize_ddp = False
            self._run = [torch.compile(network)]  # type: ignore[list-item]
            self._compiled_masks = torch.compile(network.masks)
        # What happened since training metrics were last logged.
        self._losses: list[Tensor] = []
        self._images_since_log = 0
        self._time_of_log: float | None = None
        # Not yet known to be finite.
        self._unchecked: list[Loss] = []
        self._buffers_before: Buffers | None = None

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W), normalised -> what the network gives."""
        return self._run[0](images)

    @property
    def mask_stride(self) -> int | None:
        """Image pixels that a pixel of `masks` covers along an axis, None if there are no masks."""
        return self.network.mask_stride

    def masks(self, images: Tensor) -> MaskPrediction:
        """(B, 3, H, W), normalised -> what the network says of masks."""
        return (self._compiled_masks or self.network.masks)(images)

    def on_train_start(self) -> None:
        self._apply_hyperparameters()
        self._align_accumulation()

    def _apply_hyperparameters(self) -> None:
        """Keep to the configuration where a loaded checkpoint brought its own hyperparameters."""
        scheduler: Any = self.lr_schedulers()
        optimizer: Any = self.optimizers(use_pl_optimizer=False)
        scheduler.base_lrs = [own["initial_lr"] for own in self._hyperparameters]
        factor = self.schedule(scheduler.last_epoch)
        for group, own in zip(optimizer.param_groups, self._hyperparameters, strict=True):
            group.update(own, lr=own["initial_lr"] * factor)

    def _align_accumulation(self) -> None:
        """Let the first optimiser step after a change of the accumulation have all its batches.

        Lightning ends a step, and decides on validations, where its count of batches is a multiple.
        """
        progress = self.trainer.fit_loop.epoch_loop.batch_progress
        batches = self.trainer.global_step * self.trainer.accumulate_grad_batches
        shift = batches - progress.total.ready
        counts: Any
        for counts in (progress.total, progress.current):
            counts.ready += shift
            counts.started += shift
            counts.processed += shift
            counts.completed += shift

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        trainer = self.trainer
        self.network.step = trainer.global_step
        part = batch_index % trainer.accumulate_grad_batches
        seed_generators(self.device, self.seed, trainer.global_step, part, trainer.global_rank)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        if self.nonfinite == "skip" and batch_index % self.trainer.accumulate_grad_batches == 0:
            self._buffers_before = Buffers(self.network)
        loss = self.criterion(self(batch["image"]), batch["mask"])
        self._losses.append(loss.detach())
        self._unchecked.append(Loss.of(self.trainer.global_step + 1, batch.get("name", ()), loss))
        self._images_since_log += len(batch["image"])
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave out the step that a loss or a gradient makes unusable, if so configured."""
        if self.nonfinite != "skip":
            return
        losses, self._unchecked = self._unchecked, []
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        problem = first_problem(losses)
        usable = problem is None and all_finite(gradients)
        if self.trainer.strategy.reduce_boolean_decision(usable):
            return
        found = self._found_on_any_rank(problem)
        found = found or f"a gradient of step {self.trainer.global_step + 1} is not finite"
        rank_zero_warn(f"{found}: the step is skipped")
        self.skipped_steps += 1
        del self._losses[-len(losses) :]
        # Without gradients the optimiser changes neither weights nor its own state.
        optimizer.zero_grad(set_to_none=True)
        if self._buffers_before is not None:
            self._buffers_before.restore()

    def _stop_if_not_finite(self, wait: bool) -> None:
        """Raise NonFiniteLoss, on all ranks alike, for the losses that are not checked yet.

        Without ``wait`` the newest one is left for later: the device may still be at work on it,
        and to wait for it after every step would leave the device without work in between.
        """
        if self.nonfinite == "skip":
            return
        several = self.trainer.world_size > 1
        # Between several ranks every step ends in waiting anyway: Lightning asks all of them
        # whether one was told to terminate.
        left = [] if wait or several else self._unchecked[-1:]
        checked = self._unchecked[: len(self._unchecked) - len(left)]
        self._unchecked = left
        problem = first_problem(checked)
        if not self.trainer.strategy.reduce_boolean_decision(problem is None):
            raise NonFiniteLoss(self._found_on_any_rank(problem))

    def _found_on_any_rank(self, problem: str | None) -> str | None:
        """The first rank's problem that has one, the same on all ranks; a collective."""
        if self.trainer.world_size == 1:
            return problem
        problems: list[str | None] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(problems, problem)
        return next((f"{p} on rank {rank}" for rank, p in enumerate(problems) if p), None)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        step = self.trainer.global_step
        stepped = (batch_index + 1) % self.trainer.accumulate_grad_batches == 0
        if stepped:
            self._stop_if_not_finite(wait=False)
        if not stepped or (step % self.log_every and step != self.trainer.max_steps):
            return
        now = time.perf_counter()
        metrics = {
            "train/loss": torch.stack(self._losses).mean().item() if self._losses else math.nan,
            "train/learning_rate": self.optimizers().param_groups[0]["lr"],  # type: ignore[union-attr]
        }
        if self.nonfinite == "skip":
            metrics["train/skipped_steps"] = self.skipped_steps
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

        Without a setting, it is the one under which validations score.
        """
        chosen = self.setting if setting is None else setting
        with self.network.using(chosen):
            return self.inference(self, batch["image"], batch["mask"].shape[1:])

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, FullySharded):
            self.trainer.strategy.shard(self.network)

    def on_validation_start(self) -> None:
        self._stop_if_not_finite(wait=True)
        # Time spent in validation is not time spent on training images.
        self._time_of_log = None
        if isinstance(self.trainer.strategy, FullySharded):
            self.trainer.strategy.gather(self.network)

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> dict[str, Tensor]:
        prediction = self.predict(batch)
        self.confusion.update(prediction, batch["mask"])
        return {"prediction": prediction}

    def on_validation_epoch_end(self) -> None:
        if isinstance(self.trainer.strategy, FullySharded):
            self.trainer.strategy.release(self.network)
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
        self._hyperparameters = [
            {name: value for name, value in group.items() if name != "params"}
            for group in optimizer.param_groups
        ]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise NonFiniteLoss instead of saving weights that came after one; a collective."""
        self._stop_if_not_finite(wait=True)
        # A loss may be finite and its gradient not.
        finite = all_finite(parameter.detach() for parameter in self.network.parameters())
        if not self.trainer.strategy.reduce_boolean_decision(finite):
            raise NonFiniteLoss(f"the weights after step {self.trainer.global_step} are not finite")
        checkpoint["config"] = self.config
        if self.classes is not None:
            checkpoint["classes"] = self.classes.values
        checkpoint["skipped_steps"] = self.skipped_steps

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Raise UserError for the weights of another network."""
        self.skipped_steps = checkpoint.get("skipped_steps", 0)
        averaging = any(isinstance(c, WeightAveraging) for c in self.trainer.callbacks)  # type: ignore[attr-defined]
        if "current_model_state" in checkpoint and not averaging:
            # The average was left out: training goes on from the weights that it was taken of.
            checkpoint["state_dict"] = checkpoint["current_model_state"]
        theirs, ours = (
            {name: tuple(tensor.shape) for name, tensor in state.items()}
            for state in (checkpoint["state_dict"], self.state_dict())
        )
        for name in sorted(theirs.keys() | ours.keys()):
            there, here = theirs.get(name, "missing"), ours.get(name, "missing")
            if there != here:
                raise UserError(
                    f"the checkpoint is of another network: '{name}' is {there} there and {here} "
                    "here; leave out what changes the network"
                )


def seed_generators(device: torch.device, *place: int) -> None:
    """Seed torch's generators for one batch, by whole numbers that say which one it is.

    Derived instead of restored, the random numbers of a step are the same after a resume, after a
    validation, and whatever else has drawn some.
    """
    seed = int(np.random.SeedSequence(place).generate_state(1, np.uint64)[0] >> np.uint64(1))
    # torch.manual_seed would prepare for CUDA, at length, where there is none.
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)
