"""Pages that open anywhere and ask the network for nothing: tables, and charts by plotly.js."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Chart = dict[str, Any]

ACCENT = "#2b7bba"
FRONT = "#d9822b"

STYLE = """
:root { color-scheme: light dark; --line: #8884; --quiet: #777; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1180px; margin: 2em auto;
  padding: 0 1.2em; }
h1 { margin-bottom: 0; } h2 { margin: 2em 0 .4em; font-size: 1.15em; }
p { color: var(--quiet); } .chart { height: 400px; min-width: 0; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(460px, 1fr)); gap: 1em; }
.charts + .scroll { margin-top: 1em; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .2em .8em; border-bottom: 1px solid var(--line); text-align: right; }
th:first-child, td:first-child { text-align: left; } .scroll { overflow-x: auto; }
img { max-width: 100%; display: block; margin: .6em 0; background: #fff; }
pre { overflow-x: auto; padding: 1em; border: 1px solid var(--line); font-size: 13px; }
"""

DRAW = """
for (const [id, chart] of Object.entries(charts))
  Plotly.newPlot(id, chart.data, chart.layout, {displayModeBar: false, responsive: true});
"""


def write_page(
    path: Path, title: str, sections: Sequence[str], charts: Mapping[str, Chart]
) -> Path:
    """Write a whole page; who reads it meanwhile sees the one before or this one.

    Args:
        path: of the page; its folder exists.
        title: plain text.
        sections: HTML, in order.
        charts: what plotly.js draws, by the id of its box (:func:`boxes`).
    """
    import plotly.offline

    # "</" would end the script.
    data = json.dumps(charts).replace("</", "<\\/")
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style>"
        f"<script>{plotly.offline.get_plotlyjs()}</script></head><body>{''.join(sections)}"
        f"<script>const charts = {data};{DRAW}</script></body></html>\n"
    )
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.writing")
    temporary.write_text(page, encoding="utf-8")
    temporary.replace(path)
    return path


def section(title: str, content: str) -> str:
    """A section of a page; none where there is nothing to show."""
    return f"<section><h2>{title}</h2>{content}</section>" if content else ""


def boxes(drawn: Mapping[str, Chart], *names: str) -> str:
    """Places for the charts of these names that there are."""
    inside = "".join(f'<div class="chart" id="{name}"></div>' for name in names if name in drawn)
    return f'<div class="charts">{inside}</div>' if inside else ""


def table(titles: Sequence[str], body: Sequence[Sequence[str | tuple[str, str]]]) -> str:
    """A table of texts; a cell that links somewhere is (text, address)."""
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    rows = (
        "<tr>" + "".join(f"<td>{_cell(cell)}</td>" for cell in cells) + "</tr>" for cells in body
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _cell(cell: str | tuple[str, str]) -> str:
    if isinstance(cell, str):
        return html.escape(cell)
    text, address = cell
    return f'<a href="{html.escape(address, quote=True)}">{html.escape(text)}</a>'


def layout(title: str, x: str, y: str, **more: Any) -> dict[str, Any]:
    """The look of a chart, with the titles of its axes."""
    axis = {"gridcolor": "#8883", "zeroline": False, "exponentformat": "e"}
    return {
        "title": {"text": title, "font": {"size": 15}, "x": 0.02, "xanchor": "left"},
        "xaxis": {**axis, "title": {"text": x}},
        "yaxis": {**axis, "title": {"text": y}},
        "paper_bgcolor": "transparent",
        "plot_bgcolor": "transparent",
        "font": {"color": "#888"},  # readable on white and on black
        "margin": {"l": 60, "r": 20, "t": 45, "b": 50},
        **more,
    }
