"""Which validations a callback scores beside the module, and where the rows go."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.jsonl import read_rows


class ValidationScoring(Callback):
    """Scores each n-th validation of a training and its last one, and any other validation.

    Args:
        file: with the rows of former validations.
        every: n.
        limit_batches: score this many batches of each rank; None scores all.

    Attributes:
        rows: one per (validation, setting), oldest first, as in the file.
    """

    def __init__(self, file: Path, every: int, limit_batches: int | None) -> None:
        self.file = file
        self.every = every
        self.limit_batches = limit_batches
        self.rows: list[dict[str, Any]] = []
        self._validations = 0
        self._scoring = False

    def state_dict(self) -> dict[str, Any]:
        """How many validations there were; the rows are in the file."""
        return {"validations": self._validations}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting validations."""
        self._validations = state_dict["validations"]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take up the rows of a run that goes on."""
        if trainer.is_global_zero:
            self.rows = read_rows(self.file)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count the validation, and choose whether it is scored."""
        if not trainer.sanity_checking:
            self._validations += 1
        self._scoring = (
            trainer.sanity_checking
            or trainer.state.fn is not TrainerFn.FITTING
            or self._validations % self.every == 0
            or trainer.global_step == trainer.max_steps
        )

    def is_scored(self, batch_index: int) -> bool:
        """Whether a batch of this validation is."""
        within = self.limit_batches is None or batch_index < self.limit_batches
        return self._scoring and within
