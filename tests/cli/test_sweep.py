"""Sweeps: workers that share a study, die and come back; and trainings that are its trials."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import optuna
import pytest
import yaml
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

import sweep
import train
from pages import unpack
from tuning.page import print_table, write_report
from tuning.storage import open_storage
from tuning.study import (
    LOST,
    PATIENCE,
    RETRY_OF,
    SURPLUS,
    WORKER,
    Lives,
    claim,
    counting,
    give_back,
    is_due,
    open_study,
    retry_lost,
    sign_of_life,
)
from tuning.sweep_file import Parameter, check_parameters, read_sweep
from tuning.trial import RESULT, TRIAL, TrialAddress

ROOT = Path(train.__file__).parent
RATE = {"optimizer.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-1, "log": True}}

#: Stands in for train.py where workers are tested: a process of its own with the same arguments,
#: the same folder and a result, in a tenth of a second. Once four trainings have been started, one
#: with HANG waits for its worker to die, and one with LET_HANG until another does so.
TRAINING = """
import json, os, sys, time
from pathlib import Path
from tuning.trial import RESULT, TRIAL, TrialAddress

arguments = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
address = TrialAddress.from_text(os.environ[TRIAL])
if "resume" in arguments:
    folder = Path(arguments["resume"])
    rate = json.loads((folder / "config.yaml").read_text())
else:
    folder = Path("runs") / arguments["name"]
    (folder / "checkpoints").mkdir(parents=True)
    rate = float(arguments["optimizer.learning_rate"])
    (folder / "config.yaml").write_text(json.dumps(rate))
    (folder / "checkpoints" / "last.ckpt").touch()

def note(file):
    with open(file, "a") as notes:
        notes.write(f"{rate} {'resumed' if 'resume' in arguments else 'fresh'}\\n")

note("started")
if "SHOW" in os.environ:
    Path("environment").write_text(" ".join(os.environ))
late = len(Path("started").read_text().splitlines()) >= 4
if "HANG" in os.environ and late:
    Path("hangs").write_text(str(rate))
    os.read(address.lifeline, 1)
    sys.exit(1)
while "LET_HANG" in os.environ and late and not Path("hangs").exists():
    time.sleep(0.05)
if "FAIL" in os.environ:
    print("step 1")
    sys.exit("segtrain: error: out of luck")
note("finished")
result = {"best/mIoU": rate, "cost/gmacs": 1 / rate, "pruned": False, "step": 4}
(folder / RESULT).write_text(json.dumps(result))
"""
WORKER_PROCESS = """
import sys
import train
train.__file__ = sys.argv[1]
import sweep
sys.exit(sweep.main(sys.argv[2:]))
"""


def write_sweep(folder, name="tiny", **values):
    folder = folder / "sweep"
    folder.mkdir(exist_ok=True)
    described = {"objectives": {"best/mIoU": "maximize"}, "parameters": RATE, "sampler": "random"}
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(described | values, sort_keys=False))


@pytest.fixture
def configs(tmp_path, monkeypatch):
    """The shipped configurations with sweeps of the test's own."""
    folder = tmp_path / "configs"
    folder.mkdir()
    for shipped in (ROOT / "configs").iterdir():
        if shipped.name != "sweep":
            (folder / shipped.name).symlink_to(shipped)
    monkeypatch.setattr(train, "CONFIGS", folder)
    return folder


@pytest.fixture
def start_worker(in_folder):
    """Start a worker whose trainings are TRAINING."""
    (in_folder / "training.py").write_text(TRAINING)
    (in_folder / "worker.py").write_text(WORKER_PROCESS)
    workers = []

    def start(*arguments, **environment):
        worker = subprocess.Popen(
            [sys.executable, "worker.py", "training.py", "sweep=learning_rate", *arguments],
            env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        workers.append(worker)
        return worker

    yield start
    for worker in workers:
        if worker.poll() is None:
            worker.kill()
        worker.communicate()


def wait_for(path, timeout=120):
    end = time.monotonic() + timeout
    while not Path(path).exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.05)


def load(storage="sweeps/learning_rate/journal.log", name="learning_rate"):
    return optuna.load_study(study_name=name, storage=open_storage(storage))


def rates(file):
    return [line.split()[0] for line in Path(file).read_text().splitlines()]


@pytest.mark.parametrize(
    "storage", ["sweeps/learning_rate/journal.log", "sqlite:///study.db"], ids=["journal", "sqlite"]
)
def test_two_workers_share_ten_trials_and_one_is_killed(start_worker, storage):
    arguments = ["n_trials=10", f"storage={storage}"]
    doomed = start_worker(*arguments, HANG="1")
    # A worker that is ahead must not take all trials before the other has its first.
    other = start_worker(*arguments, LET_HANG="1")
    wait_for("hangs")
    doomed.kill()
    doomed.communicate()
    output, errors = other.communicate(timeout=120)
    assert other.returncode == 0, errors

    study = load(storage)
    complete = [t for t in study.trials if t.state.name == "COMPLETE"]
    assert len(complete) == len(counting(study.trials)) == 10
    assert Counter(rates("finished")) == Counter(str(t.value) for t in complete)
    assert set(Counter(rates("finished")).values()) == {1}
    # The lost trial went on where it was, in the run of its second attempt.
    lost = Path("hangs").read_text()
    assert f"{lost} resumed" in Path("finished").read_text().splitlines()
    retried = next(t for t in complete if RETRY_OF in t.user_attrs)
    assert str(retried.value) == lost
    assert not Path(f"runs/learning_rate-{retried.user_attrs[RETRY_OF]}").exists()
    assert Path(f"runs/learning_rate-{retried.number}").exists()
    assert "10 complete" in output


def test_a_stopped_worker_gives_its_trial_back_and_the_same_command_goes_on(start_worker):
    stopped = start_worker("n_trials=6", HANG="1")
    wait_for("hangs")
    stopped.send_signal(signal.SIGTERM)
    output, errors = stopped.communicate(timeout=60)
    assert stopped.returncode == 128 + signal.SIGTERM
    assert "given back" in output
    assert errors == "segtrain: stopped; the same command goes on\n"

    assert start_worker("n_trials=6").wait(60) == 0
    assert len(rates("finished")) == len(set(rates("finished"))) == 6
    lost = Path("hangs").read_text()
    assert f"{lost} resumed" in Path("finished").read_text().splitlines()
    # Complete, then more of it.
    assert start_worker("n_trials=6").wait(60) == 0
    assert len(rates("finished")) == 6
    assert start_worker("n_trials=7").wait(60) == 0
    assert len(set(rates("finished"))) == 7
    page = Path("sweeps/learning_rate/report.html").read_text()
    number = max(t.number for t in load().trials)
    assert f'href="../../runs/learning_rate-{number}/report.html"' in page
    assert "7 complete" in page


def test_a_trial_is_not_a_rank_of_the_job_that_its_worker_runs_in(start_worker):
    job = {"SLURM_NTASKS": "4", "SLURM_PROCID": "3", "WORLD_SIZE": "4", "SEGTRAIN_RUN_NAME": "x"}
    assert start_worker("n_trials=1", SHOW="1", **job).wait(60) == 0
    assert not job.keys() & set(Path("environment").read_text().split())


def test_trainings_that_all_fail_stop_the_worker(start_worker):
    worker = start_worker("n_trials=9", FAIL="1")
    _, errors = worker.communicate(timeout=60)
    assert worker.returncode == 2
    assert errors.startswith("segtrain: error: 3 trials in a row failed, at last: out of luck (")
    assert errors.count("\n") == 1
    assert [t.state.name for t in load().trials] == ["FAIL"] * 3


@pytest.fixture
def study(configs):
    write_sweep(configs)
    return open_study(read_sweep("tiny", configs), "tiny", str(configs / "journal.log"))


def claim_from(study, configs, n_trials):
    return claim(study, read_sweep("tiny", configs), n_trials)


def test_of_trials_made_at_once_the_first_count(study, configs):
    running = [claim_from(study, configs, 3) for _ in range(3)]
    assert claim_from(study, configs, 3) is None
    late = study.ask()  # by a worker that counted before the third was made
    assert not is_due(study.trials, late.number, 3)
    late.set_user_attr(SURPLUS, True)
    study.tell(late, state=optuna.trial.TrialState.FAIL)
    assert [t.number for t in counting(study.trials)] == [t.number for t in running]
    assert claim_from(study, configs, 4).number == 4


def test_of_two_retries_the_first_counts(study, configs):
    trial = claim_from(study, configs, 1)
    give_back(study, trial, losses=1)
    retry_lost(study, Lives(), 1)
    study.enqueue_trial(trial.params, user_attrs={RETRY_OF: trial.number})  # a second worker's
    again = claim_from(study, configs, 1)
    assert again.params == trial.params
    assert claim_from(study, configs, 1) is None
    assert [t.number for t in counting(study.trials)] == [again.number]
    assert study.trials[2].user_attrs[SURPLUS]


def test_who_was_taken_for_dead_cannot_report_any_more(study, configs):
    asleep = claim_from(study, configs, 1)
    give_back(study, study.trials[asleep.number], losses=1)
    with pytest.raises((ValueError, optuna.exceptions.UpdateFinishedTrialError)):
        study.tell(asleep, 0.9)
    give_back(study, asleep, losses=1)  # nothing to give back, and no error


def test_a_trial_that_kills_its_workers_is_not_tried_for_ever(study, configs):
    for loss in (1, 2, 3):
        trial = claim_from(study, configs, 1)
        give_back(study, trial, losses=loss)
        retry_lost(study, Lives(), 1)
    assert claim_from(study, configs, 1) is None
    assert len(study.trials) == 3


def test_a_worker_lives_while_it_shows_signs_of_it(study):
    trial, lives = study.ask(), Lives()

    def seen():
        return study.trials[trial.number]

    # Another machine's: by the changes of its sign, not by its clock.
    trial.set_user_attr(WORKER, sign_of_life(0) | {"machine": "elsewhere"})
    assert not lives.is_lost(seen(), now=0)
    assert not lives.is_lost(seen(), now=PATIENCE - 1)
    trial.set_user_attr(WORKER, sign_of_life(1) | {"machine": "elsewhere"})
    assert not lives.is_lost(seen(), now=PATIENCE + 1)
    assert lives.is_lost(seen(), now=2 * PATIENCE + 2)
    # This machine's: by its processes.
    trial.set_user_attr(WORKER, sign_of_life(2) | {"pid": os.getppid()})
    assert not lives.is_lost(seen(), now=0)
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    trial.set_user_attr(WORKER, sign_of_life(2) | {"pid": gone.pid})
    assert lives.is_lost(seen(), now=0)
    # Never shown at all.
    silent = study.ask()
    assert not lives.is_lost(study.trials[silent.number], now=0)
    assert lives.is_lost(study.trials[silent.number], now=PATIENCE + 1)


def test_a_study_keeps_its_parameters(study, configs):
    write_sweep(configs, parameters=RATE | {"seed": {"type": "int", "low": 0, "high": 9}})
    with pytest.raises(train.UserError, match="begun with other parameters: name=NAME"):
        open_study(read_sweep("tiny", configs), "tiny", str(configs / "journal.log"))


def charts_of(page):
    return unpack(re.search('id="data-charts">([^<]*)<', page).group(1))


def test_the_page_and_the_table_show_the_front(configs, in_folder, capsys):
    objectives = {"best/mIoU": "maximize", "cost/gmacs": "minimize"}
    widths = {"+model.widths": {"type": "categorical", "choices": [[8, 16], [16, 32]]}}
    write_sweep(configs, objectives=objectives, parameters=RATE | widths)
    described = read_sweep("tiny", configs)
    study = open_study(described, "tiny", "journal.log")
    for values in ((0.5, 1.0), (0.4, 2.0), (0.7, 3.0)):
        study.tell(claim(study, described, 9), values)
    claim(study, described, 9)
    charts = charts_of(write_report(study, described, in_folder).read_text())
    dots, front = charts["front"]["data"]
    assert list(zip(dots["x"], dots["y"], strict=True)) == [(1.0, 0.5), (2.0, 0.4), (3.0, 0.7)]
    assert list(zip(front["x"], front["y"], strict=True)) == [(1.0, 0.5), (3.0, 0.7)]
    labels = [d["label"] for d in charts["parameters"]["data"][0]["dimensions"]]
    assert labels == ["optimizer.learning_rate", "+model.widths", "best/mIoU"]
    print_table(study, described)
    printed = capsys.readouterr().out
    assert "tiny: 3 complete, 1 running" in printed
    assert [line.split()[1] for line in printed.splitlines() if "front" in line] == ["2", "0"]


def test_the_page_of_a_study_without_results(study, configs):
    described = read_sweep("tiny", configs)
    assert "no trial yet" in write_report(study, described, configs).read_text().lower()
    study.tell(claim_from(study, configs, 2), state=optuna.trial.TrialState.PRUNED)
    assert "1 pruned" in write_report(study, described, configs).read_text()
    print_table(study, described)


# Trainings


@pytest.fixture
def as_trial(in_folder, configs, monkeypatch):
    """Make the next training of this process a trial; gives the study back."""

    def prepare(**values):
        write_sweep(configs, **values)
        described = read_sweep("tiny", configs)
        opened = open_study(described, "tiny", "journal.log")
        for accuracy in (0.97, 0.98):
            if described.pruning is not None:
                poor = study_trial(opened)
                for step in (2, 4):
                    poor.report(accuracy, step)
                opened.tell(poor, accuracy)
        trial = study_trial(opened)
        address = TrialAddress("tiny", "journal.log", trial._trial_id, described.pruning)
        monkeypatch.setenv(TRIAL, address.text())
        return opened, trial

    def study_trial(opened):
        return opened.ask({"optimizer.learning_rate": Parameter("x", "float", 0, 1).distribution()})

    return prepare


def test_a_poor_training_is_pruned(as_trial, small):
    study, trial = as_trial(pruning={"startup_trials": 1, "warmup_steps": 0})
    assert train.main([*small, "schedule.steps=6", "name=tiny-2"]) == 0
    result = json.loads(Path("runs/tiny-2", RESULT).read_text())
    assert (result["pruned"], result["step"]) == (True, 2)
    assert study.trials[2].intermediate_values == {2: pytest.approx(result["val/mIoU"])}
    assert trial.number == 2


def test_a_training_leaves_what_two_objectives_need(as_trial, small):
    study, trial = as_trial(objectives={"best/mIoU": "maximize", "cost/gmacs": "minimize"})
    assert train.main([*small, "name=tiny-0"]) == 0
    result = json.loads(Path("runs/tiny-0", RESULT).read_text())
    assert (result["pruned"], result["step"]) == (False, 4)
    curve = Path("runs/tiny-0/curve.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in curve]
    full = [row["mIoU"] for row in rows if row["training_setting"]]
    assert result["best/mIoU"] == pytest.approx(max(full))
    assert result["cost/gmacs"] == rows[0]["cost"]["gmacs"] == result["cost/gmacs/full"]
    assert study.trials[trial.number].intermediate_values == {}


# Configurations


@pytest.mark.parametrize("name", ["learning_rate", "cost"])
def test_shipped_sweeps_are_possible(name, capsys):
    assert sweep.main(["--help"]) == 0
    assert re.search(rf"^  {name} +[A-Z]\w+ ", capsys.readouterr().out, re.MULTILINE)
    described = read_sweep(name, train.CONFIGS)
    assert check_parameters(described, described.overrides, train.CONFIGS)["task"] == "fit"


NUMBER = {"type": "float", "low": 0.1, "high": 0.2}


@pytest.mark.parametrize(
    ("values", "parts"),
    [
        ({"objective": {}}, ["tiny.yaml", "objective", "did you mean 'objectives'"]),
        ({"objectives": {"best/miou": "maximize"}}, ["did you mean 'best/mIoU'"]),
        ({"objectives": {"best/mIoU": "max"}}, ["objectives.best/mIoU", "maximize"]),
        ({"objectives": {}}, ["one or two", "got 0"]),
        ({"sampler": "tpee"}, ["did you mean 'tpe'"]),
        ({"n_trials": 0}, ["n_trials", "above 0"]),
        ({"overrides": "schedule.steps=3"}, ["overrides", "list"]),
        ({"overrides": ["schedule.stepz=3"]}, ["schedule.stepz", "did you mean 'steps'"]),
        ({"parameters": {}}, ["nothing to search"]),
        ({"parameters": {"seed": 3}}, ["parameters.seed", "key: value"]),
        ({"parameters": {"seed": {"type": "integer"}}}, ["did you mean 'int'"]),
        ({"parameters": {"seed": NUMBER | {"hihg": 1}}}, ["hihg", "did you mean 'high'"]),
        ({"parameters": {"optimizer.lr": NUMBER}}, ["unknown key 'optimizer.lr'"]),
        ({"parameters": {"seed": NUMBER}}, ["seed", "whole number"]),
        ({"parameters": {"seed": NUMBER | {"low": 0.3}}}, ["low=0.3 is not below high=0.2"]),
        ({"parameters": {"seed": NUMBER | {"low": "x"}}}, ["parameters.seed.low", "a number"]),
        ({"parameters": {"seed": NUMBER | {"low": 0, "log": True}}}, ["above 0, not at 0"]),
        ({"parameters": {"seed": NUMBER | {"step": 0.5}}}, ["step=0.5 does not fit"]),
        ({"parameters": {"seed": {"type": "categorical", "choices": []}}}, ["list of values"]),
        ({"parameters": {"model": {"type": "categorical", "choices": ["b0"]}}}, ["no model", "b0"]),
        (
            {"pruning": {}, "objectives": {"best/mIoU": "maximize", "cost/gmacs": "minimize"}},
            ["pruning", "one objective"],
        ),
    ],
)
def test_what_a_sweep_file_cannot_mean(configs, in_folder, capsys, values, parts):
    write_sweep(configs, **values)
    assert sweep.main(["sweep=tiny", *([] if "n_trials" in values else ["n_trials=1"])]) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in ["segtrain: error: ", *parts]:
        assert part in message
    assert not Path("sweeps").exists()


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ([], ["sweep=NAME", "cost, learning_rate"]),
        (["sweep=learning_rat"], ["did you mean 'learning_rate'"]),
        (["sweep=cost", "n_trials=many"], ["n_trials", "many"]),
        (["sweep=cost", "engine=ray"], ["engine", "optuna, wandb"]),
        (["sweep=cost", "optimizer.learning_rate=1"], ["searched by the sweep cost"]),
        (["sweep=cost", "trainer.num_nodes=2"], ["one machine"]),
        (["sweep=cost", "task=validate"], ["trains from the start"]),
        (["sweep=cost", "weights=nowhere.ckpt"], ["nowhere.ckpt", "no such file"]),
        (["sweep=cost", "storage=/dev/null/x.log"], ["storage=/dev/null/x.log"]),
        (["sweep=cost", "storage=nosql://x"], ["storage=nosql://x"]),
        (["sweep=cost", "storage=nosql://me:secret@x/y"], ["storage=nosql://me:***@x/y"]),
    ],
)
def test_what_the_command_line_cannot_mean(in_folder, capsys, arguments, parts):
    assert sweep.main(arguments) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    for part in parts:
        assert part in message


# Weights & Biases


def test_a_sweep_of_weights_and_biases_runs_by_its_default_command(
    configs, in_folder, capsys, monkeypatch
):
    """Each value reaches train.py as it was meant, through the text that the agent makes of it."""
    for key in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("NETRC", str(in_folder / "netrc"))
    monkeypatch.setenv("HOME", str(in_folder))
    choices = {
        "criterion.class_weights": [None, "balanced"],
        "trainer.sync_batchnorm": [True, False],
        "model.training_setting": [{"isr": [2, 2, 1, 1]}, "full"],
        "+model.widths": [[8, 16, 40, 64]],
        "optimizer.weight_decay": [1e-05],
    }
    parameters = {key: {"type": "categorical", "choices": v} for key, v in choices.items()}
    overrides = ["model=segformer_b0", "schedule.warmup_factor=1e-05", "tracking.notes=None"]
    write_sweep(configs, parameters=RATE | parameters, overrides=overrides, pruning={})
    assert sweep.main(["sweep=tiny", "n_trials=7", "engine=wandb"]) == 0
    described = yaml.safe_load(capsys.readouterr().out)
    assert described["metric"] == {"name": "best/mIoU", "goal": "maximize"}
    assert described["run_cap"] == 7
    assert "command" not in described
    asked = described["parameters"]
    assert asked["optimizer.learning_rate"] == {
        "distribution": "log_uniform_values",
        "min": 1e-4,
        "max": 1e-1,
    }

    drawn = {key: p.get("value", p.get("values", [3e-05])[0]) for key, p in asked.items()}
    args = create_sweep_command_args({"args": {k: {"value": v} for k, v in drawn.items()}})
    command = create_sweep_command()
    assert command[2:] == ["${program}", "${args}"]
    assert train.main([*args["args"], "--cfg"]) == 0
    config = yaml.safe_load(capsys.readouterr().out)
    assert config["criterion"]["class_weights"] is None
    assert config["trainer"]["sync_batchnorm"] is True
    assert config["model"]["name"] == "segformer_b0"
    assert config["model"]["training_setting"] == {"isr": [2, 2, 1, 1]}
    assert config["model"]["widths"] == [8, 16, 40, 64]
    assert float(config["optimizer"]["weight_decay"]) == 1e-05
    assert float(config["optimizer"]["learning_rate"]) == 3e-05
    assert float(config["schedule"]["warmup_factor"]) == 1e-05
    assert config["tracking"]["notes"] is None


# Everything at once


@pytest.mark.slow
def test_two_workers_share_real_trainings_and_one_is_killed(small, in_folder):
    """As above with train.py itself: minutes."""
    arguments = ["sweep=learning_rate", "n_trials=10", *small, "~callbacks.pictures"]
    command = [sys.executable, str(ROOT / "sweep.py"), *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    doomed, other = (
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    )
    while len(list(Path("runs").glob("*/checkpoints"))) < 4:
        time.sleep(0.1)
    doomed.kill()
    doomed.communicate()
    assert other.communicate(timeout=900)[0].count("best/mIoU") >= 5
    assert other.returncode == 0
    study = load()
    ended = [t for t in study.trials if t.state.name in ("COMPLETE", "PRUNED")]
    assert len(ended) == len(counting(study.trials)) == 10
    assert sum(t.user_attrs.get(LOST, False) for t in study.trials) <= 1
    for trial in ended:
        result = json.loads(Path(f"runs/learning_rate-{trial.number}", RESULT).read_text())
        assert trial.value == pytest.approx(result["best/mIoU"])
    assert len({trial.params["optimizer.learning_rate"] for trial in ended}) == 10


@pytest.mark.slow
def test_both_ranks_of_a_pruned_training_stop(as_trial, small, start):
    as_trial(pruning={"startup_trials": 1, "warmup_steps": 0})
    arguments = [*small, "schedule.steps=6", "name=tiny-2", "trainer.accelerator=cpu"]
    start(*arguments, "trainer.devices=2", "trainer.sync_batchnorm=false")
    result = json.loads(Path("runs/tiny-2", RESULT).read_text())
    assert (result["pruned"], result["step"]) == (True, 2)
