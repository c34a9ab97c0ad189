"""The benchmark of loaders, with small images and without MMSegmentation."""

import itertools
import json
import multiprocessing
import re
from dataclasses import replace

import cv2
import pytest

from benchmarks import loader, loader_files, loader_turns


@pytest.fixture(autouse=True)
def small_images(monkeypatch):
    for name, layout in loader_files.LAYOUTS.items():
        small = replace(layout, size=(60, 80), images=3)
        monkeypatch.setitem(loader_files.LAYOUTS, name, small)
        monkeypatch.setitem(loader.BATCH_SIZES, name, 2)


class Slow:
    """Stands for MMSegmentation: an image takes a second."""

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        pass

    def turn(self, order, seconds, with_stages):
        turn = {"images": order["batch_size"], "seconds": 2.0, "cpu_seconds": 2.0}
        return {**turn, "stages": {"pack": 0.25}} if with_stages else turn


def test_tables(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loader, "MMSegmentation", Slow)
    monkeypatch.setattr("os.sched_setaffinity", lambda process, cores: None)
    file = tmp_path / "loader.json"
    arguments = "--data ade20k --only files zips cache/device --seconds 0 --rounds 2 --workers 1"
    loader.run([*arguments.split(), "--folder", str(tmp_path), "--json", str(file)])
    out = capsys.readouterr().out
    for row, end in (("files", "target 4x: met"), ("zips", r"\d"), ("cache/device", "8x: met")):
        assert re.search(rf"^  {row} .*{end}$", out, re.MULTILINE), row
    assert re.search(r"^  zips are \S+ times as fast as files  target 0.9x: ", out, re.MULTILINE)
    assert re.search(r"^  pack +250.00   25 %$", out, re.MULTILINE)
    result = json.loads(file.read_text())["data"]["ade20k"]
    rows = [line["row"] for line in result["table"]]
    assert rows == ["mmsegmentation", "files", "zips", "cache/device"]
    assert {"read", "window", "resize", "colour", "hand-over"} <= result["stages"]["files"].keys()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("name", ["ade20k", "cityscapes"])
def test_files_are_the_same_whenever_drawn_and_copied(name, tmp_path):
    for folder in ("once", "again"):
        loader_files.draw_files(name, tmp_path / folder, 2)
    loader_files.copy_files(name, tmp_path / "once", tmp_path / "copy", 2)
    for pattern in loader_files.LAYOUTS[name].names:
        contents = {
            (tmp_path / folder / pattern.format(1)).read_bytes()
            for folder in ("once", "again", "copy")
        }
        assert len(contents) == 1
        assert contents != {(tmp_path / "once" / pattern.format(2)).read_bytes()}
    label = cv2.imread(str(tmp_path / "once" / pattern.format(1)), cv2.IMREAD_UNCHANGED)
    assert label.shape == (60, 80)


def test_stages_count_what_they_call_once(monkeypatch):
    ticks = itertools.count()  # a second passes with each look at the clock
    monkeypatch.setattr(loader_turns.time, "process_time", lambda: float(next(ticks)))

    class Pipeline:
        def load(self):
            self.read()
            self.crop()

        def read(self):
            pass

        def crop(self):
            self.read()

    functions = [(Pipeline, "read", "read"), (Pipeline, "crop", "crop")]
    with loader_turns.Stages((Pipeline, "load"), functions) as stages:
        Pipeline().load()
    Pipeline().load()  # is not timed any more
    assert stages.read() == {"read": 2, "crop": 2, "rest": 3, "samples": 1}
