"""Pages that open anywhere and ask the network for nothing: tables, and charts by plotly.js.

A page holds plotly.js and its data compressed; the browser inflates them (``pages.js``).
"""

from __future__ import annotations

import base64
import functools
import html
import json
import math
import os
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Chart = dict[str, Any]

FRONT = "#d9822b"
#: Of lines beside each other, told apart by most eyes.
COLORS = (
    *("#2b7bba", "#d9822b", "#3a9a5b", "#b4478d", "#8a6fc9", "#c9a227", "#4fb3bf", "#c4513f"),
    *("#7a8a99", "#9c755f"),
)
ACCENT = COLORS[0]

HERE = Path(__file__).parent


def write_page(
    path: Path,
    title: str,
    sections: Sequence[str],
    charts: Mapping[str, Chart],
    data: Mapping[str, Any] | None = None,
    script: str = "",
) -> Path:
    """Write a whole page; who reads it meanwhile sees the one before or this one.

    Args:
        path: of the page; its folder exists.
        title: plain text.
        sections: HTML, in order.
        charts: what plotly.js draws, by the id of its box (:func:`boxes`).
        data: plain values by name, which the script reads by ``await readData(name)``.
        script: JavaScript that runs after ``pages.js``.
    """
    blocks = {name: pack(values) for name, values in {"charts": charts, **(data or {})}.items()}
    if charts:
        blocks["plotly"] = _packed_plotly()
    packed = "".join(
        f'<script type="application/octet-stream" id="data-{name}">{text}</script>'
        for name, text in blocks.items()
    )
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_text('pages.css')}</style></head>"
        f"<body>{''.join(sections)}{packed}<script>{_text('pages.js')}{script}</script>"
        "</body></html>\n"
    )
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.writing")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def pack(values: Any) -> str:
    """Plain values as base64 of zlib of JSON; numbers that are not finite become null."""
    text = json.dumps(finite(values), separators=(",", ":"), allow_nan=False)
    return base64.b64encode(zlib.compress(text.encode(), 6)).decode()


def unpack(text: str) -> Any:
    """The reverse of :func:`pack`."""
    return json.loads(zlib.decompress(base64.b64decode(text)))


def finite(value: Any) -> Any:
    """The same with null in the place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


@functools.cache
def _packed_plotly() -> str:
    import plotly.offline

    return base64.b64encode(zlib.compress(plotly.offline.get_plotlyjs().encode(), 9)).decode()


@functools.cache
def _text(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def section(title: str, content: str) -> str:
    """A section of a page; none where there is nothing to show."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def boxes(drawn: Mapping[str, Chart], *names: str) -> str:
    """Places for the charts of these names that there are."""
    inside = "".join(f'<div class="chart" id="{name}"></div>' for name in names if name in drawn)
    return f'<div class="charts">{inside}</div>' if inside else ""


def table(titles: Sequence[str], body: Sequence[Sequence[str | tuple[str, str]]]) -> str:
    """A table of texts, which a click on a title sorts; a cell that links is (text, address)."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    rows = (
        "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in cells) + "</tr>" for cells in body
    )
    return (
        f'<div class="scroll"><table class="sortable"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(cell: str | tuple[str, str]) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    text, address = cell
    return f'<a href="{html.escape(address, quote=True)}">{html.escape(text)}</a>'


def layout(title: str, x: str, y: str, **more: Any) -> dict[str, Any]:
    """The look of a chart, with the titles of its axes."""
    axis = {"gridcolor": "#8883", "zeroline": False, "exponentformat": "e", "automargin": True}
    return {
        "title": {"text": title, "font": {"size": 15}, "x": 0.01, "xanchor": "left"},
        "xaxis": {**axis, "title": {"text": x, "standoff": 8}},
        "yaxis": {**axis, "title": {"text": y, "standoff": 8}},
        "colorway": list(COLORS),
        "paper_bgcolor": "transparent",
        "plot_bgcolor": "transparent",
        "font": {"color": "#888"},  # the page puts its own colour in its place
        "hoverlabel": {"align": "left"},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
        "margin": {"l": 50, "r": 20, "t": 60, "b": 45},
        **more,
    }
