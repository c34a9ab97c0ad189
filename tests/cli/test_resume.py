"""Runs that are killed and go on, as if nothing had happened."""

import functools
import json
import os
import random
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

import train
from callbacks.resume import bring_run
from segtrain import UserError
from segtrain.training import PolynomialSchedule
from segtrain.training.module import seed_generators

ROOT = Path(train.__file__).parent
STEPS, VALIDATE_EVERY = 12, 4

SMALL = [
    "data.train_images=10",  # epochs of 2.5 batches
    "data.eval_images=2",
    "data.image_size=[32,64]",
    "data.crop_size=[32,32]",
    "data.train_scale=[64,32]",
    "data.batch_size=4",
    "data.eval_batch_size=1",
    "data.workers=0",
    "+model.widths=[8,8,16,16]",
    "+model.depths=[1,1,1,1]",
    "+model.fuse_width=16",
    "model.drop_path=0.1",
    f"schedule.steps={STEPS}",
    f"schedule.validate_every={VALIDATE_EVERY}",
    "schedule.warmup_steps=3",
    "criterion.class_weights=null",
    "callbacks.cost_curve.settings=[full]",
    "callbacks.cost_curve.latency=false",
    "~callbacks.pictures",
    "~callbacks.report",
    "~callbacks.progress",
    "tracking.mode=disabled",
    "trainer.accelerator=cpu",
    "trainer.deterministic=true",
]


class Forking:
    """The process that runs command lines in forks of itself."""

    def __init__(self, folder):
        self.folder = folder
        self.output = folder / "output.txt"
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("forking.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        )

    def __call__(self, *arguments, processes=1, kill=None):
        """Run; returns the statuses of the processes and what they printed."""
        self.output.write_text("")
        (self.folder / "seen.txt").write_text("")
        job = {
            "arguments": list(arguments),
            "folder": str(self.folder),
            "output": str(self.output),
            "processes": processes,
            "kill": kill,
        }
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline()), self.output.read_text()


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of folders of runs."""
    return tmp_path_factory.mktemp("resumed")


@pytest.fixture(scope="module")
def forked(runs):
    forking = Forking(runs)
    yield forking
    forking.process.stdin.close()
    forking.process.wait()


@pytest.fixture(scope="module")
def start(forked, runs):
    def start(name, *arguments, processes=1, kill=None):
        scenes = f"data.root={runs / 'scenes'}"
        devices = f"trainer.devices={processes}"
        statuses, printed = forked(
            *SMALL, scenes, f"name={name}", devices, *arguments, processes=processes, kill=kill
        )
        if kill is None:
            assert statuses == [0] * processes, printed
        return runs / "runs" / name

    return start


@pytest.fixture(scope="module")
def resume(forked, runs):
    def resume(source, *arguments, processes=1, status=0):
        source = source.relative_to(runs) if isinstance(source, Path) else source
        statuses, printed = forked(f"resume={source}", *arguments, processes=processes)
        assert statuses == [status] * processes, printed
        lines = printed.splitlines()
        if status == 2:
            assert "Traceback" not in printed
            (line,) = [line for line in lines if line.startswith("segtrain: error: ")]
            assert line == lines[-1]
            return line
        return [line for line in lines if line.startswith("resume: ")]

    return resume


@pytest.fixture(scope="module")
def whole(start, runs):
    """The folder of a run that nothing interrupted, by its processes and accumulated batches."""
    folders = {}

    def whole(processes=1, accumulate=1):
        key = (processes, accumulate)
        if key not in folders:
            accumulation = f"trainer.accumulate_grad_batches={accumulate}"
            name = f"whole-{processes}-{accumulate}"
            folders[key] = start(name, accumulation, processes=processes).rename(runs / name)
        return folders[key]

    return whole


def load(folder, name="last.ckpt"):
    return torch.load(folder / "checkpoints" / name, weights_only=True)


def rows(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def assert_same(one, other, place=""):
    """Equal in structure and in every bit of every tensor."""
    assert type(one) is type(other), place
    if isinstance(one, dict):
        assert one.keys() == other.keys(), place
        for key in one:
            assert_same(one[key], other[key], f"{place}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), place
        for index, (left, right) in enumerate(zip(one, other, strict=True)):
            assert_same(left, right, f"{place}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, place
        assert torch.equal(one, other), place
    else:
        assert one == other, place


def assert_same_training(folder, expected, validations=True):
    one, other = load(folder), load(expected)
    assert one["global_step"] == STEPS
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "Scenes"):
        assert_same(one[key], other[key], key)
    if validations:
        assert_same(one["callbacks"], other["callbacks"])
        curves = [
            [(r["step"], r["mIoU"]) for r in rows(f, "curve.jsonl")] for f in (folder, expected)
        ]
        assert curves[0] == curves[1]
    losses = [
        [(r["step"], r["train/loss"]) for r in rows(f, "metrics.jsonl") if "train/loss" in r]
        for f in (folder, expected)
    ]
    assert [step for step, _ in losses[0]] == [step for step, _ in losses[1]]


def draw_points():
    """Twenty moments to be killed at, and with what the run goes on."""
    generator = random.Random(20)
    kinds = ["step"] * 6 + ["after"] * 5 + ["saving"] * 3
    points = (
        [(1, kind) for kind in kinds] + [(2, "step")] * 3 + [(2, "after")] * 2 + [(2, "saving")]
    )
    drawn = []
    for index, (processes, kind) in enumerate(points):
        every = generator.choice([1, 2, 3])
        moment = {
            "step": generator.randrange(STEPS),
            "after": round(generator.uniform(0, 2), 3),
            "saving": generator.randrange(1, STEPS // every),
        }[kind]
        rank = 0 if kind == "saving" else generator.randrange(processes)
        accumulate = 1 if processes == 2 else generator.choice([1, 1, 2])
        workers, others = generator.choices([0, 1, 2], k=2)
        validate_every = generator.choice([VALIDATE_EVERY, VALIDATE_EVERY, 3])
        kill = {"rank": rank, kind: moment}
        case = (processes, accumulate, every, workers, others, validate_every, kill)
        drawn.append(pytest.param(*case, id=f"{index}-{processes}-{kind}-{moment}"))
    return drawn


@pytest.mark.parametrize(
    ("processes", "accumulate", "every", "workers", "others", "validate_every", "kill"),
    draw_points(),
)
def test_killed_anywhere_it_ends_bit_equal(
    start,
    resume,
    whole,
    request,
    processes,
    accumulate,
    every,
    workers,
    others,
    validate_every,
    kill,
):
    folder = start(
        f"killed-{request.node.callspec.id}",
        f"trainer.accumulate_grad_batches={accumulate}",
        f"callbacks.checkpoints.every={every}",
        f"data.workers={workers}",
        processes=processes,
        kill=kill,
    )
    resume(
        folder,
        f"data.workers={others}",
        f"schedule.validate_every={validate_every}",
        processes=processes,
    )
    same_validations = validate_every == VALIDATE_EVERY
    assert_same_training(folder, whole(processes, accumulate), same_validations)


@pytest.fixture(scope="module")
def stopped(start, runs):
    """A copy of a run that was killed at step 9, with a checkpoint after every third step kept."""
    options = ("callbacks.checkpoints.every=3", "callbacks.checkpoints.keep=-1")
    original = start("stopped", *options, kill={"rank": 0, "step": 9}).rename(runs / "stopped")
    copies = iter(range(100))

    def stopped():
        return shutil.copytree(original, runs / "runs" / f"copy-{next(copies)}")

    return stopped


def test_overrides_win_and_only_what_differs_is_listed(resume, stopped):
    folder = stopped()
    printed = resume(
        folder,
        "schedule.steps=16",
        "optimizer.learning_rate=0.001",
        "optimizer.weight_decay=0",
        "schedule.log_every=1",
        "data.workers=0",
        "~callbacks.cost_curve",
    )
    curve = {"settings": ["full"], "every": 1, "limit_batches": None}
    curve |= {"latency": False, "cost_images": 16}
    assert printed == [
        "resume: optimizer.learning_rate 0.006 -> 0.001, optimizer.weight_decay 0.01 -> 0.0, "
        "schedule.steps 12 -> 16, schedule.log_every 10 -> 1, "
        f"callbacks.cost_curve {json.dumps(curve)} -> (not there)",
        f"resume: runs/{folder.name} goes on from step 9 of 16 (last.ckpt)",
    ]
    schedule = PolynomialSchedule(steps=16, warmup_steps=3)
    logged = [r for r in rows(folder, "metrics.jsonl") if "train/learning_rate" in r]
    rates = {r["step"]: r["train/learning_rate"] for r in logged if r["step"] > 9}
    assert rates == {step: pytest.approx(0.001 * schedule(step)) for step in range(10, 17)}
    groups = load(folder)["optimizer_states"][0]["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert resume(folder) == [
        f"resume: runs/{folder.name} has all its 16 steps; schedule.steps=N makes it longer"
    ]


@pytest.mark.parametrize(
    ("processes", "arguments", "line"),
    [
        ((2, 1), [], "2 processes before, 1 now: a step takes 4 images instead of 8"),
        ((1, 2), [], "1 process before, 2 now: a step takes 8 images instead of 4"),
        ((1, 1), ["trainer.accumulate_grad_batches=2"], "a step takes 8 images instead of 4"),
        (
            (1, 2),
            ["trainer.accumulate_grad_batches=3", "data.batch_size=1"],
            "1 process before, 2 now: a step takes 6 images instead of 4",
        ),
        ((1, 2), ["data.batch_size=2"], "1 process before, 2 now"),
    ],
)
def test_steps_of_another_size_see_every_sample_once_per_epoch(
    start, resume, runs, request, processes, arguments, line
):
    name = f"other-{request.node.callspec.indices['processes']}"
    kill = {"rank": 0, "step": 5}
    folder = start(name, "callbacks.checkpoints.every=1", processes=processes[0], kill=kill)
    before = [sample for sample in seen(runs) if sample[0] < 5]
    devices = f"trainer.devices={processes[1]}"
    printed = resume(folder, devices, *arguments, processes=processes[1])
    assert printed[-1] == f"resume: {line}"
    after = seen(runs)
    assert [step for step, *_ in after] == sorted(step for step, *_ in after)
    count = len(before) + len(after)
    assert load(folder)["Scenes"]["samples_seen"] == count
    assert sorted(epoch for _, epoch, _ in before + after) == [n // 10 for n in range(count)]
    assert len({sample[1:] for sample in before + after}) == count


def seen(folder):
    lines = (folder / "seen.txt").read_text().splitlines()
    return sorted(tuple(map(int, line.split())) for line in lines)


def test_a_checkpoint_in_a_run_folder_goes_on_there(resume, stopped, whole):
    folder = stopped()
    printed = resume(f"runs/{folder.name}/checkpoints/step-000003.ckpt")
    assert printed == [f"resume: runs/{folder.name} goes on from step 3 of 12 (step-000003.ckpt)"]
    assert_same_training(folder, whole())


def test_a_lone_checkpoint_gets_a_folder_of_the_same_run(resume, stopped, whole, runs):
    shutil.rmtree(runs / "runs")
    original = stopped()
    identity = json.loads((original / "run.json").read_text())["wandb_id"]
    shutil.copy(original / "checkpoints/step-000006.ckpt", runs / "lone.ckpt")
    first = original.name
    assert resume("lone.ckpt", status=2) == (
        f"segtrain: error: resume=lone.ckpt: runs/{first} is of that run: resume=runs/{first} "
        "goes on there, name=NAME beside it brings the checkpoint into a folder of its own"
    )
    printed = resume("lone.ckpt", "name=lone")
    assert printed == ["resume: runs/lone goes on from step 6 of 12 (last.ckpt)"]
    folder = runs / "runs" / "lone"
    assert json.loads((folder / "run.json").read_text())["wandb_id"] == identity
    assert_same_training(folder, whole(), validations=False)
    printed = resume("lone.ckpt", "name=lone")
    assert printed[0] == "resume: lone.ckpt was brought into runs/lone before, which goes on"
    assert "all its 12 steps" in printed[-1]
    shutil.rmtree(original)
    shutil.rmtree(folder)
    resume("lone.ckpt")
    assert_same_training(runs / "runs" / "stopped", whole(), validations=False)


def test_a_damaged_checkpoint_is_passed_over(resume, stopped, whole):
    folder = stopped()
    for name in ("last.ckpt", "step-000009.ckpt"):
        path = folder / "checkpoints" / name
        path.unlink()  # not written to: it shares its content with other names
        shutil.copy(folder / "checkpoints" / "step-000006.ckpt", path)
        with path.open("rb+") as file:
            file.truncate(path.stat().st_size - 1000)
    printed = resume(folder)
    assert printed == [f"resume: runs/{folder.name} goes on from step 6 of 12 (step-000006.ckpt)"]
    assert_same_training(folder, whole())


def test_without_a_checkpoint_it_starts_from_the_beginning(start, resume, whole):
    folder = start("early", kill={"rank": 0, "step": 2})
    assert resume(folder) == ["resume: runs/early has no checkpoint yet, starts from the beginning"]
    assert_same_training(folder, whole())


def truncate(path, share=0.5):
    text = path.read_bytes()
    path.unlink()
    path.write_bytes(text[: int(len(text) * share)])


def change(path, **changes):
    content = torch.load(path, weights_only=True)
    path.unlink()
    torch.save({k: v for k, v in (content | changes).items() if v is not None}, path)


class Harmful:
    def __reduce__(self):
        return eval, ("open('harm', 'w')",)


def damage_all(folder):
    for path in (folder / "checkpoints").iterdir():
        truncate(path)


STEP = "checkpoints/step-000003.ckpt"


@pytest.mark.parametrize(
    ("spoil", "arguments", "parts"),
    [
        (shutil.rmtree, [], ["no run there", "config.yaml"]),
        (lambda f: (f / "config.yaml").unlink(), [], ["no run there", "config.yaml"]),
        (lambda f: truncate(f / "config.yaml"), [], ["config.yaml"]),
        (lambda f: (f / "config.yaml").write_text("a: [1"), [], ["config.yaml", "not valid YAML"]),
        (lambda f: (f / "config.yaml").write_text("lr: 3"), [], ["config.yaml", "'lr'"]),
        (damage_all, [], ["newest checkpoints are damaged", "best.ckpt"]),
        (lambda f: truncate(f / STEP), [STEP], ["step-000003.ckpt", "no whole checkpoint"]),
        (lambda f: (f / STEP).unlink(), [STEP], ["step-000003.ckpt", "no such file"]),
        (lambda f: change(f / STEP, config=None), [STEP], ["no 'config'", "weights="]),
        (lambda f: change(f / STEP, loops=None), [STEP], ["no 'loops'", "weights="]),
        (lambda f: torch.save(Harmful(), f / STEP), [STEP], ["could run code", "refused"]),
        (None, ["model.fuse_width=8"], ["of another network"]),
        (None, ["model=edaformer_tiny"], ["model=edaformer_nano"]),
        (None, ["weights=other.pth"], ["weights= does not go with resume="]),
        (None, ["optimizer.groups={norm: {weight_decay_scale: 1}}"], ["optimizer.groups"]),
        (None, ["optimizer=sgd"], ["optimizer.name cannot change"]),
        (None, ["task=validate"], ["task=validate takes ckpt=FILE"]),
        (None, ["name=other"], ["its own folder, without name=other"]),
        (None, ["config=other.yaml"], ["config= does not go with resume="]),
    ],
)
def test_what_is_wrong_is_said_in_one_line(resume, stopped, runs, spoil, arguments, parts):
    folder = stopped()
    if spoil:
        spoil(folder)
    source = folder / arguments.pop() if arguments == [STEP] else folder
    line = resume(source, *arguments, status=2)
    for part in parts:
        assert part in line
    assert not (runs / "harm").exists()


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ({"callbacks": {"os.system": {"command": "ls"}}}, "'os.system' is no key"),
        ({"callbacks": {"subprocess": {"args": "ls"}}}, "no callback 'subprocess'"),
        ({"_target_": "os.system"}, "unknown key '_target_'"),
        ({"tracking": {"notes": "${oc.env:HOME}"}}, "${oc.env:HOME}"),
        ({"name": torch.zeros(1)}, "holds a Tensor"),
    ],
)
def test_a_foreign_checkpoint_cannot_ask_for_more_than_the_command_line(
    resume, stopped, runs, config, part
):
    original = stopped()
    path = runs / "foreign.ckpt"
    content = torch.load(original / STEP, weights_only=True)
    config = {k: content["config"].get(k) for k in content["config"]} | config
    torch.save(content | {"config": config, "run": None}, path)
    before = sorted((runs / "runs").iterdir())
    assert part in resume("foreign.ckpt", "name=foreign", status=2)
    assert sorted((runs / "runs").iterdir()) == before


@pytest.mark.parametrize(
    ("source", "key", "part"),
    [
        ("wandb:me/mine", None, "write wandb:entity/project/RUN_ID[:alias]"),
        ("wandb:me/mine/abc", None, "no account configured"),
        ("wandb:me/mine/abc", "a" * 40, "Weights & Biases says"),
    ],
)
def test_what_keeps_wandb_from_answering_is_said(monkeypatch, tmp_path, source, key, part):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # refuses
    monkeypatch.setattr("callbacks.resume._TIMEOUT", 2)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    with pytest.raises(UserError) as raised:
        bring_run(source, tmp_path / "runs", None)
    assert part in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not list((tmp_path / "runs").glob("*"))


class Server:
    """Stands for wandb.Api, with one run of one checkpoint; the real one needs an account."""

    def __init__(self, folder, timeout=None):
        self.folder = folder
        entries = {"checkpoint.ckpt": 1, "curve.jsonl": 1, "config.yaml": 1}
        self.manifest = types.SimpleNamespace(entries=entries)

    def artifact_exists(self, name, type):
        return name in ("me/mine/checkpoint-abc:latest", "me/mine/checkpoint-abc:step-3")

    def artifact_collection_exists(self, name, type):
        return name == "me/mine/checkpoint-abc"

    def artifact(self, name, type):
        return self

    def get_entry(self, name):
        def download(root, skip_cache):
            kept = {"checkpoint.ckpt": STEP, "curve.jsonl": "curve.jsonl"}
            shutil.copy(self.folder / kept[name], Path(root) / name)

        return types.SimpleNamespace(download=download)


def test_what_wandb_keeps_of_a_run_becomes_its_folder(monkeypatch, tmp_path, stopped, whole):
    original = stopped()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr("wandb.Api", functools.partial(Server, original))
    with pytest.raises(UserError, match="me/mine has no checkpoint of a run other"):
        bring_run("wandb:me/mine/other", Path("runs"), None)
    with pytest.raises(UserError, match="no checkpoint 'best': there is latest, best and step-N"):
        bring_run("wandb:me/mine/abc:best", Path("runs"), None)
    source = "wandb:me/mine/abc"
    assert train.main([f"resume={source}"]) == 0
    folder = tmp_path / "runs" / "stopped"
    assert_same_training(folder, whole())
    record = json.loads((folder / "run.json").read_text())
    assert record["wandb_id"] == "abc"
    assert record["resumed_from"] == source
    # The same job again goes on with the folder; another checkpoint of the run is not mixed in.
    assert bring_run(source, Path("runs"), None) == (Path("runs/stopped"), False)
    with pytest.raises(UserError, match="runs/stopped is of that run"):
        bring_run(f"{source}:step-3", Path("runs"), None)
    assert [path.name for path in Path("runs").iterdir()] == ["stopped"]


def test_random_numbers_belong_to_their_step():
    def draw(*place):
        seed_generators(torch.device("cpu"), *place)
        return torch.rand(3).tolist()

    places = [(0, 1, 0, 0), (1, 0, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1)]
    assert draw(*places[0]) == draw(*places[0])
    assert len({tuple(draw(*place)) for place in places}) == len(places)
    assert not torch.cuda.is_initialized()
