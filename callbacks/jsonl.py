"""The run's own records, metrics.jsonl and curve.jsonl: one JSON object per line."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers.logger import Logger
from lightning.pytorch.utilities import rank_zero_only

METRICS, CURVE, PANOPTIC = "metrics.jsonl", "curve.jsonl", "panoptic.jsonl"


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows of plain values to a file; numbers that are not finite become null."""
    lines = [json.dumps(_finite(row)) + "\n" for row in rows]
    with path.open("a", encoding="utf-8") as file:
        file.writelines(lines)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of a file, none if there is no file.

    A last line that a killed run left half-written is left out.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise
    return rows


def drop_rows_after(path: Path, step: int) -> None:
    """Forget the rows of steps later than ``step``, and a half-written last line."""
    if not path.exists():
        return
    kept = [row for row in read_rows(path) if row["step"] <= step]
    temporary = path.with_name(f".{path.name}.writing")
    temporary.unlink(missing_ok=True)
    append_rows(temporary, kept)
    temporary.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class JsonLinesLogger(Logger):
    """Appends every logged set of scalars to ``metrics.jsonl`` of the run folder, on rank zero."""

    def __init__(self, run_folder: Path) -> None:
        super().__init__()
        self.run_folder = Path(run_folder)

    @property
    def name(self) -> str:
        """Name of the run."""
        return self.run_folder.name

    @property
    def version(self) -> str:
        """Nothing: a run folder holds one run."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self.run_folder)

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append one row ``{"step", "time" (seconds since 1970), name: value, ...}``."""
        values = {name: float(value) for name, value in metrics.items()}
        row = {"step": step or 0, "time": round(time.time(), 3), **values}
        append_rows(self.run_folder / METRICS, [row])

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: the run folder holds config.yaml."""


class ForgetLostSteps(Callback):
    """Drops what a run recorded after the checkpoint from which it goes on.

    Those steps are trained and recorded again; without this they would stand in the records twice.
    """

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = Path(run_folder)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rows up to the step of the loaded checkpoint."""
        if trainer.is_global_zero:
            for name in (METRICS, CURVE, PANOPTIC):
                drop_rows_after(self.run_folder / name, trainer.global_step)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Have all loggers write what they hold, for a run that goes on from here logs no more."""
        for logger in trainer.loggers:
            logger.save()
