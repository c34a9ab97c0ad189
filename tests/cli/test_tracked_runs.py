"""Whole runs that are tracked, read back from what the trackers wrote."""

import csv
import json
import os
import pty
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

from tests.callbacks.tiny import (
    wandb_artifacts,
    wandb_config,
    wandb_file,
    wandb_history,
    wandb_records,
)

ROOT = Path(__file__).parents[2]
PRIVATE = ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "WANDB_DATA_DIR", "WANDB_CACHE_DIR")


@pytest.fixture
def nobody(in_folder, monkeypatch):
    """An environment without an account."""
    for name in PRIVATE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(in_folder))
    monkeypatch.setenv("NETRC", str(in_folder / "no-netrc"))


def on_a_terminal(folder, *arguments):
    """Run the command line on a terminal at which nobody sits; gives back what it shows."""
    screen, terminal = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    os.close(terminal)
    shown = b""
    try:
        while True:
            shown += os.read(screen, 65536)
    except OSError:  # the other end is closed
        pass
    finally:
        os.close(screen)
    assert process.wait() == 0, shown.decode()
    return shown.decode()


def test_nobody_is_asked_and_all_trackers_get_the_same(small, in_folder, nobody):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    arguments = [*small, "name=run", "tracking.mode=online", "tracking.loggers=[tensorboard,csv]"]
    arguments += ["callbacks.cost_curve.settings=[isr_2211_222]"]
    shown = on_a_terminal(in_folder, *arguments)
    (line,) = [line for line in shown.splitlines() if "Weights & Biases" in line]
    assert line.strip().endswith(
        "Weights & Biases: kept offline (no account configured); to send it later: "
        "wandb sync runs/run/wandb/offline-run-*"
    )

    run = in_folder / "runs/run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    logged = {
        (row["step"], name): value
        for row in rows
        for name, value in row.items()
        if name not in ("step", "time")
    }
    assert {"train/loss", "val/mIoU", "best/mIoU", "val/mIoU/full"} <= {name for _, name in logged}

    history = wandb_history(run)
    assert all("trainer/global_step" in row for row in history)
    for (step, name), value in logged.items():
        seen = [r[name] for r in history if r["trainer/global_step"] == step and name in r]
        assert seen == [value], (step, name)

    with (run / "csv/version_0/metrics.csv").open() as file:
        table = [
            ((int(row["step"]), name), float(value))
            for row in csv.DictReader(file)
            for name, value in row.items()
            if name != "step" and value
        ]
    assert dict(table) == logged
    assert len(table) == len(logged)

    events = EventAccumulator(str(run / "tensorboard"), {"scalars": 0})
    events.Reload()
    drawn = {
        (event.step, name): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }
    assert drawn == pytest.approx(logged, rel=1e-6)

    # What the run is, on the disk and in W&B.
    record = json.loads((run / "run.json").read_text())
    config = wandb_config(run)
    assert config["cfg"]["model"]["name"] == "edaformer_nano"
    assert config["run"] == {key: record[key] for key in config["run"]}
    assert config["run"].keys() == {"command", "git_commit", "git_dirty", "versions", "devices"}
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    ).stdout.strip()
    assert record["git_commit"] == (commit or None)
    assert {"python", "torch", "cuda", "wandb", "segtrain"} <= record["versions"].keys()
    assert "tracking.loggers=[tensorboard,csv]" in record["command"]

    artifacts = wandb_artifacts(run)
    aliases = [alias for artifact in artifacts for alias in artifact.aliases]
    assert artifacts[-1].name == f"checkpoint-{record['wandb_id']}"
    assert {"latest", "step-4"} <= set(artifacts[-1].aliases)
    assert aliases.count("best") == 1
    for artifact in artifacts:
        for entry in artifact.manifest.contents:
            assert Path(entry.local_path).is_relative_to(run.resolve())
            assert Path(entry.local_path).stat().st_size == entry.size
    assert not (in_folder / ".local").exists()
    agrees_with_the_official_reader(run)


def agrees_with_the_official_reader(run):
    """wandb's own command sees the records that ours does."""
    command = shutil.which("wandb", path=Path(sys.executable).parent)
    if command is None:
        return
    inspected = subprocess.run(
        [command, "leet", "inspect", "--json", str(wandb_file(run).parent)],
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = [json.loads(line).get("type") for line in inspected.stdout.splitlines()]
    ours = [record.WhichOneof("record_type") for record in wandb_records(run)]
    for kind in ("run", "history", "artifact", "config"):
        assert theirs.count(kind) == ours.count(kind) > 0, kind


def test_with_the_network_refused_training_starts_offline(small, start, in_folder, nobody):
    arguments = [*small, "name=run", "tracking.mode=auto", "schedule.log_every=1"]
    arguments += ["~callbacks.cost_curve", "~callbacks.pictures", "~callbacks.report"]
    server = {"WANDB_API_KEY": "0123456789" * 4, "WANDB_BASE_URL": "http://127.0.0.1:9"}
    done = start(*arguments, **server)
    (line,) = [line for line in done.stdout.splitlines() if "Weights & Biases" in line]
    assert "kept offline (" in line
    run = in_folder / "runs/run"
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    created = json.loads((run / "run.json").read_text())["created"]
    assert first["step"] == 1
    assert first["time"] - datetime.fromisoformat(created).timestamp() < 60
    assert [row["train/loss"] for row in wandb_history(run) if "train/loss" in row]
    assert wandb_artifacts(run)


def test_a_slip_leaves_no_folder(small, fails):
    text = fails(*small, "tracking.loggers=[tensorbord]", "name=run")
    assert "tracking.loggers: there is no logger 'tensorbord': did you mean 'tensorboard'" in text
    assert not Path("runs").exists()
