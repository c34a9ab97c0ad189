"""``report.html`` of a run, and the same of several: pages that open anywhere, offline."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.charts import (
    by_setting,
    curve_chart,
    describe_gmacs,
    history_chart,
    learning_chart,
)
from callbacks.confusion import CONFUSION, page_confusion, read_confusion
from callbacks.gallery import page_gallery
from callbacks.published import PublishedPoint, published_points
from callbacks.run_files import RunFiles, read_run
from pages import Chart, boxes, section, table, write_page

Rows = Sequence[Mapping[str, Any]]

SCRIPT = Path(__file__).with_name("report.js")

#: What pictures and confusion matrices may take of a page, in characters. With plotly.js (2 MB)
#: and the rest it stays below 8 MB, what mail takes.
ROOM = 5_200_000
#: The scalars ``train/...`` that are drawn, with what they are called.
LEARNING = {
    "loss": "loss",
    "learning_rate": "learning rate",
    "images_per_second": "images per second",
}


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
    run = read_run(Path(run_folder))
    newest = run.rows()
    confusion = read_confusion(run.folder / CONFUSION)
    data: dict[str, Any] = {"page": _page_classes([(row["setting"], row) for row in newest])}
    if confusion is not None:
        data["confusion"] = page_confusion(confusion)
    taken = len(data["confusion"]["shares"]) if confusion is not None else 0
    gallery = page_gallery(run.folder, ROOM - taken)
    if gallery is not None:
        data["gallery"] = gallery
    drawn = _charts([run], history_chart(by_setting(run.curve)))
    settings = [row["setting"] for row in newest]
    sections = [
        _heading(run, newest),
        section("Accuracy against cost", _curves(run.steps, drawn) + _settings(newest)),
        section("Over the training", boxes(drawn, "history", *LEARNING)),
        _bar(settings, _reference(settings)) if newest else "",
        section("IoU of each class, %", _classes(data["page"])),
        section("Which class is taken for which", _confusion(data.get("confusion"))),
        section("Pictures", _gallery(data.get("gallery"))),
        section("Configuration", _file(run.folder / "config.yaml")),
        section("Run", _file(run.folder / "run.json")),
    ]
    return _write(run.folder / "report.html", run.name, sections, drawn, data)


def write_comparison(run_folders: Sequence[Path], path: Path) -> Path:
    """Write one page over several runs.

    Args:
        run_folders: any number; a run without a validation is in the configurations alone.
        path: of the page; its folder exists.

    Returns:
        The page's path.
    """
    runs = _with_own_names([read_run(Path(folder)) for folder in run_folders])
    columns = [(f"{run.name} · {row['setting']}", row) for run in runs for row in run.rows()]
    data = {"page": _page_classes(columns)}
    lines = {run.name: by_setting(run.curve)[run.rows()[0]["setting"]] for run in runs if run.curve}
    drawn = _charts(runs, history_chart(lines, "mIoU at the first setting of each run"))
    steps = sorted({step for run in runs for step in run.steps})
    names = [name for name, _ in columns]
    first = [f"{run.name} · {run.rows()[0]['setting']}" for run in runs if run.curve]
    bar = _bar(names, first[0], first[-1]) if first and data["page"]["classes"] else ""
    sections = [
        f"<h1>{len(runs)} runs</h1><p>{html.escape(', '.join(run.name for run in runs))}</p>",
        section("Accuracy against cost", _curves(steps, drawn) + _settings_of_runs(runs)),
        section("Over the training", boxes(drawn, "history", *LEARNING)),
        bar + section("IoU of each class, %", _classes(data["page"])),
        section("Where the configurations differ", _differences(runs)),
        section(
            "Configurations", "".join(_file(run.folder / "config.yaml", run.name) for run in runs)
        ),
    ]
    return _write(path, f"{len(runs)} runs", sections, drawn, data)


def _write(
    path: Path,
    title: str,
    sections: Sequence[str],
    drawn: Mapping[str, Chart],
    data: Mapping[str, Any],
) -> Path:
    script = SCRIPT.read_text(encoding="utf-8")
    return write_page(path, title, [*sections, '<div id="tip"></div>'], drawn, data, script)


def _with_own_names(runs: Sequence[RunFiles]) -> list[RunFiles]:
    """The runs; of folders called alike by their paths."""
    names = [run.name for run in runs]
    return [
        run
        if names.count(run.name) == 1
        else RunFiles(str(run.folder), run.folder, run.curve, run.metrics, run.config)
        for run in runs
    ]


def _charts(runs: Sequence[RunFiles], history: Chart) -> dict[str, Chart]:
    """Those that have something to show."""
    curves = {run.name: run.curve for run in runs}
    metrics = {run.name: run.metrics for run in runs}
    published: dict[PublishedPoint, None] = {}
    for run in runs:
        published |= dict.fromkeys(published_points(run.config))
    charts = {
        "gmacs": curve_chart(curves, "gmacs", "GMACs", list(published)),
        "latency": curve_chart(curves, "latency_ms", "latency, ms per image"),
        "history": history,
        **{
            name: learning_chart(metrics, f"train/{name}", title)
            for name, title in LEARNING.items()
        },
    }
    return {name: chart for name, chart in charts.items() if chart["data"]}


def _heading(run: RunFiles, newest: Rows) -> str:
    summary = "No validation yet."
    if newest:
        first = newest[0]
        cost = first["cost"]
        summary = f"Step {first['step']}: mIoU {_percent(first['mIoU']) or '–'} % at "
        summary += first["setting"]
        summary += f" over {first['images']} images." if first["images"] is not None else "."
        if cost["image_size"] is not None:
            size = "×".join(map(str, cost["image_size"]))
            summary += f" Cost of one {size} image"
            summary += f" on {cost['device']}." if cost["device"] else "."
    network = (run.config.get("model") or {}).get("name")
    data = (run.config.get("data") or {}).get("name")
    what = f"{network} on {data}. " if network and data else ""
    return f"<h1>{html.escape(run.name)}</h1><p>{html.escape(what + summary)}</p>"


def _curves(steps: Sequence[int], drawn: Mapping[str, Chart]) -> str:
    """The two curves with what chooses the validation that they show."""
    curves = {name: drawn[name] for name in ("gmacs", "latency") if name in drawn}
    if not curves:
        return ""
    count = max(len(chart["validations"]) for chart in curves.values())
    controls = []
    if count > 1:
        controls.append(
            '<label class="wide">validation <input id="validation" type="range" min="0" '
            f'max="{count - 1}" value="{count - 1}"><output id="step">step {steps[-1]} '
            f"({count} of {count})</output></label>"
        )
    if any(trace["name"] == "published" for trace in curves.get("gmacs", {"data": []})["data"]):
        controls.append(
            '<label><input id="published" type="checkbox" checked> published points</label>'
        )
    bar = f'<div class="controls">{"".join(controls)}</div>' if controls else ""
    return bar + boxes(drawn, "gmacs", "latency")


COST_TITLES = ["GMACs", "latency, ms", "(quartiles)", "peak memory, MiB", "mIoU, %",
               "change", "pixel accuracy, %", "front"]  # fmt: skip


def _settings(newest: Rows) -> str:
    if not newest:
        return ""
    return table(
        ["setting", *COST_TITLES], [[row["setting"], *_cost_cells(row, newest)] for row in newest]
    )


def _settings_of_runs(runs: Sequence[RunFiles]) -> str:
    body = [
        [run.name, str(row["step"]), row["setting"], *_cost_cells(row, run.rows())]
        for run in runs
        for row in run.rows()
    ]
    return table(["run", "step", "setting", *COST_TITLES], body) if body else ""


def _cost_cells(row: Mapping[str, Any], newest: Rows) -> list[str]:
    first, cost, change = newest[0], row["cost"], ""
    if row is not first and None not in (row["mIoU"], first["mIoU"]):
        change = f"{100 * (row['mIoU'] - first['mIoU']):+.2f}"
    quartiles = [_number(cost[key], ".1f") for key in ("latency_low_ms", "latency_high_ms")]
    return [
        describe_gmacs(cost),
        _number(cost["latency_ms"], ".1f"),
        "–".join(quartiles) if all(quartiles) else "",
        _number(cost["peak_memory_mib"], ".0f"),
        _percent(row["mIoU"]),
        change,
        _percent(row["pixel_accuracy"]),
        "yes" if row.get("on_front") else "",
    ]


def _reference(settings: Sequence[str]) -> str:
    """What others are compared with: ``full``, of a network that has it."""
    if not settings:
        return ""
    return "full" if "full" in settings else settings[0]


def _bar(names: Sequence[str], base: str, chosen: str | None = None) -> str:
    """What is compared in the sections below."""
    chosen = names[-1] if chosen is None else chosen

    def options(selected: str) -> str:
        return "".join(
            f"<option{' selected' if name == selected else ''}>{html.escape(name)}</option>"
            for name in names
        )

    return (
        '<div class="bar"><div class="controls">'
        f'<label>compare <select id="base">{options(base)}</select></label>'
        f'<label>with <select id="chosen">{options(chosen)}</select></label></div></div>'
    )


def _page_classes(columns: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, Any]:
    """``columns`` by name, and ``classes`` in their order with the IoU of each column."""
    columns = [(name, row) for name, row in columns if row["IoU"]]
    classes = dict.fromkeys(name for _, row in columns for name in row["IoU"])
    return {
        "columns": [name for name, _ in columns],
        "classes": [
            {"name": name, "iou": [row["IoU"].get(name) for _, row in columns]} for name in classes
        ],
    }


def _classes(page: Mapping[str, Any]) -> str:
    """A row for each class; the page fills in the change, and puts those first that lose most."""
    if not page["classes"]:
        return ""
    titles = ["class", "change", *page["columns"]]
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    rows = "".join(
        f'<tr data-index="{index}">'
        + "".join(
            f"<td>{html.escape(cell)}</td>"
            for cell in [entry["name"], "", *(_percent(value, ".1f") for value in entry["iou"])]
        )
        + "</tr>"
        for index, entry in enumerate(page["classes"])
    )
    return (
        "<p>The classes that lose most by the change come first; a click on a title sorts.</p>"
        '<div class="controls"><input id="find" type="search" placeholder="find a class" '
        'aria-label="find a class"></div>'
        f'<div class="scroll"><table id="classes" class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _select(name: str, title: str, options: Mapping[str, str]) -> str:
    inside = "".join(f'<option value="{key}">{text}</option>' for key, text in options.items())
    return f'<label>{title} <select id="{name}">{inside}</select></label>'


def _confusion(confusion: Mapping[str, Any] | None) -> str:
    if confusion is None:
        return ""
    shown, there = len(confusion["classes"]), confusion["all_classes"]
    part = "" if shown == there else f" The {shown} of {there} classes with most mistakes."
    titles = ["label", "taken for", "% of the label", "change", "% of all pixels"]
    head = "".join(f"<th>{title}</th>" for title in titles)
    views = {"chosen": "the second setting", "base": "the first setting", "change": "the change"}
    weights = {"pixels": "pixels", "share": "share of the label", "growth": "growth in pixels"}
    return (
        f"<p>Step {confusion['step']}: a row is a label, a column what its pixels are predicted "
        f"as; colours grow with the square root of the share.{part}</p>"
        f'<div class="controls">{_select("view", "show", views)}</div>'
        '<div class="charts"><div class="chart tall" id="confusion"></div></div>'
        '<div class="controls">'
        + _select("count", "most confused pairs:", {str(n): str(n) for n in (20, 50, 200)})
        + _select("weight", "by", weights)
        + '</div><div class="scroll"><table id="pairs" class="sortable">'
        f"<thead><tr>{head}</tr></thead><tbody></tbody></table></div>"
    )


def _gallery(gallery: Mapping[str, Any] | None) -> str:
    if gallery is None:
        return ""
    shown, there = len(gallery["images"]), gallery["all_images"]
    count = f"{shown} images" if shown == there else f"{shown} of {there} images"
    orders = {"stored": "place in the data set", "lost": "what the change loses"}
    return (
        f"<p>Step {gallery['step']}, {count}. Where the two settings differ, "
        '<span class="key"><i style="background:#e0660c"></i>the second one errs alone, '
        '<i style="background:#2c86d8"></i>the first one errs alone, '
        '<i style="background:#9a9a9a"></i>both err.</span> '
        "Pointing at a picture names the classes.</p>"
        f'<div class="controls">{_select("order", "order by", orders)}</div>'
        '<div id="gallery"></div>'
    )


def _differences(runs: Sequence[RunFiles]) -> str:
    """The keys whose values differ between the configurations, a row each."""
    flat = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for values in flat for key in values)
    keys.pop("name", None)
    body = []
    for key in keys:
        texts = [json.dumps(values[key]) if key in values else "" for values in flat]
        if len(set(texts)) > 1:
            body.append([key, *texts])
    return table(["key", *(run.name for run in runs)], body) if body else ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _file(path: Path, title: str | None = None) -> str:
    if not path.exists():
        return ""
    text = html.escape(path.read_text(encoding="utf-8"))
    title = html.escape(path.name if title is None else title)
    return f"<details><summary>{title}</summary><pre>{text}</pre></details>"


def _number(value: float | None, style: str) -> str:
    return "" if value is None else format(value, style)


def _percent(value: float | None, style: str = ".2f") -> str:
    return "" if value is None else format(100 * value, style)
