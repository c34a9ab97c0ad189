"""The report's charts, as the plain values that plotly.js draws."""

from __future__ import annotations

import html
import itertools
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from callbacks.cost_curve import find_front
from callbacks.published import PublishedPoint
from pages import COLORS, FRONT, Chart, layout

Row = Mapping[str, Any]
Rows = Sequence[Row]

#: Validations that a page can go back to; of more, so many are chosen, evenly and with the newest.
SHOWN_VALIDATIONS = 100
QUIET = "#888"
HOVER_WIDTH = 60  # characters


def curve_chart(
    runs: Mapping[str, Rows], cost: str, title: str, published: Sequence[PublishedPoint] = ()
) -> Chart:
    """mIoU against a cost: the points of one validation with their front, for each run.

    Args:
        runs: by name, the rows of all validations.
        cost: ``gmacs`` or ``latency_ms``.
        title: of the axis of the cost.
        published: drawn as faint marks.

    Returns:
        Besides ``data`` and ``layout``, which show the newest validation, ``validations``: for each
        of them ``step``, and the traces ``data`` that take the place of those of the newest. The
        traces that all share are the first ones, ``shared`` in number: the lines of the validations
        of a single run, and what is published.
    """
    validated = {name: _by_step(rows, cost) for name, rows in runs.items()}
    steps = sorted({step for lines in validated.values() for step in lines})
    chosen = _spread(steps, SHOWN_VALIDATIONS)
    shared: list[dict[str, Any]] = []
    if len(runs) == 1:
        (lines,) = validated.values()
        shared += [_faint_line(lines[step], cost) for step in chosen[:-1]]
    shared += _published_marks(published) if steps else []
    validations: list[dict[str, Any]] = []
    for step in chosen:
        traces: list[dict[str, Any]] = []
        for number, (name, lines) in enumerate(validated.items()):
            before = [there for there in lines if there <= step]
            if before:
                color = COLORS[number % len(COLORS)]
                alone = len(runs) == 1
                traces += _points_and_front(lines[max(before)], cost, color, name, alone)
        validations.append({"step": step, "data": traces})
    newest = validations[-1]["data"] if validations else []
    chart = layout(f"mIoU against {title}", title, "mIoU, %")
    if newest:
        marks = [trace for trace in shared if trace["name"] == "published"]
        for axis in ("x", "y"):
            values = [value for trace in [*newest, *marks] for value in trace[axis]]
            chart[f"{axis}axis"]["range"] = _around(values)
    return {
        "data": [*shared, *newest],
        "layout": chart,
        "shared": len(shared),
        "validations": validations,
    }


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most so many of them, evenly, the last one among them."""
    last = len(steps) - 1
    if last < count:
        return list(steps)
    return [steps[round(i * last / (count - 1))] for i in range(count)]


def _by_step(rows: Rows, cost: str) -> dict[int, list[Row]]:
    """The rows that have a place in the chart, by validation and rising cost."""
    lines: dict[int, list[Row]] = {}
    for row in rows:
        if row["cost"][cost] is not None and row["mIoU"] is not None:
            lines.setdefault(row["step"], []).append(row)
    return {step: sorted(line, key=lambda r: r["cost"][cost]) for step, line in lines.items()}


def _faint_line(line: Rows, cost: str) -> dict[str, Any]:
    look = {"line": {"color": QUIET, "width": 1}, "opacity": 0.25, "showlegend": False}
    return {**_places(line, cost), "mode": "lines", "hoverinfo": "skip", "name": "earlier", **look}


def _points_and_front(
    line: Rows, cost: str, color: str, name: str, alone: bool
) -> list[dict[str, Any]]:
    """The traces of one validation; of a run that is not alone, in its colour and with its name."""
    points = _places(line, cost)
    on_front = find_front(points["x"], points["y"])
    front = _places(list(itertools.compress(line, on_front)), cost)
    front |= {"name": "front", "mode": "lines", "hoverinfo": "skip", "showlegend": alone}
    front |= {"line": {"color": FRONT if alone else color, "width": 2}}
    points |= {
        "name": f"step {line[0]['step']}" if alone else html.escape(name),
        "mode": "markers",
        "marker": {
            "size": 10,
            "color": color,
            # Points that another one beats are hollow.
            "symbol": ["circle" if is_on else "circle-open" for is_on in on_front],
        },
        "hovertext": [_describe(row, "" if alone else name) for row in line],
        "hoverinfo": "text",
        "cliponaxis": False,
        # What a click on the point chooses.
        "customdata": [row["setting"] if alone else f"{name} · {row['setting']}" for row in line],
        # The page writes the names of those on the front for which there is room.
        "meta": {
            "labels": [
                row["setting"] if is_on else "" for row, is_on in zip(line, on_front, strict=True)
            ]
        },
    }
    spread = [row["cost"].get("gmacs_std") for row in line]
    if cost == "gmacs" and spread != [None] * len(spread):
        points["error_x"] = {"array": spread, "color": color, "thickness": 1, "width": 3}
    return [front, points]


def _published_marks(points: Sequence[PublishedPoint]) -> list[dict[str, Any]]:
    """One trace, faint."""
    if not points:
        return []
    texts = []
    for point in points:
        lines = [
            f"published: {point.network} · {point.setting}",
            f"mIoU {point.miou:g} %",
            f"{point.gmacs:g} GFLOPs as printed",
            *textwrap.wrap(f"counted as: {point.convention}", HOVER_WIDTH),
            *textwrap.wrap(f"source: {point.source}", HOVER_WIDTH),
            *([point.remark] if point.remark else []),
        ]
        texts.append("<br>".join(html.escape(text) for text in lines))
    return [
        {
            "x": [point.gmacs for point in points],
            "y": [point.miou for point in points],
            "name": "published",
            "mode": "markers",
            "marker": {"size": 9, "color": QUIET, "symbol": "diamond-open", "opacity": 0.75},
            "hovertext": texts,
            "hoverinfo": "text",
        }
    ]


def _around(values: Sequence[float]) -> list[float]:
    """A range with room for the names of points."""
    low, high = min(values), max(values)
    span = high - low or abs(high) or 1.0
    return [low - 0.12 * span, high + 0.12 * span]


def _places(rows: Rows, cost: str) -> dict[str, Any]:
    return {
        "x": [row["cost"][cost] for row in rows],
        "y": [100 * row["mIoU"] for row in rows],
    }


def _describe(row: Row, name: str) -> str:
    """All numbers of a point, in lines."""
    cost = row["cost"]
    values = ", ".join(f"{key} {value}" for key, value in (row.get("values") or {}).items())
    lines = [
        f"{name} · {row['setting']}" if name else row["setting"],
        f"step {row['step']}",
        f"mIoU {100 * row['mIoU']:.2f} %",
    ]
    if row.get("pixel_accuracy") is not None:
        lines.append(f"pixel accuracy {100 * row['pixel_accuracy']:.2f} %")
    if cost.get("gmacs") is not None:
        lines.append(f"{describe_gmacs(cost)} GMACs")
    if cost.get("latency_ms") is not None:
        lines.append(f"{cost['latency_ms']:.1f} ms{_quartiles(cost)}")
    if cost.get("peak_memory_mib") is not None:
        lines.append(f"peak memory {cost['peak_memory_mib']:.0f} MiB")
    if cost.get("parameters") is not None:
        lines.append(f"{cost['parameters'] / 1e6:.2f} M parameters")
    lines += textwrap.wrap(values, HOVER_WIDTH)
    return "<br>".join(html.escape(line) for line in lines)


def _quartiles(cost: Mapping[str, Any]) -> str:
    low, high = cost.get("latency_low_ms"), cost.get("latency_high_ms")
    return "" if low is None or high is None else f" (quartiles {low:.1f} and {high:.1f})"


def describe_gmacs(cost: Mapping[str, Any]) -> str:
    """Such as ``31.234``, or ``24.871 ± 2.310, at most 30.006`` where it depends on the image."""
    if cost.get("gmacs") is None:
        return ""
    mean = f"{cost['gmacs']:.3f}"
    # Rows of older runs know of no spread.
    if cost.get("gmacs_std") is None or cost.get("gmacs_worst") is None:
        return mean
    return f"{mean} ± {cost['gmacs_std']:.3f}, at most {cost['gmacs_worst']:.3f}"


def history_chart(lines: Mapping[str, Rows], title: str = "mIoU of each setting") -> Chart:
    """mIoU over the optimiser steps, a line for each name."""
    traces = []
    for name, rows in lines.items():
        line = sorted(rows, key=lambda row: row["step"])
        traces.append(
            {
                "x": [row["step"] for row in line],
                "y": [None if row["mIoU"] is None else 100 * row["mIoU"] for row in line],
                "name": html.escape(name),
                "mode": "lines+markers",
                "marker": {"size": 5},
                "hovertemplate": f"{html.escape(name)}<br>step %{{x}}<br>mIoU %{{y:.2f}} %"
                "<extra></extra>",
            }
        )
    return {"data": traces, "layout": _over_steps(title, "mIoU, %")}


def by_setting(rows: Rows) -> dict[str, Rows]:
    """The rows of each setting."""
    settings = dict.fromkeys(row["setting"] for row in rows)
    return {name: [row for row in rows if row["setting"] == name] for name in settings}


def learning_chart(runs: Mapping[str, Rows], key: str, title: str) -> Chart:
    """One logged scalar over the optimiser steps, a line for each run."""
    traces: list[dict[str, Any]] = []
    for number, (name, rows) in enumerate(runs.items()):
        values = {row["step"]: row[key] for row in rows if row.get(key) is not None}
        steps = sorted(values)
        if steps:
            trace: dict[str, Any] = {"x": steps, "y": [values[step] for step in steps]}
            # A line through one point would be nothing.
            trace["mode"] = "lines" if len(steps) > 30 else "lines+markers"
            traces.append(
                {
                    **trace,
                    "name": title if len(runs) == 1 else html.escape(name),
                    "line": {"color": COLORS[number % len(COLORS)]},
                }
            )
    return {"data": traces, "layout": _over_steps(title.capitalize(), title)}


def _over_steps(title: str, y: str) -> dict[str, Any]:
    look = layout(title, "step", y)
    look["xaxis"]["exponentformat"] = "SI"  # 160k
    return look
