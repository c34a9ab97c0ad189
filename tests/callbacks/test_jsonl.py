from __future__ import annotations

import json
import math

import pytest

from callbacks.jsonl import JsonLinesLogger, append_rows, drop_rows_after, read_rows


def test_rows_come_back_and_numbers_that_are_not_finite_are_null(tmp_path):
    path = tmp_path / "curve.jsonl"
    append_rows(path, [{"step": 1, "IoU": {"sky": math.nan, "road": 0.5}, "x": [math.inf, 1]}])
    append_rows(path, [{"step": 2}])
    assert read_rows(path) == [
        {"step": 1, "IoU": {"sky": None, "road": 0.5}, "x": [None, 1]},
        {"step": 2},
    ]
    assert read_rows(tmp_path / "other.jsonl") == []


def test_half_written_last_line_is_left_out_but_a_damaged_middle_is_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_rows(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 2}\n')
    with pytest.raises(json.JSONDecodeError):
        read_rows(path)


def test_later_rows_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_rows(path, [{"step": step} for step in (1, 2, 3, 4)])
    with path.open("a") as file:
        file.write('{"step": 5, "tra')
    drop_rows_after(path, 2)
    append_rows(path, [{"step": 3, "again": True}])
    assert read_rows(path) == [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    drop_rows_after(tmp_path / "other.jsonl", 2)
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_logger_appends_plain_rows(tmp_path):
    logger = JsonLinesLogger(tmp_path)
    logger.log_metrics({"train/loss": 0.5}, step=7)
    logger.log_metrics({"val/mIoU": math.nan}, step=8)
    first, second = read_rows(tmp_path / "metrics.jsonl")
    assert first.keys() == {"step", "time", "train/loss"}
    assert (first["step"], first["train/loss"]) == (7, 0.5)
    assert second["val/mIoU"] is None
