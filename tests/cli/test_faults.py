"""What happens to a run that is told to stop, that diverges, or whose disk is full or damaged."""

import copy
import json
import math
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import run_folder
import train
from segtrain.training import SegmentationModule

#: Validated and written every second step, and nothing drawn.
STEPS = [
    "schedule.steps=6",
    "schedule.validate_every=2",
    "callbacks.checkpoints.every=2",
    "callbacks.cost_curve.settings=[]",
    "~callbacks.pictures",
    "~callbacks.report",
]


def rows(run, name="curve.jsonl"):
    lines = Path("runs", run, name).read_text().splitlines()
    return [json.loads(line) for line in lines]


def load(path):
    return torch.load(path, weights_only=True)


def weights(run, name="last.ckpt"):
    return load(f"runs/{run}/checkpoints/{name}")["state_dict"]


def assert_equal(state, other):
    assert state.keys() == other.keys()
    for name, value in state.items():
        assert torch.equal(value, other[name]), name


def said(text):
    """The lines on stderr that are ours, without torch's advice on the memory of gradients."""
    ours = [line for line in text.splitlines() if line.startswith("segtrain: ")]
    return [line for line in ours if "Grad strides" not in line]


def before_step(monkeypatch, act, of="training_step"):
    """Have ``act(module, batch, batch_index)`` run before each step of training or validation."""
    original = getattr(SegmentationModule, of)

    def step(self, batch, batch_index):
        act(self, batch, batch_index)
        return original(self, batch, batch_index)

    monkeypatch.setattr(SegmentationModule, of, step)


@pytest.fixture(scope="module")
def uninterrupted(small, tmp_path_factory):
    """Weights and curve of a run of six steps that was left alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("uninterrupted"))
        assert train.main([*small, *STEPS, "name=run"]) == 0
        patch.delenv(run_folder.RUN_NAME)
        return weights("run"), rows("run")


# Damaged files


def test_a_run_goes_on_from_the_checkpoint_before_a_truncated_one(
    small, uninterrupted, in_folder, capsys
):
    assert train.main([*small, *STEPS, "name=run"]) == 0
    last = Path("runs/run/checkpoints/last.ckpt")
    last.write_bytes(last.read_bytes()[:-5000])
    capsys.readouterr()
    assert train.main(["resume=runs/run"]) == 0
    (line,) = said(capsys.readouterr().err)
    assert "runs/run/checkpoints/last.ckpt is damaged" in line
    assert load(last)["global_step"] == 6
    # What was damaged has not taken the place of what is whole.
    assert load("runs/run/checkpoints/previous.ckpt")["global_step"] == 4
    assert_equal(weights("run"), uninterrupted[0])
    assert rows("run") == uninterrupted[1]


# A full disk


@pytest.fixture
def small_disk(in_folder):
    """A disk at runs/ with the given room."""
    mounted = in_folder / "runs"
    mounted.mkdir()

    def mount(size):
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(mounted)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            pytest.skip(f"no small disk can be mounted: {done.stderr.strip()}")

    yield mount
    subprocess.run(["umount", str(mounted)], capture_output=True)


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(
    small, uninterrupted, small_disk, monkeypatch, capsys
):
    def make_room(module, batch, batch_index):
        if module.trainer.global_step == 5:
            Path("runs/filler").unlink()

    before_step(monkeypatch, make_room)
    size = 6_500_000  # somewhat more than a checkpoint
    small_disk(4 * size)
    Path("runs/filler").write_bytes(bytes(3 * size // 2))
    arguments = [*small, *STEPS, "schedule.validate_every=6", "callbacks.checkpoints.every=1"]
    whole = []

    def look(module, batch, batch_index):
        folder = Path("runs/run/checkpoints")
        whole.append({p.name: load(p)["global_step"] for p in sorted(folder.iterdir())})

    before_step(monkeypatch, look)
    assert train.main([*arguments, "name=run"]) == 0
    lines = said(capsys.readouterr().err)
    assert lines == [
        f"segtrain: warning: checkpoint at step {step} could not be written (No space left on "
        "device); runs/run/checkpoints/last.ckpt is of step 2"
        for step in (3, 4, 5)
    ]
    kept = {"last.ckpt": 2, "previous.ckpt": 1}
    assert whole == [{}, {"last.ckpt": 1}, kept, kept, kept, kept]
    assert load("runs/run/checkpoints/previous.ckpt")["global_step"] == 2
    assert_equal(weights("run"), uninterrupted[0])


# Signals


@pytest.mark.parametrize(
    ("number", "where", "step", "validated"),
    [
        (signal.SIGTERM, "training_step", 2, 2),  # the third of six: no validation
        (signal.SIGUSR1, "training_step", 3, 4),  # the fourth: a validation follows it
        (signal.SIGTERM, "validation_step", 4, 4),
        (signal.SIGTERM, "validation_step", 0, 0),  # that before the first step
    ],
)
def test_a_signal_stops_the_run_with_a_checkpoint(
    small, uninterrupted, in_folder, monkeypatch, capsys, number, where, step, validated
):
    def send(module, batch, batch_index):
        if module.trainer.global_step == step and batch_index in (0, step):
            os.kill(os.getpid(), number)

    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    with monkeypatch.context() as patch:
        before_step(patch, send, where)
        assert train.main([*small, *STEPS, "name=run"]) == 128 + number
    stopped_at = step + (where == "training_step")
    (line,) = said(capsys.readouterr().err)
    assert line == (
        f"segtrain: stopped by {number.name} at step {stopped_at}; resume=runs/run goes on with it"
    )
    after = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)]
    assert after == handlers
    last = Path("runs/run/checkpoints/last.ckpt")
    assert (load(last)["global_step"] if last.exists() else 0) == stopped_at
    scored = {row["step"] for row in rows("run")} if validated else set()
    assert scored == set(range(2, validated + 1, 2))
    assert train.main(["resume=runs/run"]) == 0
    assert_equal(weights("run"), uninterrupted[0])
    assert rows("run") == uninterrupted[1]


def test_slurm_is_not_asked_to_requeue_the_job(small, in_folder, monkeypatch):
    """Lightning would, from within a step; the script that started the job does."""
    job = {"NTASKS": 1, "JOB_ID": 12345, "JOB_NAME": "run", "PROCID": 0, "LOCALID": 0, "NODEID": 0}
    for name, value in job.items():
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    scontrol = in_folder / "scontrol"
    scontrol.write_text(f"#!/bin/sh\ntouch {in_folder}/requeued\n")
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{in_folder}:{os.environ['PATH']}")

    def send(module, batch, batch_index):
        if module.trainer.global_step == 2:
            os.kill(os.getpid(), signal.SIGUSR1)

    before_step(monkeypatch, send)
    assert train.main([*small, *STEPS, "name=run"]) == 138
    assert not Path("requeued").exists()
    assert load("runs/run/checkpoints/last.ckpt")["global_step"] == 3


def test_the_end_of_a_training_is_no_stop(small, in_folder, monkeypatch):
    def send(module, batch, batch_index):
        if module.trainer.global_step == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    before_step(monkeypatch, send)
    arguments = ["schedule.steps=2", "schedule.validate_every=2", "name=run"]
    assert train.main([*small, *arguments]) == 0
    assert {row["step"] for row in rows("run")} == {2}


# Real processes. They are forked from one that has imported everything, which takes seconds.

_processes = multiprocessing.get_context("forkserver")


def _run(arguments, folder, environment, faults):
    os.setsid()
    os.chdir(folder)
    # Whoever started the tests in the background had it ignored.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.update(environment)
    rank = environment.get("RANK", "0")
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}-{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    torch.set_num_threads(1)

    def act(module, batch, batch_index):
        for fault in faults:
            if (fault["step"], str(fault.get("rank", 0))) != (module.trainer.global_step, rank):
                continue
            for number in fault.get("group_signals", ()):
                os.killpg(0, number)
            for number in fault.get("signals", ()):
                os.kill(os.getpid(), number)
                time.sleep(fault.get("pause", 0))
            if "poison" in fault:
                batch["image"][0, 0, 0, 0] = fault["poison"]
                Path("poisoned.txt").write_text(", ".join(batch["name"]))

    with pytest.MonkeyPatch.context() as patch:
        before_step(patch, act)
        sys.exit(train.main(arguments))


@pytest.fixture
def processes(in_folder):
    """Run the command line in processes; gives their exit statuses, and what rank 0 said."""
    _processes.set_forkserver_preload([__name__, "callbacks", "data"])

    def run(*arguments, faults, count=1):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        started = []
        for rank in range(count):
            environment = {}
            if count > 1:  # as torchrun sets it
                environment = {
                    "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": count,
                    "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
                    "TORCHELASTIC_RUN_ID": "faults",
                }  # fmt: skip
            environment = {name: str(value) for name, value in environment.items()}
            where = (list(arguments), in_folder, environment, faults)
            started.append(_processes.Process(target=_run, args=where))
        for process in started:
            process.start()
        for process in started:
            process.join(200)
        return [process.exitcode for process in started], said(Path("err-0.txt").read_text())

    return run


def test_all_processes_of_a_job_are_signalled(small, uninterrupted, in_folder, processes):
    """As SLURM does; the worker that loads data is one of them."""
    arguments = [*small, *STEPS, "name=run", "data.workers=1"]
    everybody = [signal.SIGUSR1, signal.SIGTERM]
    # A launcher that is one of them passes it on.
    fault = {"step": 2, "group_signals": everybody, "signals": [signal.SIGTERM]}
    statuses, lines = processes(*arguments, faults=[fault])
    assert statuses == [138]
    assert lines == ["segtrain: stopped by SIGUSR1 at step 3; resume=runs/run goes on with it"]
    assert train.main(["resume=runs/run"]) == 0
    assert_equal(weights("run"), uninterrupted[0])


@pytest.mark.parametrize(
    ("signals", "status", "expected"),
    [
        ([signal.SIGTERM, signal.SIGTERM], -signal.SIGTERM, []),
        ([signal.SIGINT], 130, ["segtrain: interrupted; resume=runs/run goes on with it"]),
    ],
)
def test_a_second_sigterm_or_ctrl_c_ends_the_process_at_once(
    small, in_folder, processes, signals, status, expected
):
    arguments = [*small, *STEPS, "name=run"]
    statuses, lines = processes(*arguments, faults=[{"step": 3, "signals": signals, "pause": 1.1}])
    assert statuses == [status]
    assert lines == expected
    assert load("runs/run/checkpoints/last.ckpt")["global_step"] == 2


def test_two_ranks_skip_and_stop_together(small, in_folder, processes):
    """What happens to rank 1 alone concerns both."""
    arguments = [*small, *STEPS, "trainer.accelerator=cpu", "trainer.devices=2", "name=run"]
    arguments += ["trainer.sync_batchnorm=false", "nonfinite=skip", "schedule.log_every=1"]
    faults = [
        {"step": 1, "rank": 1, "poison": math.nan},
        {"step": 2, "rank": 1, "signals": [signal.SIGUSR1]},
    ]
    statuses, lines = processes(*arguments, faults=faults, count=2)
    assert statuses == [138, 0]
    poisoned = Path("poisoned.txt").read_text()
    assert lines == [
        f"segtrain: warning: the loss of step 2 is nan ({poisoned}) on rank 1: the step is skipped",
        "segtrain: stopped by SIGUSR1 at step 3; resume=runs/run goes on with it",
    ]
    checkpoint = load("runs/run/checkpoints/last.ckpt")
    assert checkpoint["global_step"] == 3
    assert checkpoint["skipped_steps"] == 1
    state = checkpoint["optimizer_states"][0]["state"]
    assert {int(values["step"]) for values in state.values()} == {2}
    assert said(Path("err-1.txt").read_text()) == []

    faults = [{"step": 3, "rank": 1, "poison": math.inf}]
    statuses, lines = processes("resume=runs/run", "nonfinite=stop", faults=faults, count=2)
    assert statuses == [3, 0]
    poisoned = Path("poisoned.txt").read_text()
    assert lines == [
        f"segtrain: the loss of step 4 is nan ({poisoned}) on rank 1; "
        "runs/run/checkpoints/last.ckpt is of step 3"
    ]
    assert load("runs/run/checkpoints/last.ckpt")["global_step"] == 3


# Losses that are not finite


@pytest.mark.parametrize(
    ("step", "arguments", "last_good"),
    [
        (2, [], 2),  # found one step later
        (3, [], 2),  # found before the validation
        (5, ["schedule.validate_every=3"], 4),  # the last one, found before the last validation
        (2, ["callbacks.checkpoints.every=1"], 2),  # found before the checkpoint
        (2, ["trainer.accumulate_grad_batches=2", "trainer.precision=bf16-mixed"], 2),
    ],
)
def test_a_loss_that_is_not_finite_stops_the_run(
    small, in_folder, monkeypatch, capsys, step, arguments, last_good
):
    names = []

    def poison(module, batch, batch_index):
        if module.trainer.global_step == step and not names:
            names.extend(batch["name"])
            batch["image"][:] = math.nan

    before_step(monkeypatch, poison)
    assert train.main([*small, *STEPS, "name=run", *arguments]) == 3
    (line,) = said(capsys.readouterr().err)
    assert line == (
        f"segtrain: the loss of step {step + 1} is nan ({', '.join(names)}); "
        f"runs/run/checkpoints/last.ckpt is of step {last_good}"
    )
    for path in Path("runs/run/checkpoints").iterdir():
        assert load(path)["global_step"] <= last_good
        assert all(v.isfinite().all() for v in load(path)["state_dict"].values())


def test_weights_that_are_not_finite_are_not_saved(small, in_folder, monkeypatch, capsys):
    """A gradient may be NaN where the loss is not."""

    def spoil(self):
        if self.trainer.global_step == 1:
            next(self.network.parameters()).grad[0] = math.nan

    monkeypatch.setattr(SegmentationModule, "on_after_backward", spoil)
    assert train.main([*small, *STEPS, "callbacks.checkpoints.every=1", "name=run"]) == 3
    (line,) = said(capsys.readouterr().err)
    assert line == (
        "segtrain: the weights after step 2 are not finite; "
        "runs/run/checkpoints/last.ckpt is of step 1"
    )


@pytest.mark.parametrize(
    ("what", "arguments"),
    [
        ("image", []),
        ("gradient", []),
        ("image", ["trainer.accumulate_grad_batches=2", "trainer.precision=bf16-mixed"]),
        ("image", ["trainer.gradient_clip_val=1.0"]),
    ],
)
def test_a_skipped_step_contributes_nothing(small, in_folder, monkeypatch, capsys, what, arguments):
    arguments = [*small, *STEPS, "nonfinite=skip", "schedule.log_every=1", *arguments]

    def poison(module, batch, batch_index):
        if what == "image" and module.trainer.global_step == 3:
            batch["image"][0, 0, 0, 0] = math.inf

    def spoil(module):
        if what == "gradient" and module.trainer.global_step == 3:
            next(module.network.parameters()).grad[0] = math.nan

    with monkeypatch.context() as patch:
        before_step(patch, poison)
        patch.setattr(SegmentationModule, "on_after_backward", spoil)
        assert train.main([*arguments, "name=skipped"]) == 0
        (line,) = said(capsys.readouterr().err)
        assert "step 4 is" in line
        assert line.endswith(": the step is skipped")
        patch.delenv(run_folder.RUN_NAME)

    kept = {}

    def keep(module, batch, batch_index):
        if module.trainer.global_step == 3 and not kept:
            kept["network"] = copy.deepcopy(module.network.state_dict())
            kept["optimizer"] = copy.deepcopy(module.optimizers().optimizer.state_dict())

    original = SegmentationModule.optimizer_step

    def undo(self, epoch, batch_index, optimizer, closure):
        original(self, epoch, batch_index, optimizer, closure)
        if self.trainer.global_step == 3:
            self.network.load_state_dict(kept["network"])
            optimizer.optimizer.load_state_dict(kept["optimizer"])

    before_step(monkeypatch, keep)
    monkeypatch.setattr(SegmentationModule, "optimizer_step", undo)
    assert train.main([*arguments, "name=undone"]) == 0
    assert_equal(weights("skipped"), weights("undone"))
    counts = [row.get("train/skipped_steps") for row in rows("skipped", "metrics.jsonl")]
    assert [count for count in counts if count is not None] == [0, 0, 0, 1, 1, 1]
    assert load("runs/skipped/checkpoints/last.ckpt")["skipped_steps"] == 1


def test_the_word_is_checked(fails):
    assert "did you mean 'skip'" in fails("nonfinite=skp")
