from __future__ import annotations

import contextlib
import errno
import itertools
import os
import shutil
import zipfile

import pytest
import torch
from lightning.pytorch import Callback

from callbacks.checkpoint_files import CheckpointFiles, find_whole_checkpoint
from callbacks.checkpoints import Checkpoints
from callbacks.cost_curve import CostCurve
from callbacks.jsonl import ForgetLostSteps, JsonLinesLogger, append_rows, read_rows
from segtrain import UserError
from tests.callbacks.tiny import TinyData, create_module, create_trainer


class Interrupted(Exception):
    pass


class Record(Callback):
    """What happened at which step; interrupts when told to."""

    def __init__(self, interrupt_at=None, stop_at=None):
        self.events = []
        self.interrupt_at = interrupt_at
        self.stop_at = stop_at

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.interrupt_at:
            raise Interrupted
        rate = trainer.optimizers[0].param_groups[0]["lr"]
        self.events.append((trainer.global_step, rate, *batch["name"]))

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step == self.stop_at

    def on_validation_end(self, trainer, pl_module):
        self.events.append((trainer.global_step, "validated"))


def fit(folder, record=None, resume=False, every=2, accumulate=1, keep=-1):
    record = record or Record()
    module = create_module(seed=1 if resume else 0)
    callbacks = [
        ForgetLostSteps(folder),
        CostCurve(folder, ["isr_4444_444"], latency=False),
        record,
        Checkpoints(folder, every, keep),
    ]
    loggers = [JsonLinesLogger(folder)]
    trainer = create_trainer(callbacks, loggers, steps=6, validate_every=3, accumulate=accumulate)
    path = folder / "checkpoints" / "last.ckpt" if resume else None
    with contextlib.suppress(Interrupted):
        trainer.fit(module, TinyData(), ckpt_path=path, weights_only=True)
    return module, record.events


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return folder, *fit(folder)


def timeless(path, but):
    timed = ("time", "train/images_per_second")
    return [
        {name: value for name, value in row.items() if name not in timed}
        for row in read_rows(path)
        if row["step"] != but
    ]


@pytest.mark.parametrize(
    ("how", "step", "resumed_from"),
    [
        ("interrupt_at", 3, 2),  # after a validation that wrote no last.ckpt
        ("interrupt_at", 5, 4),
        ("stop_at", 3, 3),
        ("stop_at", 5, 5),
    ],
)
def test_resumed_run_does_what_was_left(tmp_path, uninterrupted, how, step, resumed_from):
    whole_folder, whole, events = uninterrupted
    fit(tmp_path, Record(**{how: step}))
    module, resumed = fit(tmp_path, resume=True)
    first = next(
        i for i, event in enumerate(events) if event[0] == resumed_from and event[1] != "validated"
    )
    assert resumed == events[first:]
    for name, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name
    for name in ("curve.jsonl", "metrics.jsonl"):
        rows, expected = read_rows(tmp_path / name), read_rows(whole_folder / name)
        drop = ("time", "train/images_per_second")
        plain = [
            [{k: v for k, v in r.items() if k not in drop} for r in rs] for rs in (rows, expected)
        ]
        if how == "stop_at":  # stopping validates once more than the whole run does
            plain = [[r for r in rs if r["step"] != step] for rs in plain]
        assert plain[0] == plain[1]


def test_checkpoint_due_at_a_validation_is_written_after_it(tmp_path):
    _, events = fit(tmp_path, Record(interrupt_at=4), every=3)
    _, resumed = fit(tmp_path, resume=True, every=3)
    assert (3, "validated") in events
    assert (3, "validated") not in resumed
    assert resumed[0][0] == 3
    rows = read_rows(tmp_path / "curve.jsonl")
    assert [row["step"] for row in rows] == [3, 3, 6, 6]


def test_accumulated_steps_are_written_once(tmp_path):
    whole, events = fit(tmp_path / "whole", accumulate=2)
    fit(tmp_path / "killed", Record(interrupt_at=5), accumulate=2)
    module, resumed = fit(tmp_path / "killed", resume=True, accumulate=2)
    assert resumed == events[-len(resumed) :]
    assert resumed[0][0] == 4
    for name, value in whole.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_files_hold_plain_types_and_the_newest_are_kept(tmp_path, uninterrupted):
    folder = uninterrupted[0] / "checkpoints"
    names = {path.name for path in folder.iterdir()}
    steps = {"step-000002.ckpt", "step-000004.ckpt", "step-000006.ckpt"}
    assert names == {"last.ckpt", "previous.ckpt", "best.ckpt"} | steps
    for name in names:
        checkpoint = torch.load(folder / name, weights_only=True)
        assert "network.decoder.fuse.weight" in checkpoint["state_dict"]
    assert torch.load(folder / "last.ckpt", weights_only=True)["global_step"] == 6
    assert torch.load(folder / "previous.ckpt", weights_only=True)["global_step"] == 4
    fit(tmp_path / "two", keep=2)
    kept = {path.name for path in (tmp_path / "two" / "checkpoints").iterdir()}
    files = {"last.ckpt", "previous.ckpt", "best.ckpt"}
    assert kept == files | {"step-000004.ckpt", "step-000006.ckpt"}
    fit(tmp_path / "one", keep=1)
    kept = {path.name for path in (tmp_path / "one" / "checkpoints").iterdir()}
    assert kept == files


def test_best_is_remembered_over_a_resume(tmp_path, monkeypatch):
    def train(scores, resume=None):
        values = iter(scores.values())
        monkeypatch.setattr(
            "segtrain.training.module.mean_iou", lambda matrix: torch.tensor(next(values))
        )
        loggers = [JsonLinesLogger(tmp_path)]
        callbacks = [Checkpoints(tmp_path, every=1)]
        trainer = create_trainer(callbacks, loggers, steps=max(scores), validate_every=1)
        trainer.fit(create_module(), TinyData(), ckpt_path=resume, weights_only=True)
        path = tmp_path / "checkpoints" / "best.ckpt"
        return torch.load(path, weights_only=True)["global_step"]

    assert train({1: 0.25, 2: 0.5, 3: float("nan"), 4: 0.125}) == 2
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert train({5: 0.375}, last) == 2
    assert train({6: 0.75}, last) == 6
    rows = read_rows(tmp_path / "metrics.jsonl")
    best = [row["best/mIoU"] for row in rows if "best/mIoU" in row]
    assert best == [0.25, 0.5, 0.5, 0.5, 0.5, 0.75]


def step_of(path):
    return torch.load(path, weights_only=True)["global_step"]


def train_to(folder, steps, resume=None):
    trainer = create_trainer([Checkpoints(folder, every=1)], steps=steps, limit_val_batches=0)
    trainer.fit(create_module(), TinyData(), ckpt_path=resume, weights_only=True)


@pytest.mark.parametrize("at", ["save", "fsync", "link", "replace"])
def test_interrupted_writing_leaves_whole_files(tmp_path, monkeypatch, at):
    """In the middle of the third checkpoint, wherever that is."""
    folder = tmp_path / "checkpoints"
    train_to(tmp_path, 2)
    assert {path.name: step_of(path) for path in folder.iterdir()} == {
        "last.ckpt": 2,
        "previous.ckpt": 1,
    }

    def interrupt(*args):
        raise Interrupted

    def save(checkpoint, file):
        file.write(b"PK half a checkpoint")
        raise Interrupted

    with monkeypatch.context() as patch:
        files = "callbacks.checkpoint_files"
        if at == "save":
            patch.setattr(f"{files}.torch.save", save)
        elif at == "replace":
            patch.setattr(f"{files}.Path.replace", interrupt)
        else:
            patch.setattr(f"{files}.os.{at}", interrupt)
        with pytest.raises(Interrupted):
            train_to(tmp_path, 3, folder / "last.ckpt")
    assert {path.name: step_of(path) for path in folder.iterdir()} == {
        "last.ckpt": 2,
        "previous.ckpt": 1,
    }
    train_to(tmp_path, 3, folder / "last.ckpt")
    assert {path.name: step_of(path) for path in folder.iterdir()} == {
        "last.ckpt": 3,
        "previous.ckpt": 2,
    }


def test_file_system_without_links(tmp_path, monkeypatch):
    def link(*args):
        raise OSError

    monkeypatch.setattr("callbacks.checkpoint_files.os.link", link)
    train_to(tmp_path, 2)
    assert {path.name: step_of(path) for path in (tmp_path / "checkpoints").iterdir()} == {
        "last.ckpt": 2,
        "previous.ckpt": 1,
    }


def test_a_best_checkpoint_that_cannot_be_written_is_tried_again(tmp_path, monkeypatch):
    values = iter([0.5, 0.25, 0.375])
    monkeypatch.setattr(
        "segtrain.training.module.mean_iou", lambda matrix: torch.tensor(next(values))
    )

    class Full(CheckpointFiles):
        """A disk that is full at the first attempt."""

        attempts = 0

        def save_checkpoint(self, checkpoint, path, storage_options=None):
            Full.attempts += 1
            with monkeypatch.context() as patch:
                if Full.attempts == 1:
                    patch.setattr("torch.save", full_disk)
                super().save_checkpoint(checkpoint, path, storage_options)

    def full_disk(checkpoint, file):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    callback = Checkpoints(tmp_path, every=1)
    callback.files = Full()
    trainer = create_trainer([callback], steps=3, validate_every=1)
    with pytest.warns(UserWarning, match=r"step 1 could not .* \(No space left on device\); there"):
        trainer.fit(create_module(), TinyData())
    assert step_of(tmp_path / "checkpoints" / "best.ckpt") == 3  # 0.25, then 0.375
    assert callback.best == 0.375


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def empty(path):
    path.write_bytes(b"")


def other(path):
    path.write_text("no checkpoint")


def archive(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("notes.txt", "no checkpoint")


@pytest.mark.parametrize("harm", [cut, flip, empty, other, archive])
def test_a_damaged_checkpoint_is_passed_over(tmp_path, uninterrupted, capsys, harm):
    folder = tmp_path / "checkpoints"
    shutil.copytree(uninterrupted[0] / "checkpoints", folder)
    assert find_whole_checkpoint(folder) == folder / "last.ckpt"
    assert capsys.readouterr().err == ""
    for damaged, next_one in itertools.pairwise(
        ["last.ckpt", "step-000006.ckpt", "step-000004.ckpt", "step-000002.ckpt", "previous.ckpt"]
    ):
        harm(folder / damaged)
        assert find_whole_checkpoint(folder) == folder / next_one
        assert f"{folder / damaged} is damaged" in capsys.readouterr().err
    harm(folder / "previous.ckpt")
    assert find_whole_checkpoint(folder) is None
    assert find_whole_checkpoint(tmp_path / "nowhere") is None


@pytest.mark.parametrize("arguments", [{"every": 0}, {"keep": 0}, {"keep": -2}])
def test_bad_arguments(tmp_path, arguments):
    with pytest.raises(UserError, match=r"callbacks\.checkpoints"):
        Checkpoints(tmp_path, **arguments)


def test_lost_steps_are_forgotten_only_in_training(tmp_path):
    append_rows(tmp_path / "curve.jsonl", [{"step": 9, "setting": "full"}])
    create_trainer([ForgetLostSteps(tmp_path)]).validate(create_module(), TinyData())
    assert read_rows(tmp_path / "curve.jsonl") == [{"step": 9, "setting": "full"}]
