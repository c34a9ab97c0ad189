"""``report.html`` of a sweep, and the same table on a terminal."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pages
from tuning.study import counting, is_open
from tuning.sweep_file import Sweep
from tuning.trial import FAILURE

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

Trials = Sequence["FrozenTrial"]

#: Of trials that have ended.
STATES = {"COMPLETE": "complete", "PRUNED": "pruned", "FAIL": "failed"}


def write_report(study: optuna.Study, sweep: Sweep, folder: Path) -> Path:
    """Write the page of a study as it is now.

    Args:
        study: any number of trials.
        sweep: whose study it is.
        folder: the page's; runs are found at ``../../runs`` from there.

    Returns:
        The page's path.
    """
    folder.mkdir(parents=True, exist_ok=True)
    trials = counting(study.get_trials(deepcopy=False))
    best = find_best(study, trials)
    charts = {
        "front": _front_chart(sweep, trials, best),
        "history": _history_chart(sweep, trials),
        "parameters": _parameter_chart(sweep, trials),
    }
    drawn = {name: chart for name, chart in charts.items() if chart["data"]}
    sections = [
        _heading(study, sweep, trials, best),
        pages.section("Trials", pages.boxes(drawn, "front", "history")),
        pages.section("Parameters", pages.boxes(drawn, "parameters")),
        pages.section("Table", pages.table(*_cells(study, sweep, trials, best, links=True))),
    ]
    return pages.write_page(folder / "report.html", study.study_name, sections, drawn)


def print_table(study: optuna.Study, sweep: Sweep, rows: int = 10) -> None:
    """Print the best trials of one objective, or the front of two, best first."""
    from rich.console import Console
    from rich.table import Table

    trials = counting(study.get_trials(deepcopy=False))
    best = find_best(study, trials)
    chosen = [trial for trial in trials if trial.state.name == "COMPLETE"]
    if len(sweep.objectives) > 1:
        chosen = [trial for trial in chosen if trial.number in best]
    titles, body = _cells(study, sweep, _ranked(sweep, chosen)[:rows], best)
    table = Table(title=f"{study.study_name}: {_counts(trials)}")
    for title in titles:
        table.add_column(title.rpartition(".")[2], overflow="fold")
    for cells in body:
        table.add_row(*cells[:-1], cells[-1].removeprefix(STATES["COMPLETE"]))
    Console().print(table)


def find_best(study: optuna.Study, trials: Trials) -> set[int]:
    """Numbers of the best trial, or for two objectives of the front; empty before the first."""
    if not any(trial.state.name == "COMPLETE" for trial in trials):
        return set()
    if len(study.directions) > 1:
        return {trial.number for trial in study.best_trials}
    return {study.best_trial.number}


def _ranked(sweep: Sweep, trials: Trials) -> list[FrozenTrial]:
    sign = -1 if next(iter(sweep.objectives.values())) == "maximize" else 1
    with_value = [trial for trial in trials if trial.values is not None]
    rest = [trial for trial in trials if trial.values is None]
    return [*sorted(with_value, key=lambda trial: sign * trial.values[0]), *rest]


def _counts(trials: Trials) -> str:
    counts = dict.fromkeys([*STATES.values(), "running"], 0)
    for trial in trials:
        counts["running" if is_open(trial) else STATES[trial.state.name]] += 1
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count) or "no trial yet"


def _heading(study: optuna.Study, sweep: Sweep, trials: Trials, best: set[int]) -> str:
    lines = [f"{_counts(trials)}. ".capitalize()]
    first = next((trial for trial in trials if trial.number in best), None)
    if first is not None and len(sweep.objectives) == 1:
        metric = next(iter(sweep.objectives))
        lines.append(
            f"The best {metric}, {_number(first.values[0])}, is that of trial {first.number}."
        )
    elif first is not None:
        lines.append(f"{len(best)} trials on the front.")
    text = html.escape(" ".join(lines))
    return f"<h1>{html.escape(study.study_name)}</h1><p>{text}</p>"


def _cells(
    study: optuna.Study, sweep: Sweep, trials: Trials, best: set[int], links: bool = False
) -> tuple[list[str], list[list[Any]]]:
    """Titles and rows; with links, a trial's number leads to the page of its run."""
    parameters = [parameter.key for parameter in sweep.parameters]
    mark = "front" if len(sweep.objectives) > 1 else "best"
    body = []
    for trial in _ranked(sweep, trials):
        number: Any = str(trial.number)
        if links:
            address = f"../../runs/{study.study_name}-{number}/report.html"
            number = (number, address)
        values = trial.values if trial.state.name == "COMPLETE" else None
        state = "running" if is_open(trial) else STATES[trial.state.name]
        if FAILURE in trial.user_attrs:
            state += f": {trial.user_attrs[FAILURE]}"
        state = mark if trial.number in best else state
        cells = [_number(value) for value in values or [None] * len(sweep.objectives)]
        body.append(
            [number, *cells, *(_number(trial.params.get(key)) for key in parameters), state]
        )
    return ["trial", *sweep.objectives, *parameters, ""], body


def _complete(trials: Trials) -> list[FrozenTrial]:
    return [trial for trial in trials if trial.state.name == "COMPLETE"]


def _hover(sweep: Sweep, trials: Trials) -> dict[str, Any]:
    texts = []
    for trial in trials:
        lines = [f"trial {trial.number}"]
        lines += [
            f"{metric} {_number(value)}"
            for metric, value in zip(sweep.objectives, trial.values, strict=True)
        ]
        lines += [f"{key} = {_number(value)}" for key, value in trial.params.items()]
        texts.append("<br>".join(html.escape(line) for line in lines))
    return {"hovertext": texts, "hoverinfo": "text"}


def _history_chart(sweep: Sweep, trials: Trials) -> pages.Chart:
    """The first objective over the trials, and the best one so far."""
    (metric, direction), *_ = sweep.objectives.items()
    better = max if direction == "maximize" else min
    complete = _complete(trials)
    pruned = [t for t in trials if t.state.name == "PRUNED" and t.values is not None]
    traces = []
    for name, chosen, look in (
        ("complete", complete, {"color": pages.ACCENT, "size": 8}),
        ("pruned, at its last step", pruned, {"color": "#888", "size": 6, "symbol": "x"}),
    ):
        if chosen:
            points: dict[str, Any] = {
                "x": [t.number for t in chosen],
                "y": [t.values[0] for t in chosen],
            }
            points |= {"name": name, "mode": "markers", "marker": look}
            traces.append(points | _hover(sweep, chosen))
    best: list[float] = []
    for trial in complete:
        best.append(better([*best[-1:], trial.values[0]]))
    if best:
        line = {"x": [t.number for t in complete], "y": best, "name": "best so far"}
        traces.append(line | {"line": {"color": pages.FRONT, "shape": "hv"}, "mode": "lines"})
    return {"data": traces, "layout": pages.layout(f"{metric} of each trial", "trial", metric)}


def _front_chart(sweep: Sweep, trials: Trials, best: set[int]) -> pages.Chart:
    """Two objectives against each other, the second one to the right, with the front."""
    complete = _complete(trials)
    if len(sweep.objectives) < 2 or not complete:
        return {"data": [], "layout": {}}
    up, right = sweep.objectives

    def points(chosen: Trials) -> dict[str, Any]:
        return {"x": [t.values[1] for t in chosen], "y": [t.values[0] for t in chosen]}

    dots = {"name": "trials", "mode": "markers", "marker": {"color": pages.ACCENT, "size": 8}}
    dots |= points(complete) | _hover(sweep, complete)
    on_front = sorted((t for t in complete if t.number in best), key=lambda t: t.values[1])
    look = {"line": {"color": pages.FRONT, "width": 2}, "hoverinfo": "skip"}
    front = points(on_front) | {"name": "front", "mode": "lines+markers", **look}
    return {"data": [dots, front], "layout": pages.layout(f"{up} against {right}", right, up)}


def _parameter_chart(sweep: Sweep, trials: Trials) -> pages.Chart:
    """A line for each complete trial through its parameters to its first objective."""
    complete = _complete(trials)
    if not complete:
        return {"data": [], "layout": {}}
    metric, direction = next(iter(sweep.objectives.items()))
    dimensions: list[dict[str, Any]] = []
    for parameter in sweep.parameters:
        values = [trial.params[parameter.key] for trial in complete]
        dimension: dict[str, Any] = {"label": parameter.key, "values": values}
        if parameter.kind == "categorical":
            choices = list(parameter.distribution().choices)  # type: ignore[attr-defined]
            dimension["values"] = [choices.index(value) for value in values]
            dimension |= {"tickvals": list(range(len(choices)))}
            dimension |= {"ticktext": [_number(choice) for choice in choices]}
        elif parameter.log:
            low, high = math.log10(parameter.low), math.log10(parameter.high)
            ticks = [low + (high - low) * i / 4 for i in range(5)]
            dimension["values"] = [math.log10(value) for value in values]
            dimension |= {"tickvals": ticks, "ticktext": [f"{10**t:.2g}" for t in ticks]}
            dimension["range"] = [low, high]
        else:
            dimension["range"] = [parameter.low, parameter.high]
        dimensions.append(dimension)
    values = [trial.values[0] for trial in complete]
    dimensions.append({"label": metric, "values": values})
    trace: dict[str, Any] = {"type": "parcoords", "dimensions": dimensions}
    trace["line"] = {"color": values, "colorscale": "Viridis"}
    trace["line"] |= {"reversescale": direction == "minimize"}
    layout = pages.layout("", "", "")
    layout["margin"] = {"l": 80, "r": 60, "t": 60, "b": 30}
    return {"data": [trace], "layout": layout}


def _number(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace(", ", ",")
