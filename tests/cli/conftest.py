"""The command line as a person runs it, on a few small scenes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import run_folder
import train

ROOT = Path(train.__file__).parent


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """Arguments of a run of seconds: 24 training images, 5 validation images of 64 x 128."""
    base = tmp_path_factory.getbasetemp()
    # Processes of one test run share the rendering.
    scenes = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "scenes"
    return [
        f"data.root={scenes}",
        "data.train_images=24",
        "data.eval_images=5",
        "data.image_size=[64,128]",
        "data.crop_size=[64,64]",
        "data.train_scale=[128,64]",
        "data.batch_size=4",
        "data.eval_batch_size=2",
        "data.workers=0",
        "schedule.steps=4",
        "schedule.validate_every=2",
        "callbacks.cost_curve.latency=false",
        "tracking.mode=disabled",
        "criterion.class_weights=null",
    ]


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    """A folder to run in; what a run leaves in the environment does not reach the next test."""
    monkeypatch.chdir(tmp_path)
    # What other tests may have left: W&B's is the process that serves theirs, and knows their runs.
    foreign = (run_folder.RUN_NAME, "WANDB_SERVICE")
    environment = {name: value for name, value in os.environ.items() if name not in foreign}
    for name in foreign:
        os.environ.pop(name, None)
    yield tmp_path
    os.environ.clear()
    os.environ.update(environment)


@pytest.fixture
def fails(in_folder, capsys):
    """Run the command line and give back its one line of error."""

    def run(*arguments):
        assert train.main(list(arguments)) == 2
        captured = capsys.readouterr()
        lines = [line for line in captured.err.splitlines() if line.startswith("segtrain: error: ")]
        assert len(lines) == 1
        assert "Traceback" not in captured.err
        return captured.err[captured.err.index(lines[0]) :]

    return run


@pytest.fixture
def start(in_folder):
    """Start the command line, or a script that drives it, in a process of its own."""

    def run(*arguments, script="train.py", check=True, timeout=280, **environment):
        path = ROOT / script if script == "train.py" else in_folder / script
        return subprocess.run(
            [sys.executable, str(path), *arguments],
            cwd=in_folder,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment,
            capture_output=True,
            text=True,
            check=check,
            timeout=timeout,
        )

    return run
