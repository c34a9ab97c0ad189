"""Caches hold what the files hold, and one that does not is not used."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

import data
from data import cache, cached
from data.cached import Cache, CacheFolder, open_cache
from data.dataset import load
from data.files import Split
from segtrain.errors import UserError
from tests.data.layouts import (
    WRITERS,
    random_image,
    write_ade20k,
    write_imagenet,
    zip_dataset,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*officially:UserWarning")
fork = multiprocessing.get_context("fork")  # what is patched is patched in the command as well


@pytest.fixture(autouse=True)
def small_parts(monkeypatch):
    """Five images make three parts."""
    monkeypatch.setattr(cached, "_FEWEST_IMAGES", 2)


def write_all(split: Split, folder: Path, with_images: bool = True) -> None:
    folder.mkdir()
    writer = CacheFolder(folder, split)
    for number in range(len(writer.ranges)):
        assert writer.write(number, with_images, lambda: None) == []


def assert_holds(opened: Cache | None, split: Split, images: bool = True) -> None:
    assert opened is not None
    assert opened.has_images == images
    for index in range(len(split.files)):
        _, image, label = load(replace(split, cache=None), index)
        np.testing.assert_array_equal(opened.label(index), label)
        if images:
            np.testing.assert_array_equal(opened.image(index), image)


def run(root: Path, *arguments: str, name: str = "ade20k") -> int:
    return cache.main([f"data={name}", f"data.root={root}", "workers=2", *arguments])


def start(root: Path, *arguments: str) -> multiprocessing.Process:
    """The command in a process (and a session) of its own."""

    def command() -> None:
        os.setsid()
        signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in jobs of some shells
        sys.exit(run(root, *arguments))

    process = fork.Process(target=command)
    process.start()
    return process


def wait_for_part(folder: Path) -> Path:
    while not (parts := sorted(folder.glob("part-*.bin"))):
        time.sleep(0.01)
    return parts[0]


def written(folder: Path) -> dict[str, int]:
    """Name -> when the part was written."""
    paths = folder.rglob("part-*.bin")
    return {f"{path.parent.name}/{path.name}": path.stat().st_mtime_ns for path in paths}


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("zipped", [False, True])
def test_a_cache_holds_what_the_files_hold(open_small, tmp_path, name, zipped):
    data_module = open_small(name)
    if zipped:
        zip_dataset(name, tmp_path)
        data_module = open_small(name)
    for split_name in ("train", "val"):
        split = data_module.find_split(split_name)
        folder = tmp_path / f"cache_{split_name}"
        write_all(split, folder)
        opened = open_cache(split, folder)
        assert_holds(opened, split)
        opened.image(0)
        assert_holds(pickle.loads(pickle.dumps(opened)), split)  # as in a process that is spawned
        assert not opened.image(1).flags.writeable
        assert opened.label(1).flags.writeable


@pytest.mark.filterwarnings("error:.*not writable")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("only", [[], ["only=labels"]])
def test_training_and_evaluation_are_the_same(open_small, tmp_path, workers, only):
    without = open_small("ade20k", cache="none")
    assert run(tmp_path, *only) == 0
    with_cache = open_small("ade20k", workers=workers)
    assert with_cache.training_images().split.cache.has_images == (not only)
    batches = [
        [batch for batch, _ in zip(module.train_dataloader(), range(4), strict=False)]
        + list(module.val_dataloader())
        for module in (without, with_cache)
    ]
    for expected, batch in zip(*batches, strict=True):
        assert batch["name"] == expected["name"]
        np.testing.assert_array_equal(batch["image"], expected["image"])
        np.testing.assert_array_equal(batch["mask"], expected["mask"])
    assert len(batches[0]) == 7


def test_another_folder(open_small, tmp_path):
    open_small("ade20k")
    folder = tmp_path / "scratch/cache"
    assert run(tmp_path, f"data.cache={folder}") == 0
    assert not (tmp_path / "segtrain_cache").exists()
    assert open_small("ade20k").training_images().split.cache is None
    assert open_small("ade20k", cache=folder).training_images().split.cache is not None


def test_labels_become_images_and_labels(open_small, tmp_path, capsys):
    split = open_small("cocostuff 10k").find_split("train")
    folder = tmp_path / "segtrain_cache_10k"
    options = {"name": "cocostuff"}
    assert run(tmp_path, "data.variant=10k", "only=labels", **options) == 0
    assert_holds(open_cache(split, folder / "train"), split, images=False)
    labels = written(folder)
    assert run(tmp_path, "data.variant=10k", **options) == 0
    assert_holds(open_cache(split, folder / "train"), split)
    both = written(folder)
    assert labels.keys() == both.keys()
    assert not labels.items() & both.items()
    capsys.readouterr()
    assert run(tmp_path, "data.variant=10k", "only=labels", **options) == 0
    assert written(folder) == both
    assert "36.0 kB" in capsys.readouterr().out  # the pixels of 5 images, in the table


def test_a_killed_command_goes_on(open_small, tmp_path, monkeypatch):
    split = open_small("ade20k").find_split("train")
    folder = tmp_path / "segtrain_cache/train"

    def encode_until_killed(*arguments):
        while list(folder.glob("part-*.bin")) and multiprocessing.parent_process().is_alive():
            time.sleep(0.01)
        return encode(*arguments)

    encode = cached.encode
    monkeypatch.setattr(cached, "encode", encode_until_killed)
    command = start(tmp_path)
    first = wait_for_part(folder)
    since = first.stat().st_mtime_ns
    os.kill(command.pid, signal.SIGKILL)
    command.join()
    with pytest.warns(UserWarning, match=r"is unfinished: [12] of 3 parts are there.*data\.cache`"):
        assert open_cache(split, folder) is None
    (folder / "part-02.0123.unfinished").write_bytes(b"left behind")
    monkeypatch.undo()
    monkeypatch.setattr(cached, "_FEWEST_IMAGES", 2)
    assert run(tmp_path) == 0
    assert first.stat().st_mtime_ns == since
    assert_holds(open_cache(split, folder), split)
    assert sorted(path.name for path in folder.iterdir()) == [f"part-0{i}.bin" for i in range(3)]


def test_an_interrupt_is_one_line(open_small, tmp_path, monkeypatch, capfd):
    open_small("ade20k")
    monkeypatch.setattr(cached, "encode", lambda *_: time.sleep(60))
    command = start(tmp_path)
    folder = tmp_path / "segtrain_cache/train"
    while not list(folder.glob("*.unfinished")):
        time.sleep(0.01)
    os.killpg(command.pid, signal.SIGINT)
    command.join()
    assert command.exitcode == 130
    message = "segtrain: interrupted; the same command goes on where this one stopped\n"
    assert capfd.readouterr().err == message
    assert not list(folder.iterdir())


def test_two_commands_at_once(open_small, tmp_path, monkeypatch):
    split = open_small("ade20k").find_split("train")
    log = tmp_path / "log"

    def write_and_tell(self, number, *arguments):
        with log.open("a") as file:
            file.write(f"{self.path.name} {number}\n")
        return write(self, number, *arguments)

    write = CacheFolder.write
    monkeypatch.setattr(CacheFolder, "write", write_and_tell)
    commands = [start(tmp_path) for _ in range(2)]
    for command in commands:
        command.join()
        assert command.exitcode == 0
    written = ["train 0", "train 1", "train 2", "val 0", "val 1"]
    assert sorted(log.read_text().splitlines()) == written
    assert_holds(open_cache(split, tmp_path / "segtrain_cache/train"), split)


@pytest.mark.parametrize("kind", ["image", "label", "gone"])
def test_a_changed_file(open_small, tmp_path, kind):
    data_module = open_small("ade20k")
    assert run(tmp_path) == 0
    folder = tmp_path / "segtrain_cache/train"
    before = written(folder)
    place, suffix = ("annotations", "png") if kind == "label" else ("images", "jpg")
    path = tmp_path / f"ADEChallengeData2016/{place}/training/ADE_train_00000003.{suffix}"
    if kind == "gone":  # since the split was found
        split = data_module.find_split("train")
        path.unlink()
    else:
        cv2.imwrite(str(path), random_image(9) if kind == "image" else np.full((40, 60), 7, "u1"))
        os.utime(path, (0, 0))
        split = data_module.find_split("train")
    with pytest.warns(UserWarning, match=f"{path} has another size or date, or is gone"):
        assert open_cache(split, folder) is None
    if kind != "gone":
        assert run(tmp_path) == 0
        assert_holds(open_cache(split, folder), split)
        after = written(folder)
        assert {name for name in before if before[name] != after[name]} == {"train/part-01.bin"}


def test_a_changed_zip(open_small, tmp_path):
    open_small("ade20k")
    labels = tmp_path / "ADEChallengeData2016/annotations/training"
    other = tmp_path / "other"
    shutil.copytree(tmp_path / "ADEChallengeData2016", other / "ADEChallengeData2016")
    zip_dataset("ade20k", tmp_path)
    archive = tmp_path / "ADEChallengeData2016.zip"
    assert run(tmp_path) == 0
    folder = tmp_path / "segtrain_cache/train"
    os.utime(archive, (0, 0))  # a copy
    split = open_small("ade20k").find_split("train")
    assert open_cache(split, folder) is not None
    path = other / labels.relative_to(tmp_path) / "ADE_train_00000002.png"
    cv2.imwrite(str(path), np.full((40, 60), 7, np.uint8))
    archive.unlink()
    zip_dataset("ade20k", other)
    split = data.create_data_module("ade20k", root=other).find_split("train")
    with pytest.warns(UserWarning, match=r"ADE_train_00000002\.png has another size or date"):
        assert open_cache(split, folder) is None


def test_other_files_and_other_classes(open_small, tmp_path):
    data_module = open_small("ade20k")
    assert run(tmp_path) == 0
    folder = tmp_path / "segtrain_cache/train"
    split = data_module.find_split("train")
    table = replace(split.table, raw_to_train=split.table.raw_to_train[::-1].copy())
    with pytest.warns(UserWarning, match="has the labels of another class table"):
        assert open_cache(replace(split, table=table), folder) is None
    write_ade20k(tmp_path, train=4)
    for kind in ("images", "annotations"):
        for path in tmp_path.glob(f"*/{kind}/training/*5.*"):
            path.unlink()
    split = data_module.find_split("train")
    with pytest.warns(UserWarning, match="is of other files: some were added"):
        assert open_cache(split, folder) is None
    assert run(tmp_path) == 0
    assert len(list(folder.iterdir())) == 2  # the third part has gone
    assert_holds(open_cache(split, folder), split)


def test_another_format(open_small, tmp_path, monkeypatch):
    split = open_small("ade20k").find_split("train")
    write_all(split, tmp_path / "cache")
    monkeypatch.setattr(cached, "_VERSION", cached._VERSION + 1)
    with pytest.warns(UserWarning, match="has another format"):
        assert open_cache(split, tmp_path / "cache") is None


@pytest.mark.parametrize("size", [0, 3000, -1])
def test_a_part_that_is_cut_short(open_small, tmp_path, size):
    split = open_small("ade20k").find_split("train")
    assert run(tmp_path) == 0
    folder = tmp_path / "segtrain_cache/train"
    opened = open_cache(split, folder)
    path = folder / "part-01.bin"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(UserError, match=rf"{path} is damaged.*`python -m data\.cache`"):
        open_cache(split, folder)
    with pytest.raises(UserError, match=f"{path} has changed or gone"):
        opened.image(2)
    assert run(tmp_path) == 0
    assert_holds(open_cache(split, folder), split)


def test_a_cache_that_changes_while_it_is_open(open_small, tmp_path):
    split = open_small("ade20k").find_split("train")
    write_all(split, tmp_path / "cache")
    opened = open_cache(split, tmp_path / "cache")
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match="has changed or gone"):
        opened.label(0)
    write_all(split, tmp_path / "cache", with_images=False)
    with pytest.raises(UserError, match="has changed or gone"):
        opened.label(0)


def test_a_label_with_a_flipped_bit(open_small, tmp_path):
    split = open_small("ade20k").find_split("train")
    write_all(split, tmp_path / "cache", with_images=False)
    path = tmp_path / "cache/part-00.bin"
    content = bytearray(path.read_bytes())
    content[20] ^= 4
    path.write_bytes(content)
    opened = open_cache(split, tmp_path / "cache")
    with pytest.raises(UserError, match=rf"{path} is damaged.*`python -m data\.cache`"):
        opened.label(0)


def test_all_files_that_cannot_be_read_are_named(open_small, tmp_path, capsys):
    data_module = open_small("cityscapes")
    damaged = sorted(tmp_path.rglob("*000001*leftImg8bit.png"))
    assert len(damaged) == 2
    whole = {path: path.read_bytes() for path in damaged}
    for path in damaged:
        path.write_bytes(whole[path][:500])
    strange = next(tmp_path.rglob("*000002*labelIds.png"))
    whole[strange] = strange.read_bytes()
    cv2.imwrite(str(strange), np.full((40, 60), 77, np.uint8))
    assert run(tmp_path, name="cityscapes") == 2
    error = capsys.readouterr().err
    assert error.startswith("segtrain: error: 3 files cannot be read:\n")
    assert all(str(path) in error for path in whole)
    split = data_module.find_split("train")
    folder = tmp_path / "segtrain_cache/train"
    with pytest.warns(UserWarning, match="is unfinished: 1 of 3 parts"):
        assert open_cache(split, folder) is None
    for path, content in whole.items():
        path.write_bytes(content)
    assert run(tmp_path, name="cityscapes") == 0
    assert_holds(open_cache(split, folder), split)


def test_too_little_space(open_small, tmp_path, monkeypatch, capsys):
    open_small("ade20k")
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(cache, "disk_usage", lambda _: usage(40_000))
    assert run(tmp_path) == 2
    output = capsys.readouterr()
    assert output.out.startswith("8 images: about 58")
    assert "40.0 kB are free" in output.out
    assert "segtrain_cache has too little space" in output.err
    assert not list(tmp_path.rglob("part-*"))
    assert run(tmp_path, "only=labels") == 0


def test_a_disk_that_is_full_after_all(open_small, tmp_path, monkeypatch, capsys):
    open_small("ade20k")

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    assert run(tmp_path) == 2
    assert "could not be written: No space left on device" in capsys.readouterr().err
    assert not list((tmp_path / "segtrain_cache/train").iterdir())


def test_a_process_that_is_killed(open_small, tmp_path, monkeypatch, capsys):
    open_small("ade20k")
    killed = os.getpid()

    def encode_and_die(*arguments):
        if os.getpid() != killed:
            os.kill(os.getpid(), signal.SIGKILL)
        return encode(*arguments)

    encode = cached.encode
    monkeypatch.setattr(cached, "encode", encode_and_die)
    assert run(tmp_path) == 2
    assert "ended with status -9" in capsys.readouterr().err
    assert not list((tmp_path / "segtrain_cache/train").iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["only=images"], "only=images: the one choice is only=labels"),
        (["data.cache=none"], "data.cache=none: leave it out"),
        (["data.cache=/dev/null/cache"], "/dev/null/cache cannot be written to: Not a directory"),
        (["onyl=labels"], "did you mean 'only'?"),
    ],
)
def test_a_slip_is_one_line(open_small, tmp_path, capsys, arguments, message):
    open_small("ade20k")
    assert run(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_data_without_label_files(tmp_path, capsys):
    write_imagenet(tmp_path)
    assert run(tmp_path, name="imagenet") == 2
    assert "ImageNet has no label files" in capsys.readouterr().err


def test_the_command_line(tmp_path, monkeypatch):
    monkeypatch.undo()  # the command has parts of its own size
    command = [sys.executable, "-m", "data.cache", "data=scenes", f"data.root={tmp_path}"]
    command += ["data.train_images=3", "data.eval_images=2", "workers=2"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "5 images: about" in result.stdout
    (folder,) = tmp_path.glob("cityscapes-*/segtrain_cache")
    assert f"Scenes is cached in {folder}\n" in result.stdout
    assert "runpy" not in result.stderr
    options = {"train_images": 3, "eval_images": 2, "workers": 0}
    scenes = data.create_data_module("scenes", root=tmp_path, **options)
    for images in (scenes.training_images(), scenes.evaluation_images()):
        assert_holds(images.split.cache, images.split)
