from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import data
from tests.data.layouts import WRITERS

SMALL = {
    "batch_size": 2,
    "workers": 0,
    "crop_size": (32, 32),
    "train_scale": (64, 32),
    "eval_scale": None,
    "size_divisor": None,
}


@pytest.fixture
def open_small(tmp_path: Path) -> Callable[..., data.SegmentationData]:
    """Write a tiny data set under tmp_path (once) and open it; the name is a key of WRITERS."""

    def open_small(name: str, **options: Any) -> data.SegmentationData:
        if not any(tmp_path.iterdir()):
            WRITERS[name](tmp_path)
        if name == "cocostuff 10k":
            options["variant"] = "10k"
        return data.create_data_module(name.split()[0], **{"root": tmp_path} | SMALL | options)

    return open_small
