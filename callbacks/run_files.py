"""What a run's folder tells of it, as pages show it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from callbacks.jsonl import CURVE, METRICS, read_rows
from segtrain.config import read_file
from segtrain.errors import UserError

Row = dict[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """A run, whatever of it there is.

    Attributes:
        name: of its folder.
        folder: its path.
        curve: rows of ``curve.jsonl``, by rising step, each step and setting once.
        metrics: rows of ``metrics.jsonl``.
        config: of ``config.yaml``; empty if there is none.
    """

    name: str
    folder: Path
    curve: list[Row] = field(default_factory=list)
    metrics: list[Row] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> list[int]:
        """Of the validations that were scored."""
        return sorted({row["step"] for row in self.curve})

    def rows(self, step: int | None = None) -> list[Row]:
        """The rows of one validation, of the newest one without a step."""
        if step is None and self.curve:
            step = self.curve[-1]["step"]
        return [row for row in self.curve if row["step"] == step]


def read_run(folder: Path) -> RunFiles:
    """Read a run's folder; what is not there is left out."""
    rows = map(_complete, read_rows(folder / CURVE))
    # A row that was written twice (a run killed and resumed by hand) counts once.
    once = {(row["step"], row["setting"]): row for row in rows}
    try:
        config = read_file(folder / "config.yaml")
    except UserError:
        config = {}
    return RunFiles(
        name=folder.resolve().name,
        folder=folder,
        curve=sorted(once.values(), key=lambda row: row["step"]),
        metrics=read_rows(folder / METRICS),
        config=config,
    )


def _complete(row: Mapping[str, Any]) -> Row:
    """A row with all that pages look at; rows of older versions know less."""
    cost = dict.fromkeys(
        (
            *("parameters", "gmacs", "gmacs_std", "gmacs_worst", "peak_memory_mib", "image_size"),
            *("latency_ms", "latency_low_ms", "latency_high_ms", "device"),
        )
    )
    known: Row = {"values": {}, "mIoU": None, "pixel_accuracy": None, "IoU": {}, "images": None}
    return {**known, **row, "cost": {**cost, **(row.get("cost") or {})}}
