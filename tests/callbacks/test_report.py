from __future__ import annotations

import base64
import html.parser
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback

import report
from callbacks.charts import by_setting, curve_chart, history_chart, learning_chart
from callbacks.confusion import read_confusion
from callbacks.cost_curve import CostCurve
from callbacks.jsonl import JsonLinesLogger, append_rows, read_rows
from callbacks.pictures import Pictures
from callbacks.published import FILE, published_points
from callbacks.report import Report, write_report
from callbacks.tracking import write_run_record
from pages import unpack
from segtrain import create_network
from segtrain.config import read_file
from segtrain.metrics import mean_iou
from tests.callbacks.tiny import SETTINGS, TinyData, create_module, create_trainer


class Page(html.parser.HTMLParser):
    """Text, table rows, and everything that a browser would fetch."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.rows, self.words, self.open, self.drawn = [], [], [], [], set()
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
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data
        if "script" not in self.open:
            self.words.append(data)


def packed(text, name):
    """What a page holds for its script."""
    return unpack(re.search(rf'id="data-{name}">([^<]*)<', text).group(1))


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
    assert not page.fetched
    assert not page.open
    assert "@import" not in run[2].split("</style>")[0]
    assert "url(" not in run[2].split("</style>")[0]


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
        assert by_setting[name][2:] == [f"{100 * row['IoU'][name]:.1f}" for row in newest]
    # No latency was measured.
    assert page.drawn == {"gmacs", "history", "loss", "learning_rate", "images_per_second"}


def test_charts_of_the_page_hold_the_rows(run):
    folder, curve, text, page = run
    charts = packed(text, "charts")
    assert charts.keys() == page.drawn
    expected = curve_chart({folder.name: curve.rows}, "gmacs", "GMACs")
    assert charts["gmacs"] == json.loads(json.dumps(expected))


def test_the_script_knows_classes_confusion_and_pictures(run):
    folder, curve, text, _ = run
    page = packed(text, "page")
    newest = curve.rows[-len(SETTINGS) :]
    assert page["columns"] == SETTINGS
    for entry in page["classes"]:
        assert entry["iou"] == [row["IoU"][entry["name"]] for row in newest]
    counts = read_confusion(folder / "confusion.npz").counts
    assert mean_iou(torch.from_numpy(counts)).tolist() == [row["mIoU"] for row in newest]
    confusion = packed(text, "confusion")
    planes = np.frombuffer(zlib.decompress(base64.b64decode(confusion["shares"])), np.uint8)
    shares = (planes[: len(planes) // 2] * 256.0 + planes[len(planes) // 2 :]) / 65535
    rows = np.maximum(counts.sum(axis=2, keepdims=True), 1)
    np.testing.assert_allclose(shares.reshape(counts.shape), counts / rows, atol=1e-5)
    assert confusion["labelled"] == counts[0].sum(axis=1).tolist()
    gallery = packed(text, "gallery")
    assert gallery["settings"] == SETTINGS
    assert [image["name"] for image in gallery["images"]] == ["image 0", "image 6"]
    image = gallery["images"][1]
    assert (image["height"], image["width"]) == (64, 96)
    maps = np.frombuffer(zlib.decompress(base64.b64decode(image["maps"])), np.uint8)
    maps = maps.reshape(64, 96, 1 + len(SETTINGS))
    np.testing.assert_array_equal(maps[..., 0], TinyData().val.masks[6])
    counted = maps[..., 0] != 255
    for number, right in enumerate(image["right"], start=1):
        assert right == pytest.approx((maps[..., number] == maps[..., 0])[counted].mean(), abs=1e-4)


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
    chart = curve_chart({"run": rows}, "gmacs", "GMACs")
    older, front, newest = chart["data"]
    assert (older["x"], older["y"]) == ([1, 4], [10, 30])
    assert (newest["x"], newest["customdata"]) == ([1, 3, 4], ["low", "mid", "full"])
    assert newest["meta"]["labels"] == ["low", "", "full"]  # names of the front alone
    assert newest["marker"]["symbol"] == ["circle", "circle-open", "circle"]
    assert (front["x"], front["y"]) == ([1, 4], [40, 50])
    assert newest["hovertext"][0].startswith("low<br>step 20<br>mIoU 40.00 %")
    assert older["opacity"] < 1
    low, high = chart["layout"]["yaxis"]["range"]
    assert 10 < low < 20 < 50 < high  # the newest validation fills the chart
    assert chart["shared"] == 1
    assert [validation["step"] for validation in chart["validations"]] == [10, 20]
    assert chart["validations"][1]["data"] == [front, newest]
    assert chart["validations"][0]["data"][1]["y"] == [10, 30]
    assert curve_chart({"run": rows}, "latency_ms", "latency")["data"] == []


def test_a_cost_that_depends_on_the_image_shows_its_spread():
    rows = [row(10, "full", 4, 0.5), row(10, "half", 2, 0.4)]
    assert "error_x" not in curve_chart({"run": rows}, "gmacs", "GMACs")["data"][-1]
    rows[1]["cost"] |= {"gmacs_std": 0.25, "gmacs_worst": 2.5, "latency_ms": 7}
    front, newest = curve_chart({"run": rows}, "gmacs", "GMACs")["data"]
    assert newest["error_x"]["array"] == [0.25, None]
    assert "2.000 ± 0.250, at most 2.500 GMACs" in newest["hovertext"][0]
    assert "<br>4.000 GMACs" in newest["hovertext"][1]
    assert "error_x" not in front
    assert "error_x" not in curve_chart({"run": rows}, "latency_ms", "latency")["data"][-1]


def test_each_chart_has_the_front_of_its_own_cost():
    rows = [row(1, "full", 4, 0.5, 20), row(1, "mid", 3, 0.4, 30), row(1, "low", 1, 0.3, 10)]
    assert curve_chart({"run": rows}, "gmacs", "GMACs")["data"][0]["x"] == [1, 3, 4]
    assert curve_chart({"run": rows}, "latency_ms", "latency")["data"][0]["x"] == [10, 20]


def test_runs_are_beside_each_other_at_the_same_step():
    early = [row(10, "full", 4, 0.3), row(20, "full", 4, 0.4)]
    late = [row(15, "full", 2, 0.2)]
    chart = curve_chart({"early": early, "late": late}, "gmacs", "GMACs")
    shown = [
        (validation["step"], [(t["name"], t["y"]) for t in validation["data"][1::2]])
        for validation in chart["validations"]
    ]
    assert shown == [
        (10, [("early", [30])]),
        (15, [("early", [30]), ("late", [20])]),
        (20, [("early", [40]), ("late", [20])]),
    ]
    assert chart["shared"] == 0


def test_a_long_history_is_thinned_out():
    rows = [row(step, "full", 4, 0.3) for step in range(1, 502)]
    steps = [v["step"] for v in curve_chart({"run": rows}, "gmacs", "GMACs")["validations"]]
    assert len(steps) == 100
    assert (steps[0], steps[-1]) == (1, 501)


def test_published_points_are_of_the_same_network_and_data():
    config = {"model": {"name": "edaformer_tiny"}, "data": {"name": "ade20k"}}
    points = published_points(config)
    assert (points[0].setting, points[0].gmacs, points[0].miou) == ("full", 5.6, 42.3)
    assert points[-1].remark == "fine-tuned"
    chart = curve_chart({"run": [row(1, "full", 5.6, 0.4)]}, "gmacs", "GMACs", points)
    marks = chart["data"][0]
    assert (marks["x"][:2], marks["y"][:2]) == ([5.6, 5.3], [42.3, 42.2])
    for words in ("EDAFormer (ECCV 2024)", "5.6 GFLOPs as printed", "counted as: multiply-adds"):
        assert words in marks["hovertext"][0]
    assert chart["shared"] == 1
    for data in ({"name": "camvid"}, {"name": "cocostuff", "variant": "10k"}, {}, None):
        assert published_points({**config, "data": data}) == []
    assert published_points({}) == []
    variant = {"name": "cocostuff", "variant": "164k"}
    assert published_points({**config, "data": variant})[0].miou == 40.3


def test_published_points_name_networks_and_settings_that_there_are():
    content = read_file(FILE, dotted=True)
    for name, entries in content["networks"].items():
        with torch.device("meta"):
            settings = create_network(name, num_classes=19).settings
        for entry in entries.values():
            assert entry["source"] in content["sources"]
            for setting, gmacs, miou, *remark in entry["points"]:
                assert setting in settings or " " in setting, f"{name}: {setting}"
                assert 0 < gmacs < 2000
                assert 20 < miou < 90
                assert all(isinstance(text, str) for text in remark)


def test_history_has_a_line_for_each_setting_over_the_steps():
    rows = [row(10, "full", 4, 0.3), row(10, "low", 1, None), row(20, "full", 4, 0.5)]
    full, low = history_chart(by_setting(rows))["data"]
    assert (full["name"], full["x"], full["y"]) == ("full", [10, 20], [30, 50])
    assert (low["name"], low["x"], low["y"]) == ("low", [10], [None])


def test_learning_chart_skips_rows_without_the_value():
    rows = [{"step": 1, "train/loss": 2.0}, {"step": 2}, {"step": 3, "train/loss": None}]
    rows.append({"step": 4, "train/loss": 1.0})
    chart = learning_chart({"run": rows, "empty": []}, "train/loss", "loss")
    (line,) = chart["data"]
    assert (line["x"], line["y"]) == ([1, 4], [2.0, 1.0])


def test_rows_written_twice_count_once(run, tmp_path):
    rows = read_rows(run[0] / "curve.jsonl")
    append_rows(tmp_path / "curve.jsonl", rows + rows[-len(SETTINGS) :])
    page = Page(write_report(tmp_path).read_text(encoding="utf-8"))
    assert [cells[0] for cells in page.rows].count("full") == 1


def test_empty_run_folder_gives_a_page(tmp_path):
    assert "No validation yet." in write_report(tmp_path).read_text(encoding="utf-8")


def test_rows_of_older_versions_give_a_page(tmp_path):
    rows = [
        {"step": 5, "setting": "full", "mIoU": 0.4, "cost": {"gmacs": 2.0}},
        {"step": 5, "setting": "low", "mIoU": None, "IoU": {"sky": None}, "cost": {}},
    ]
    append_rows(tmp_path / "curve.jsonl", rows)
    (tmp_path / "confusion.npz").write_bytes(b"half")
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "index.json").write_text("{")
    text = write_report(tmp_path).read_text(encoding="utf-8")
    page = Page(text)
    assert "Step 5: mIoU 40.00 % at full." in " ".join(page.words)
    assert page.drawn == {"gmacs", "history"}
    assert ["sky", "", ""] in page.rows
    assert 'id="data-confusion"' not in text
    assert 'id="data-gallery"' not in text


def test_command_compares_runs(run, tmp_path, monkeypatch, capsys):
    other = tmp_path / "other"
    other.mkdir()
    append_rows(other / "curve.jsonl", [row(3, "full", 1, 0.25)])
    (other / "config.yaml").write_text("model: {name: segformer_b0}\nseed: 3\n")
    monkeypatch.chdir(tmp_path)
    assert report.main([str(run[0]), "other"]) == 0
    assert capsys.readouterr().out == "comparison.html\n"
    text = Path("comparison.html").read_text(encoding="utf-8")
    page = Page(text)
    assert not page.fetched
    assert not page.open
    assert ["other", "3", "full", "1.000", "", "", "", "25.00", "", "", ""] in page.rows
    assert ["tiny <run>", "4", SETTINGS[-1]] in [cells[:3] for cells in page.rows]
    assert ["model.name", '"<b>edaformer</b> </script>"', '"segformer_b0"'] in page.rows
    assert ["seed", "", "3"] in page.rows
    names = [t["name"] for t in packed(text, "charts")["gmacs"]["validations"][-1]["data"][1::2]]
    assert names == ["tiny &lt;run&gt;", "other"]


def test_command_writes_the_page_of_one_run(run, tmp_path, capsys):
    folder = tmp_path / "copy"
    folder.mkdir()
    (folder / "config.yaml").write_text("seed: 1\n")
    assert report.main([str(folder)]) == 0
    assert (folder / "report.html").exists()
    assert report.main([str(folder), f"output={tmp_path / 'page.html'}"]) == 0
    assert (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["output=x.html"], "name the folders of runs"),
        (["nowhere"], "nowhere is no folder of a run"),
        (["outptu=x"], "unknown argument 'outptu': did you mean 'output'"),
        ([".", "output=no/where.html"], "there is no folder no"),
    ],
)
def test_slips_of_the_command(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("config.yaml").write_text("seed: 1\n")
    assert report.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_sanity_check_writes_no_report(tmp_path):
    class Stop(Callback):
        def on_train_start(self, trainer, pl_module):
            raise KeyError

    trainer = create_trainer([Report(tmp_path), Stop()], num_sanity_val_steps=1)
    with pytest.raises(KeyError):
        trainer.fit(create_module(), TinyData())
    assert not list(tmp_path.iterdir())
