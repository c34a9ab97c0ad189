from __future__ import annotations

import base64
import hashlib
import json
import threading
import warnings

import pytest
import torch
import wandb
from lightning.pytorch import Callback

from callbacks.artifacts import Artifacts
from callbacks.checkpoints import Checkpoints
from callbacks.cost_curve import CostCurve
from callbacks.jsonl import read_rows
from callbacks.tracking import create_loggers
from tests.callbacks.test_tracking import RECORD, TRACKING
from tests.callbacks.tiny import TinyData, create_module, create_trainer, wandb_artifacts


class NothingBetter(Callback):
    """Makes the first validation of a training its best."""

    def on_validation_end(self, trainer, pl_module):
        for callback in trainer.callbacks:
            if isinstance(callback, Checkpoints):
                callback.best = 1.0


class StopAt(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        trainer.should_stop = trainer.global_step >= self.step


def fit(folder, loggers=(), more=(), **arguments):
    module, data = create_module(), TinyData()
    curve = CostCurve(folder, ["isr_2211_222"], latency=False)
    callbacks = [curve, Checkpoints(folder, every=2), Artifacts(folder), NothingBetter(), *more]
    trainer = create_trainer(callbacks, loggers, **arguments)
    trainer.fit(module, data)
    return trainer


def fit_offline(folder, **arguments):
    folder.mkdir()
    loggers = create_loggers(TRACKING, folder, RECORD, {})
    try:
        fit(folder, loggers, **arguments)
    finally:
        wandb.teardown()  # the file is whole only then


def test_offline_the_best_and_the_last_are_kept_for_later(tmp_path):
    folder = tmp_path / "run"
    fit_offline(folder, steps=6)
    best, last = wandb_artifacts(folder)
    assert {best.name, last.name} == {"checkpoint-abc12345"}
    assert set(best.aliases) == {"latest", "best", "step-2"}
    assert set(last.aliases) == {"latest", "step-6"}
    curve = read_rows(folder / "curve.jsonl")
    for name, artifact, step in (("best", best, 2), ("last", last, 6)):
        rows = [row for row in curve if row["step"] == step]
        metadata = json.loads(artifact.metadata)
        assert (metadata["step"], metadata["mIoU"]) == (step, rows[0]["mIoU"])
        assert metadata["settings"] == {
            row["setting"]: {
                "gmacs": row["cost"]["gmacs"],
                "latency_ms": None,
                "mIoU": row["mIoU"],
            }
            for row in rows
        }
        files = {entry.path: entry for entry in artifact.manifest.contents}
        assert set(files) == {"checkpoint.ckpt", "curve.jsonl"}
        kept = [row for row in curve if row["step"] <= step]
        beside = files["curve.jsonl"].local_path
        assert [json.loads(line) for line in open(beside)] == kept  # noqa: PTH123, SIM115
        # What comes after does not touch it.
        (folder / "checkpoints" / f"{name}.ckpt").unlink()
        kept = files["checkpoint.ckpt"].local_path
        assert torch.load(kept, weights_only=True)["global_step"] == step
        assert digest(kept) == files["checkpoint.ckpt"].digest


def digest(path):
    with open(path, "rb") as file:  # noqa: PTH123
        return base64.b64encode(hashlib.file_digest(file, "md5").digest()).decode()


def test_offline_a_run_that_is_stopped_keeps_no_copies(tmp_path):
    folder = tmp_path / "run"
    fit_offline(folder, steps=100, more=[StopAt(2)])
    assert (folder / "checkpoints" / "last.ckpt").exists()
    assert wandb_artifacts(folder) == []
    assert not (folder / "wandb" / "checkpoints").exists()


class Server:
    """An online W&B run, as far as artifacts are concerned."""

    id, offline = "abc12345", False

    def __init__(self, failing=False):
        self.failing = failing
        self.reachable = threading.Event()
        self.logged, self.sent = [], []

    def log_artifact(self, artifact, aliases):
        if self.failing:
            raise wandb.errors.CommError("no such project\nand more")
        self.logged.append(set(aliases))
        server = self

        class Sent:
            def wait(self):
                server.reachable.wait()
                entry = artifact.manifest.entries["checkpoint.ckpt"]
                step = torch.load(entry.local_path, weights_only=True)["global_step"]
                assert digest(entry.local_path) == entry.digest
                server.sent.append(step)

        return Sent()


@pytest.fixture
def connect(monkeypatch):
    def use(server):
        monkeypatch.setattr("callbacks.artifacts.wandb_runs", lambda trainer: [server])
        return server

    return use


def test_online_each_is_sent_and_a_slow_network_delays_nothing(tmp_path, connect, monkeypatch):
    server = connect(Server())
    monkeypatch.setattr("callbacks.artifacts.PATIENCE", 0)
    # Nothing gets through before the training has ended, with last.ckpt replaced twice.
    trainer = fit(tmp_path, steps=6)
    assert (trainer.global_step, server.sent) == (6, [])
    (sender,) = (t for t in threading.enumerate() if "_send_held" in t.name)
    server.reachable.set()
    sender.join()
    assert server.sent == [2, 4, 6]
    assert server.logged == [
        {"latest", "best", "step-2"},
        {"latest", "step-4"},
        {"latest", "step-6"},
    ]
    assert not list((tmp_path / "wandb" / "checkpoints").iterdir())


def test_a_resumed_run_sends_the_best_before_the_latest(tmp_path, connect):
    connect(Server()).reachable.set()
    fit(tmp_path, steps=4)
    server = connect(Server())
    server.reachable.set()
    checkpoints = Checkpoints(tmp_path, every=2)
    trainer = create_trainer([checkpoints, Artifacts(tmp_path), NothingBetter()], steps=6)
    last = tmp_path / "checkpoints" / "last.ckpt"
    trainer.fit(create_module(), TinyData(), ckpt_path=last, weights_only=True)
    # W&B has the first from before, and keeps one version of the same content.
    assert server.logged == [{"latest", "best", "step-2"}, {"latest", "step-6"}]


def test_a_server_that_refuses_is_one_line_for_each_checkpoint(tmp_path, connect):
    connect(Server(failing=True))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = fit(tmp_path)
    said = [str(warning.message) for warning in caught]
    assert [line for line in said if "Weights & Biases" in line] == [
        f"Weights & Biases: the checkpoint of step {step} not logged (no such project)"
        for step in (2, 4)
    ]
    assert trainer.global_step == 4
