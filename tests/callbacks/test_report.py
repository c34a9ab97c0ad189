from __future__ import annotations

import html.parser
import json
import re

import pytest
from lightning.pytorch import Callback

from callbacks.charts import curve_chart, history_chart, learning_chart
from callbacks.cost_curve import CostCurve
from callbacks.jsonl import JsonLinesLogger, append_rows, read_rows
from callbacks.pictures import Pictures
from callbacks.report import Report, write_report
from callbacks.tracking import write_run_record
from tests.callbacks.tiny import SETTINGS, TinyData, create_module, create_trainer


class Page(html.parser.HTMLParser):
    """Text, table rows, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.rows, self.words, self.open, self.drawn = [], [], [], [], set()
        self.scripts = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.fetched += [
            attributes[k] for k in ("src", "href", "srcset", "data") if k in attributes
        ]
        if attributes.get("class") == "chart":
            self.drawn.add(attributes["id"])
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        (self.scripts if "script" in self.open else self.words).append(data)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "tiny <run>"
    folder.mkdir()
    write_run_record(folder, folder.name, ["train.py"])
    (folder / "config.yaml").write_text("model:\n  name: <b>edaformer</b> </script>\n")
    curve = CostCurve(folder, latency=False)
    callbacks = [curve, Pictures(folder, 2), Report(folder)]
    create_trainer(callbacks, [JsonLinesLogger(folder)]).fit(create_module(), TinyData())
    text = (folder / "report.html").read_text(encoding="utf-8")
    return folder, curve, text, Page(text)


def test_page_needs_nothing_else(run):
    page = run[3]
    assert len(page.fetched) == 2  # the pictures
    assert all(address.startswith("data:image/png;base64,") for address in page.fetched)
    assert not page.open
    assert "@import" not in run[2].split("</style>")[0]


def test_page_shows_the_run(run):
    _, curve, _, page = run
    text = " ".join(page.words)
    assert "tiny <run>" in text
    assert "<b>edaformer</b>" in text
    assert '"git_commit"' in text
    newest = curve.rows[-len(SETTINGS) :]
    by_setting = {row[0]: row for row in page.rows if row[0] in (*TinyData.class_names, "full")}
    by_setting |= {row[0]: row for row in page.rows if row[0].startswith("isr_")}
    full = newest[0]
    for row in newest:
        cells = by_setting[row["setting"]]
        assert f"{100 * row['mIoU']:.2f}" in cells
        assert f"{row['cost']['gmacs']:.3f}" in cells
        if row is not full:
            assert f"{100 * (row['mIoU'] - full['mIoU']):+.2f}" in cells
    for name in TinyData.class_names:
        assert by_setting[name][1:] == [f"{100 * row['IoU'][name]:.1f}" for row in newest]
    assert page.drawn == {"gmacs", "history", "loss", "learning_rate"}  # no latency measured


def test_charts_of_the_page_hold_the_rows(run):
    _, curve, _, page = run
    script = next(s for s in page.scripts if s.startswith("const charts"))
    charts = json.loads(re.match(r"const charts = (.*?);\nfor", script, re.DOTALL).group(1))
    assert charts.keys() == page.drawn
    assert charts["gmacs"] == json.loads(json.dumps(curve_chart(curve.rows, "gmacs", "GMACs")))


def row(step, setting, gmacs, accuracy, latency=None):
    cost = {"gmacs": gmacs, "latency_ms": latency}
    return {"step": step, "setting": setting, "mIoU": accuracy, "cost": cost}


def test_curve_chart_marks_the_newest_and_its_front():
    rows = [
        row(10, "full", 4, 0.3),
        row(10, "low", 1, 0.1),
        row(20, "full", 4, 0.5),
        row(20, "mid", 3, 0.2),
        row(20, "low", 1, 0.4),
    ]
    older, newest, front = curve_chart(rows, "gmacs", "GMACs")["data"]
    assert (older["x"], older["y"]) == ([1, 4], [10, 30])
    assert (newest["x"], newest["text"]) == ([1, 3, 4], ["low", "mid", "full"])
    assert (front["x"], front["y"]) == ([1, 4], [40, 50])
    assert "low, step 20" in newest["hovertext"][0]
    assert older["opacity"] < 1
    low, high = curve_chart(rows, "gmacs", "GMACs")["layout"]["yaxis"]["range"]
    assert low < 20 < 50 < high  # the newest validation fills the chart
    assert curve_chart(rows, "latency_ms", "latency")["data"] == []


def test_a_cost_that_depends_on_the_image_shows_its_spread():
    rows = [row(10, "full", 4, 0.5), row(10, "half", 2, 0.4)]
    assert "error_x" not in curve_chart(rows, "gmacs", "GMACs")["data"][0]
    rows[1]["cost"] |= {"gmacs_std": 0.25, "gmacs_worst": 2.5, "latency_ms": 7}
    newest, front = curve_chart(rows, "gmacs", "GMACs")["data"]
    assert newest["error_x"]["array"] == [0.25, None]
    assert "2.000 ± 0.250, at most 2.500 GMACs" in newest["hovertext"][0]
    assert "<br>4.000 GMACs" in newest["hovertext"][1]
    assert "error_x" not in front
    assert "error_x" not in curve_chart(rows, "latency_ms", "latency")["data"][0]


def test_each_chart_has_the_front_of_its_own_cost():
    rows = [row(1, "full", 4, 0.5, 20), row(1, "mid", 3, 0.4, 30), row(1, "low", 1, 0.3, 10)]
    assert curve_chart(rows, "gmacs", "GMACs")["data"][-1]["x"] == [1, 3, 4]
    assert curve_chart(rows, "latency_ms", "latency")["data"][-1]["x"] == [10, 20]


def test_history_has_a_line_for_each_setting_over_the_steps():
    rows = [row(10, "full", 4, 0.3), row(10, "low", 1, None), row(20, "full", 4, 0.5)]
    full, low = history_chart(rows)["data"]
    assert (full["name"], full["x"], full["y"]) == ("full", [10, 20], [30, 50])
    assert (low["name"], low["x"], low["y"]) == ("low", [10], [None])


def test_learning_chart_skips_rows_without_the_value():
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 2}, {"step": 3, "train/loss": None}]
    chart = learning_chart([*rows, {"step": 4, "train/loss": 1.0}], "train/loss", "loss")
    assert (chart["data"][0]["x"], chart["data"][0]["y"]) == ([1, 4], [2.0, 1.0])


def test_rows_written_twice_count_once(run, tmp_path):
    rows = read_rows(run[0] / "curve.jsonl")
    append_rows(tmp_path / "curve.jsonl", rows + rows[-len(SETTINGS) :])
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert [cells[0] for cells in page.rows].count("full") == 1


def test_empty_run_folder_gives_a_page(tmp_path):
    assert "No validation yet." in write_report(tmp_path).read_text(encoding="utf-8")


def test_sanity_check_writes_no_report(tmp_path):
    class Stop(Callback):
        def on_train_start(self, trainer, pl_module):
            raise KeyError

    trainer = create_trainer([Report(tmp_path), Stop()], num_sanity_val_steps=1)
    with pytest.raises(KeyError):
        trainer.fit(create_module(), TinyData())
    assert not list(tmp_path.iterdir())
