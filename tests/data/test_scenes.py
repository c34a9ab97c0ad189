"""The embedded data set: drawn the same everywhere, whole whatever happens, read like real ones."""

from __future__ import annotations

import hashlib
import multiprocessing
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

import data
from data.classes import load_class_table
from data.scenes.writer import Rendering

RENDERING = Rendering("cityscapes", train_images=12, eval_images=3, height=32, width=64)


def contents(folder: Path) -> dict[str, str]:
    """Digest of every file that is not the lock."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def render(root: Path, rendering: Rendering) -> None:
    cv2.setNumThreads(0)  # its threads do not survive a fork
    rendering.write(root)


def rendering_process(root: Path, rendering: Rendering) -> multiprocessing.Process:
    process = multiprocessing.get_context("fork").Process(target=render, args=(root, rendering))
    process.start()
    return process


def test_rendering_is_the_same_in_another_process(tmp_path):
    process = rendering_process(tmp_path / "other", RENDERING)
    here = RENDERING.write(tmp_path / "here")
    process.join()
    assert process.exitcode == 0
    assert contents(here) == contents(tmp_path / "other" / RENDERING.folder)
    assert len(contents(here)) == 2 * 15


def test_splits_and_images_differ():
    table = load_class_table("cityscapes")
    images = [RENDERING.draw((split, i), table)[0] for split in (0, 1) for i in range(10)]
    assert len({image.tobytes() for image in images}) == 20


def test_killed_rendering_is_finished_not_trusted(tmp_path):
    rendering = Rendering("cityscapes", train_images=400, eval_images=10, height=32, width=64)
    folder = tmp_path / rendering.folder
    process = rendering_process(tmp_path, rendering)
    deadline = time.monotonic() + 120
    while len(list(folder.rglob("*.png"))) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    process.kill()
    process.join()
    partial = contents(folder)
    assert 20 <= len(partial) < 820

    # What a kill in the middle of a file leaves behind.
    written = sorted(folder.rglob("*_leftImg8bit.png"))
    torn = written[0]
    torn.with_name(f"{torn.name}.unfinished").write_bytes(torn.read_bytes()[:100])
    torn.unlink()

    scenes = data.Scenes(tmp_path, train_images=400, eval_images=10, image_size=(32, 64))
    scenes.check()
    fresh = contents(rendering.write(tmp_path / "fresh"))
    assert contents(folder) == fresh


def test_deleted_file_comes_back_and_nothing_else_is_drawn_again(tmp_path):
    folder = RENDERING.write(tmp_path)
    before = contents(folder)
    times = {path: path.stat().st_mtime_ns for path in folder.rglob("*.png")}
    gone = sorted(times)[4]
    gone.unlink()
    RENDERING.write(tmp_path)
    assert contents(folder) == before
    unchanged = {path for path, then in times.items() if path.stat().st_mtime_ns == then}
    assert len(unchanged) >= len(times) - 2  # an image is drawn with its label
    RENDERING.write(tmp_path)
    assert {path for path in unchanged if path.stat().st_mtime_ns == times[path]} == unchanged


def test_two_processes_at_once_draw_one_set(tmp_path):
    rendering = Rendering("cityscapes", train_images=80, eval_images=1, height=32, width=64)
    processes = [rendering_process(tmp_path / "both", rendering) for _ in range(3)]
    for process in processes:
        process.join()
        assert process.exitcode == 0
    both = contents(tmp_path / "both" / rendering.folder)
    assert both == contents(rendering.write(tmp_path / "alone"))


def test_other_settings_have_their_own_folder(tmp_path):
    options = {"train_images": 2, "eval_images": 1, "image_size": (32, 64)}
    for changed in ({}, {"train_images": 3}, {"image_size": (48, 64)}, {"layout": "ade20k"}):
        scenes = data.Scenes(tmp_path, **options | changed)
        scenes.check()
        image = next(iter(scenes.val_dataloader()))["image"]
        assert image.shape[1:3] == (options | changed)["image_size"]
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("layout", ["cityscapes", "ade20k", "cocostuff"])
def test_labels_read_back_are_those_that_were_drawn(tmp_path, layout):
    """Through the same code as the real data set of this layout, files and all."""
    scenes = data.Scenes(
        tmp_path, layout=layout, train_images=4, eval_images=4, image_size=(32, 64), workers=0
    )
    scenes.check()
    assert scenes.num_classes == {"cityscapes": 19, "ade20k": 150, "cocostuff": 171}[layout]
    assert scenes.image_size_for_cost == (32, 64)
    drawn = [scenes.rendering.draw((1, i), scenes.table) for i in range(4)]
    (batch,) = scenes.val_dataloader()
    # Cityscapes files are sorted by city, so the order is another one.
    for image, mask in zip(batch["image"].numpy(), batch["mask"].numpy(), strict=True):
        (match,) = [d for d in drawn if np.array_equal(d[1], mask)]
        error = np.abs(match[0].astype(int) - image).mean()
        assert error < (1e-9 if layout == "cityscapes" else 8)
    assert len(np.unique(batch["mask"])) > 5


def test_class_shares_of_street_scenes_are_natural():
    table = load_class_table("cityscapes")
    rendering = Rendering("cityscapes", 1, 1, 64, 128)
    counts = sum(
        np.bincount(rendering.draw((0, i), table)[1].ravel(), minlength=256) for i in range(120)
    )
    percent = dict(zip(table.class_names, 100 * counts[:19] / counts.sum(), strict=True))
    assert min(percent.values()) > 0.2
    assert percent["road"] == pytest.approx(24, abs=4)
    assert percent["sky"] == pytest.approx(20, abs=4)
    for thin in ("pole", "traffic light", "traffic sign", "bicycle"):
        assert percent[thin] < 1.5
    assert counts[255] / counts.sum() < 0.03
