"""``report.html`` of a run: one page that opens anywhere and asks the network for nothing."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.charts import curve_chart, describe_gmacs, history_chart, learning_chart
from callbacks.jsonl import CURVE, METRICS, read_rows
from pages import boxes, section, table, write_page

Rows = Sequence[Mapping[str, Any]]


class Report(Callback):
    """Writes the report after each validation, so that it can be looked at while training runs."""

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = Path(run_folder)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report as of now."""
        if trainer.is_global_zero and not trainer.sanity_checking:
            write_report(self.run_folder)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the report of the whole training."""
        if trainer.is_global_zero:
            write_report(self.run_folder)


def write_report(run_folder: Path) -> Path:
    """Write ``report.html`` of a run from the files in its folder; what is not there is left out.

    Returns:
        The page's path.
    """
    run_folder = Path(run_folder)
    curve, metrics = read_rows(run_folder / CURVE), read_rows(run_folder / METRICS)
    # A row that was written twice (a run killed and resumed by hand) counts once.
    curve = list({(row["step"], row["setting"]): row for row in curve}.values())
    newest = [row for row in curve if row["step"] == curve[-1]["step"]] if curve else []
    charts = {
        "gmacs": curve_chart(curve, "gmacs", "GMACs"),
        "latency": curve_chart(curve, "latency_ms", "latency, ms per image"),
        "history": history_chart(curve),
        "loss": learning_chart(metrics, "train/loss", "loss"),
        "learning_rate": learning_chart(metrics, "train/learning_rate", "learning rate"),
    }
    drawn = {name: chart for name, chart in charts.items() if chart["data"]}
    sections = [
        _heading(run_folder, newest),
        section("Accuracy against cost", boxes(drawn, "gmacs", "latency") + _settings(newest)),
        section("Over the training", boxes(drawn, "history", "loss", "learning_rate")),
        section("Predictions", _pictures(run_folder / "predictions")),
        section("IoU of each class, %", _classes(newest)),
        section("Configuration", _file(run_folder / "config.yaml")),
        section("Run", _file(run_folder / "run.json")),
    ]
    return write_page(run_folder / "report.html", run_folder.resolve().name, sections, drawn)


def _heading(run_folder: Path, newest: Rows) -> str:
    summary = "No validation yet."
    if newest:
        full = newest[0]
        size = "×".join(map(str, full["cost"]["image_size"]))
        summary = (
            f"Step {full['step']}: mIoU {_percent(full['mIoU'])} % at {full['setting']} over "
            f"{full['images']} images. Cost of one {size} image on {full['cost']['device']}."
        )
    name = html.escape(run_folder.resolve().name)
    return f"<h1>{name}</h1><p>{html.escape(summary)}</p>"


def _settings(newest: Rows) -> str:
    if not newest:
        return ""
    full = newest[0]
    titles = ["setting", "GMACs", "latency, ms", "(quartiles)", "peak memory, MiB", "mIoU, %",
              "change", "pixel accuracy, %", "on the front (GMACs)"]  # fmt: skip
    body = []
    for row in newest:
        cost, change = row["cost"], ""
        if row is not full and None not in (row["mIoU"], full["mIoU"]):
            change = f"{100 * (row['mIoU'] - full['mIoU']):+.2f}"
        quartiles = [_number(cost[key], ".1f") for key in ("latency_low_ms", "latency_high_ms")]
        body.append(
            [
                row["setting"],
                describe_gmacs(cost),
                _number(cost["latency_ms"], ".1f"),
                "–".join(quartiles) if all(quartiles) else "",
                _number(cost["peak_memory_mib"], ".0f"),
                _percent(row["mIoU"]),
                change,
                _percent(row["pixel_accuracy"]),
                "yes" if row["on_front"] else "",
            ]
        )
    return table(titles, body)


def _classes(newest: Rows) -> str:
    if not newest:
        return ""
    cells = [
        [name, *(_percent(row["IoU"][name], ".1f") for row in newest)] for name in newest[0]["IoU"]
    ]
    return table(["class", *(row["setting"] for row in newest)], cells)


def _pictures(folder: Path) -> str:
    tags = []
    for path in sorted(folder.glob("*.png")):
        encoded = base64.b64encode(path.read_bytes()).decode()
        alt = html.escape(path.stem, quote=True)
        tags.append(f'<img alt="{alt}" src="data:image/png;base64,{encoded}">')
    return "".join(tags)


def _file(path: Path) -> str:
    if not path.exists():
        return ""
    text = html.escape(path.read_text(encoding="utf-8"))
    return f"<details><summary>{path.name}</summary><pre>{text}</pre></details>"


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _percent(value: float | None, style: str = ".2f") -> str:
    return "" if value is None else format(100 * value, style)
