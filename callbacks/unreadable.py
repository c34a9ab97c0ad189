"""Which files of the data set cannot be read, and how many samples they cost."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from segtrain.training import SegmentationModule, log_metrics


class Unreadable(Callback):
    """Names every file once that another image takes the place of, and counts these samples.

    Batches say it under ``unreadable`` if ``data.on_error`` is ``skip``: for each sample what is
    wrong with its file, or nothing. Ranks tell each other with the rows of training metrics, after
    validations and at the end. Where there are more of them, ``data/unreadable_samples`` is logged:
    the training and evaluation samples of all ranks that were replaced so far.

    Attributes:
        samples: how many, as of the last time that ranks told each other.
    """

    def __init__(self) -> None:
        self.samples = 0
        self._named: set[str] = set()
        self._untold: list[str] = []
        self._skips = False  # whether batches say what was skipped: those of all ranks, or none

    def state_dict(self) -> dict[str, Any]:
        """The count, and what was named."""
        return {"samples": self.samples + len(self._untold), "named": sorted(self._named)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting, and name nothing twice."""
        self.samples = state_dict["samples"]
        self._named = set(state_dict["named"])

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at the batch, and share what was found where metrics are logged."""
        self._look_at(trainer, batch)
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        every = cast(SegmentationModule, pl_module).log_every
        if stepped and trainer.global_step % every == 0:
            self._share(trainer)

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the batch."""
        if not trainer.sanity_checking:
            self._look_at(trainer, batch)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Share what was found; within a validation, ranks differ in their number of batches."""
        if not trainer.sanity_checking:
            self._share(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say how many samples it were."""
        self._share(trainer)
        if self.samples and trainer.is_global_zero:
            _warn(
                f"{self.samples} samples were replaced, for files that cannot be read"
                f" ({len(self._named)}): python -m data.check finds all of these"
            )

    def _look_at(self, trainer: Trainer, batch: Mapping[str, Any]) -> None:
        self._skips = "unreadable" in batch
        found = [problem for problem in batch.get("unreadable", ()) if problem]
        self._untold += found
        if trainer.is_global_zero:
            self._name(found)

    def _share(self, trainer: Trainer) -> None:
        if not self._skips:
            return
        found = [self._untold]
        if trainer.world_size > 1:
            found = [[] for _ in range(trainer.world_size)]
            torch.distributed.all_gather_object(found, self._untold)
        self._untold = []
        self.samples += sum(map(len, found))
        if trainer.is_global_zero:
            self._name(itertools.chain(*found))
        if any(found):
            log_metrics(trainer, {"data/unreadable_samples": self.samples})

    def _name(self, problems: Iterable[str]) -> None:
        for problem in problems:
            if problem not in self._named:
                self._named.add(problem)
                _warn(f"{problem}; another image takes its place")


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
