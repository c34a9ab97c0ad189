"""The report in a browser: it opens, its controls work, and it asks for nothing outside."""

from __future__ import annotations

import itertools
import json
import math

import numpy as np
import pytest
from PIL import Image

from callbacks.confusion import read_confusion
from callbacks.jsonl import CURVE, read_rows
from callbacks.report import write_comparison, write_report
from pages import boxes, layout, table, write_page
from tests.callbacks.browser import Browser, find_browser
from tests.callbacks.made_run import SETTINGS, make_run

IMAGES = 200


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of 150 classes with nine settings and 200 pictures."""
    return make_run(tmp_path_factory.mktemp("runs") / "large", images=IMAGES)


@pytest.fixture(scope="module")
def page(run):
    return write_report(run)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("aiohttp", reason="the browser is told what to do by aiohttp")
    if find_browser() is None:
        pytest.skip("no chromium or google-chrome on the path")
    browser = Browser(tmp_path_factory.mktemp("browser"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser, page):
    """A tab with the report, in which nothing went wrong."""
    browser.problems.clear()
    browser.requests.clear()
    browser.open(page)
    yield browser
    assert browser.problems == []
    assert browser.requests == [page.resolve().as_uri()]


def choose(browser, name, value):
    browser.run(
        f"(() => {{ const chosen = document.getElementById('{name}'); chosen.value = '{value}';"
        "chosen.dispatchEvent(new Event('input')); chosen.dispatchEvent(new Event('change')); })()"
    )


def rows_of(browser, table):
    return browser.run(
        f"[...document.querySelectorAll('#{table} tbody tr')].filter((row) => !row.hidden)"
        ".map((row) => [...row.cells].map((cell) => cell.textContent))"
    )


def scroll_to(browser, name):
    browser.run(f"document.getElementById('{name}').scrollIntoView()")


def test_a_large_page_goes_by_mail(page):
    assert page.stat().st_size < 8_000_000


def test_the_slider_goes_back_in_the_training(opened, run):
    opened.wait("document.getElementById('gmacs').dataset.drawn")
    first = [row for row in read_rows(run / CURVE) if row["step"] == 1000]
    choose(opened, "validation", "0")
    assert opened.wait("step.textContent") == "step 1000 (1 of 20)"
    drawn = "document.getElementById('{}').data.at(-1)"
    shown = opened.wait(
        f"{drawn.format('gmacs')}.name === 'step 1000' && {drawn.format('gmacs')}.y"
    )
    assert shown == pytest.approx([100 * row["mIoU"] for row in first][::-1])
    assert opened.wait(f"{drawn.format('latency')}.name === 'step 1000'")


def test_published_points_can_be_hidden(opened):
    names = "document.getElementById('gmacs').data?.map((trace) => trace.name)"
    assert "published" in opened.wait(names)
    opened.run("document.getElementById('published').click()")
    opened.wait(f"!{names}.includes('published')")


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (400, True)])
def test_names_of_points_do_not_overlap(opened, page, width, dark):
    opened.requests.clear()
    opened.open(page, width=width, dark=dark)
    boxes = opened.wait(
        "(() => { const texts = [...document.querySelectorAll('#gmacs .annotation-text')];"
        "return texts.length && texts.map((text) => { const box = text.getBoundingClientRect();"
        "return [box.left, box.top, box.right, box.bottom, text.textContent]; }); })()"
    )
    assert len(boxes) >= 5
    for one, other in itertools.combinations(boxes, 2):
        apart = one[0] >= other[2] or other[0] >= one[2] or one[1] >= other[3] or other[1] >= one[3]
        assert apart, f"{one[4]} and {other[4]}"
    assert opened.run("document.documentElement.scrollWidth") <= width


def test_classes_that_lose_most_come_first(opened, run):
    newest = {row["setting"]: row["IoU"] for row in read_rows(run / CURVE)[-len(SETTINGS) :]}
    for chosen in ("isr_8", "isr_3"):
        choose(opened, "chosen", chosen)
        changes = {
            name: newest[chosen][name] - iou
            for name, iou in newest["full"].items()
            if iou is not None
        }
        ranked = sorted(changes, key=changes.get)
        opened.wait(f"document.querySelector('#classes tbody td').textContent === '{ranked[0]}'")
        rows = rows_of(opened, "classes")
        assert [row[0] for row in rows] == [*ranked, "class <7> & co"]  # it occurs nowhere
        assert rows[0][1] == f"{100 * changes[ranked[0]]:.1f}".replace("-", "−")
        assert rows[-1][1:] == [""] * (1 + len(SETTINGS))


def test_a_click_sorts_and_a_word_finds(opened):
    opened.run("document.querySelectorAll('#classes th')[2].click()")
    shown = [float(row[2]) for row in rows_of(opened, "classes")[:-1]]
    assert shown == sorted(shown, reverse=True)
    opened.run("document.querySelectorAll('#classes th')[2].click()")
    shown = [float(row[2]) for row in rows_of(opened, "classes")[:-1]]
    assert shown == sorted(shown)
    choose(opened, "find", "<12>")
    assert [row[0] for row in rows_of(opened, "classes")] == ["class <12> & co"]


def test_confusion_follows_the_settings(opened, run):
    scroll_to(opened, "confusion")
    counts = read_confusion(run / "confusion.npz").counts
    for number in (8, 2):
        choose(opened, "chosen", SETTINGS[number])
        shares = counts[number] / np.maximum(counts[0].sum(axis=1, keepdims=True), 1)
        expected = f"class &lt;3&gt; &amp; co<br>predicted right: {100 * shares[3, 3]:.2f} %"
        heatmap = "document.getElementById('confusion').data?.[0]"
        opened.wait(f"{heatmap}?.text[3][3] === '{expected}'")
        assert opened.run(f"{heatmap}.z[5][6] ** 2") == pytest.approx(shares[5, 6], abs=2e-5)
        assert opened.run(f"{heatmap}.z[7][7]") is None
        mistakes = counts[number] * (1 - np.eye(150, dtype=int))
        pairs = rows_of(opened, "pairs")
        assert len(pairs) == 20
        label, taken_for = (int(text.split("<")[1].split(">")[0]) for text in pairs[0][:2])
        assert mistakes[label, taken_for] == pytest.approx(mistakes.max(), rel=0.05)
    choose(opened, "view", "change")
    change = (counts[2, 4, 4] - counts[0, 4, 4]) / counts[0, 4].sum()
    opened.wait(f"document.getElementById('confusion').data[0].zmin === -1 || {change} === 0")
    choose(opened, "count", "50")
    opened.wait("document.querySelectorAll('#pairs tbody tr').length === 50")


def test_gallery_shows_classes_and_differences(opened, run):
    scroll_to(opened, "gallery")
    choose(opened, "chosen", "isr_4")
    title = "document.querySelector('.picture [data-kind=chosen] span')?.textContent"
    opened.wait(f"{title}?.startsWith('isr_4')")
    assert opened.run("document.querySelectorAll('.picture').length") == IMAGES
    opened.wait("document.querySelector('.picture [data-kind=difference] canvas').width > 0")
    read = (
        "(() => {{ const canvas = document.querySelector('.picture [data-kind={}] canvas');"
        "const {{width, height}} = canvas; return [height, width,"
        "[...canvas.getContext('2d').getImageData(0, 0, width, height).data]]; }})()"
    )
    stored = Image.open(run / "predictions" / "0.png")
    maps = np.asarray(stored).reshape(1 + len(SETTINGS), 300, 400)
    palette = np.zeros((256, 3), int)  # ignored pixels are black
    palette[:150] = np.array(stored.getpalette()).reshape(-1, 3)[:150]
    for kind, index in (("label", 0), ("base", 1), ("chosen", 5)):
        height, width, pixels = opened.run(read.format(kind))
        rows = ((np.arange(height) + 0.5) * 300 / height).astype(int)
        columns = ((np.arange(width) + 0.5) * 400 / width).astype(int)
        expected = palette[maps[index][rows[:, None], columns]]
        np.testing.assert_array_equal(np.array(pixels).reshape(height, width, 4)[..., :3], expected)
    label, full, other = (maps[i][rows[:, None], columns] for i in (0, 1, 5))
    marks = np.array(opened.run(read.format("difference"))[2]).reshape(height, width, 4)
    lost = (marks[..., :3] == (0xE0, 0x66, 0x0C)).all(axis=-1)
    np.testing.assert_array_equal(lost, (full == label) & (other != full))

    opened.run(
        "(() => { const canvas = document.querySelector('.picture [data-kind=chosen] canvas');"
        "const {left, top, width, height} = canvas.getBoundingClientRect();"
        "canvas.dispatchEvent(new PointerEvent('pointermove', {bubbles: true,"
        "clientX: left + width / 2, clientY: top + height / 2})); })()"
    )
    there = [maps[i][rows[height // 2], columns[width // 2]] for i in (0, 1, 5)]
    names = ("label", "full", "isr_4")
    expected = [f"{n}: class <{k}> & co" for n, k in zip(names, there, strict=True)]
    assert opened.run("document.getElementById('tip').textContent").split("\n") == expected


def test_gallery_is_ordered_by_what_is_lost(opened):
    scroll_to(opened, "gallery")
    opened.wait("document.querySelectorAll('.picture').length")
    choose(opened, "order", "lost")
    lost = opened.run(
        "readData('gallery').then(({images}) => [...document.querySelectorAll('.picture')]"
        ".map(({dataset}) => images[dataset.index].right).map((right) => right[0] - right[8]))"
    )
    assert lost == sorted(lost, reverse=True)


@pytest.mark.parametrize("content", ["nothing", "one setting"])
def test_a_run_with_little_to_show_opens(browser, run, tmp_path, content):
    if content == "one setting":
        row = read_rows(run / CURVE)[0]
        row["cost"]["latency_ms"] = None
        (tmp_path / CURVE).write_text(json.dumps(row) + "\n")
    browser.problems.clear()
    browser.open(write_report(tmp_path))
    assert browser.problems == []


def test_pages_of_others_draw_their_charts(browser, tmp_path):
    lines = {"type": "parcoords", "dimensions": [{"label": "rate", "values": [1, math.nan, 3]}]}
    charts = {
        "parameters": {"data": [lines], "layout": layout("", "", "")},
        "history": {"data": [{"x": [1, 2], "y": [3, 4]}], "layout": layout("title", "x", "y")},
    }
    sections = [boxes(charts, *charts), table(["a", "b"], [["1", ("2", "https://example.org")]])]
    path = write_page(tmp_path / "page.html", "a <page>", sections, charts)
    browser.problems.clear()
    browser.open(path, ready="document.querySelectorAll('.chart[data-drawn]').length === 2")
    assert browser.run("document.title") == "a <page>"
    assert browser.problems == []


def test_runs_beside_each_other(browser, run, tmp_path):
    other = make_run(tmp_path / "other", classes=9, images=1, validations=2, size=(20, 30))
    page = write_comparison([run, other], tmp_path / "comparison.html")
    browser.problems.clear()
    browser.open(page)
    names = "document.getElementById('gmacs').data?.filter((t) => t.meta).map((t) => t.name)"
    assert browser.wait(names) == ["large", "other"]
    choose(browser, "chosen", "other · isr_2")
    browser.wait("document.querySelector('#classes th.chosen').textContent === 'other · isr_2'")
    assert browser.problems == []
