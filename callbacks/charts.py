"""The report's charts, as the plain values that plotly.js draws."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from callbacks.cost_curve import find_front
from pages import ACCENT, FRONT, Chart, layout

Rows = Sequence[Mapping[str, Any]]


def curve_chart(rows: Rows, cost: str, title: str) -> Chart:
    """mIoU against a cost: one line per validation, the newest strong, with its front.

    The axes show the newest validation; zooming out shows the others.
    """
    rows = [row for row in rows if row["cost"][cost] is not None and row["mIoU"] is not None]
    steps = sorted({row["step"] for row in rows})
    traces = []
    for number, step in enumerate(steps, start=1):
        line = sorted((r for r in rows if r["step"] == step), key=lambda r: r["cost"][cost])
        trace = _points(line, cost) | {"name": f"step {step}"}
        if step < steps[-1]:
            trace |= {"mode": "lines+markers", "showlegend": False}
            trace |= {"line": {"color": ACCENT, "width": 1}, "marker": {"size": 4}}
            trace |= {"opacity": max(0.12, 0.6 * number / len(steps))}
            traces.append(trace)
            continue
        trace |= {"mode": "markers+text", "marker": {"size": 10, "color": ACCENT}}
        trace |= _spread(line) if cost == "gmacs" else {}
        on_front = find_front(trace["x"], trace["y"])
        trace |= {"text": [row["setting"] for row in line], "cliponaxis": False}
        trace["textposition"] = _label_sides(trace["x"], on_front)
        front = _points(list(itertools.compress(line, on_front)), cost) | {"name": "front"}
        traces += [trace, front | {"mode": "lines", "line": {"color": FRONT, "width": 2}}]
    legend = {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"}
    look = layout(f"mIoU against {title}", title, "mIoU, %", legend=legend)
    if traces:
        newest = traces[-2]
        look["xaxis"]["range"] = _around(newest["x"], below=0.3, above=0.1)
        look["yaxis"]["range"] = _around(newest["y"], below=0.6, above=0.3)
    return {"data": traces, "layout": look}


def _label_sides(costs: Sequence[float], on_front: Sequence[bool]) -> list[str]:
    """Where points, cheapest first, have their names: clear of a rising front and of each other."""
    near = 0.2 * (max(costs) - min(costs))
    sides: list[str] = []
    for i, front in enumerate(on_front):
        side, other = ("top left", "bottom right") if front else ("bottom right", "top left")
        crowded = i > 0 and sides[-1] == side and costs[i] - costs[i - 1] < near
        sides.append(other if crowded else side)
    return [*sides[:-1], "top center"]  # the last one is at the edge


def _around(values: Sequence[float], below: float, above: float) -> list[float]:
    """A range with margins, given as shares of what the values span."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    return [low - below * span, high + above * span]


def _points(rows: Rows, cost: str) -> dict[str, Any]:
    return {
        "x": [row["cost"][cost] for row in rows],
        "y": [100 * row["mIoU"] for row in rows],
        "hovertext": [
            f"{row['setting']}, step {row['step']}<br>mIoU {100 * row['mIoU']:.2f} %"
            f"<br>{describe_gmacs(row['cost'])} GMACs"
            + (f"<br>{row['cost']['latency_ms']:.1f} ms" if row["cost"]["latency_ms"] else "")
            for row in rows
        ],
        "hoverinfo": "text",
    }


def _spread(rows: Rows) -> dict[str, Any]:
    """A standard deviation over images to either side, where there is one."""
    spread = [row["cost"].get("gmacs_std") for row in rows]
    if spread == [None] * len(spread):
        return {}
    return {"error_x": {"array": spread, "color": ACCENT, "thickness": 1, "width": 3}}


def describe_gmacs(cost: Mapping[str, Any]) -> str:
    """Such as ``31.234``, or ``24.871 ± 2.310, at most 30.006`` where it depends on the image."""
    mean = f"{cost['gmacs']:.3f}"
    # Rows of older runs know of no spread.
    if cost.get("gmacs_std") is None:
        return mean
    return f"{mean} ± {cost['gmacs_std']:.3f}, at most {cost['gmacs_worst']:.3f}"


def history_chart(rows: Rows) -> Chart:
    """mIoU of each setting over the optimiser steps."""
    settings = dict.fromkeys(row["setting"] for row in rows)
    traces = []
    for setting in settings:
        line = sorted((r for r in rows if r["setting"] == setting), key=lambda r: r["step"])
        accuracies = [None if row["mIoU"] is None else 100 * row["mIoU"] for row in line]
        steps = [row["step"] for row in line]
        traces.append({"x": steps, "y": accuracies, "name": setting, "mode": "lines+markers"})
    return {"data": traces, "layout": layout("mIoU of each setting", "step", "mIoU, %")}


def learning_chart(rows: Rows, key: str, title: str) -> Chart:
    """One logged scalar over the optimiser steps."""
    values = {row["step"]: row[key] for row in rows if row.get(key) is not None}
    steps = sorted(values)
    trace: dict[str, Any] = {
        "x": steps,
        "y": [values[step] for step in steps],
        "mode": "lines",
        "name": title,
    }
    trace |= {"line": {"color": ACCENT}}
    return {"data": [trace] if steps else [], "layout": layout(title.capitalize(), "step", title)}
