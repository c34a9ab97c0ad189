"""Two processes with gloo, started by torchrun, SLURM and Lightning; and what goes with many."""

import copy
import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import run_folder
import segtrain
import train
from segtrain.training.recomputation import recompute_blocks

ROOT = Path(train.__file__).parent
TWO = ["trainer.accelerator=cpu", "trainer.accumulate_grad_batches=2"]
TWO += ["trainer.gradient_clip_val=0.5", "callbacks.checkpoints.keep=-1", "~callbacks.pictures"]

#: torch.compile with its tracing alone: generating code takes minutes on a CPU.
TRACED = """
import functools, sys, torch, train
torch.compile = functools.partial(torch.compile, backend="eager")
sys.exit(train.main(sys.argv[1:]))
"""


def rows(folder, name="curve.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def accuracies(folder, step):
    return {row["setting"]: row["mIoU"] for row in rows(folder) if row["step"] == step}


def losses(folder):
    return [row["train/loss"] for row in rows(folder, "metrics.jsonl") if "train/loss" in row]


def checkpoint(folder, name="last"):
    return torch.load(Path(folder) / "checkpoints" / f"{name}.ckpt", weights_only=True)


def run(folder, *commands, **environment):
    """Run the commands side by side, each with an environment of its own; all have to succeed."""
    outside = {k: v for k, v in os.environ.items() if k != run_folder.RUN_NAME}
    outside |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    processes = [
        subprocess.Popen(
            [sys.executable, *command],
            cwd=folder,
            env=outside | own,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for command, own in commands
    ]
    try:
        printed = [process.communicate(timeout=200)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), printed
    return printed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("many")


@pytest.fixture(scope="module")
def replicated(small, folder):
    """Two processes of torchrun with DDP; the job gives the run its name."""
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    launch += ["--rdzv_endpoint=localhost:0", "--rdzv_id=job7", str(ROOT / "train.py")]
    run(folder, ([*launch, *small, *TWO, "trainer.devices=2"], {}))
    return folder / "runs" / "edaformer_nano-scenes-job7"


@pytest.fixture(scope="module")
def sharded(small, folder):
    """Two nodes of one process each, as SLURM describes them, with FSDP2 and recomputed blocks."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    job = {"SLURM_JOB_ID": "4242", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2"}
    job |= {"SLURM_NTASKS_PER_NODE": "1", "SLURM_NNODES": "2", "SLURM_NODELIST": "localhost"}
    job |= {"SLURM_LOCALID": "0", "MASTER_PORT": str(port)}
    command = [str(ROOT / "train.py"), *small, *TWO, "trainer.devices=1", "trainer.num_nodes=2"]
    command += ["trainer.strategy=fsdp2", "activation_checkpointing=true"]
    ranks = [{"SLURM_PROCID": rank, "SLURM_NODEID": rank} for rank in "01"]
    run(folder, *((command, rank) for rank in ranks), **job)
    return folder / "runs" / "edaformer_nano-scenes-4242"


def test_five_images_on_two_ranks_score_as_on_one(replicated, in_folder):
    assert {row["images"] for row in rows(replicated)} == {5}
    weights = f"ckpt={replicated}/checkpoints/last.ckpt"
    alone = ["trainer.devices=1", "trainer.accumulate_grad_batches=1", "name=alone"]
    assert train.main(["task=validate", weights, *alone]) == 0
    assert accuracies("runs/alone", 0) == accuracies(replicated, 4)


def test_accumulation_counts_optimiser_steps(replicated):
    assert [row["step"] for row in rows(replicated)] == [2] * 6 + [4] * 6
    saved = checkpoint(replicated)
    assert saved["global_step"] == 4
    assert saved["Scenes"]["samples_seen"] == 4 * 2 * 2 * 4


def test_sharding_trains_as_replicating_does(replicated, sharded):
    assert losses(sharded) == pytest.approx(losses(replicated), rel=1e-4)
    for step in (2, 4):
        ours, theirs = accuracies(sharded, step), accuracies(replicated, step)
        assert ours == pytest.approx(theirs, abs=2e-3)
    assert {row["images"] for row in rows(sharded)} == {5}
    costs = [[row["cost"]["macs"] for row in rows(run)] for run in (sharded, replicated)]
    assert costs[0] == costs[1]


def test_a_sharded_run_saves_what_any_other_does(replicated, sharded):
    ours, theirs = checkpoint(sharded), checkpoint(replicated)
    assert_close(ours["state_dict"], theirs["state_dict"], slack=1e-4)
    assert all(type(value) is torch.Tensor for value in ours["state_dict"].values())
    assert_equal_optimizers(ours, theirs)


def test_a_replicated_run_goes_on_sharded(replicated, folder):
    restart(replicated, folder / "runs" / "again")
    arguments = ["resume=runs/again", "trainer.strategy=fsdp2"]
    run(folder, ([str(ROOT / "train.py"), *arguments], {}))
    whole, again = checkpoint(replicated), checkpoint(folder / "runs" / "again")
    assert_close(again["state_dict"], whole["state_dict"], slack=1e-4)
    assert_equal_optimizers(again, whole)
    assert again["Scenes"] == whole["Scenes"]


def test_compiling_and_averaging_go_with_two_processes(replicated, small, folder):
    (folder / "traced.py").write_text(TRACED)
    more = ["compile=true", "callbacks.ema={decay: 0.5}", "trainer.devices=2", "name=traced"]
    more += ["schedule.steps=2", "callbacks.cost_curve.settings=[full]", "data.limit_eval=2"]
    # One size for all images: one graph for training and one for validation.
    more += ["data.batch_size=1", "data.eval_batch_size=1", "data.crop_size=[64,128]"]
    (printed,) = run(folder, (["traced.py", *small, *TWO, *more], {}))
    assert "warning" not in printed
    saved = checkpoint(folder / "runs/traced")
    assert saved["global_step"] == 2
    assert saved["current_model_state"].keys() == checkpoint(replicated)["state_dict"].keys()


def test_a_budget_is_met_by_one_threshold_on_all_ranks(small, folder, in_folder):
    launch = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--rdzv_backend=c10d"]
    launch += ["--rdzv_endpoint=localhost:0", "--rdzv_id=budget", str(ROOT / "train.py")]
    micro = "{embed_dim: 64, num_heads: 4, patch_size: 8}"
    model = ["model=dovit_segmenter_s", "model.image_size=[64,64]", "optimizer=sgd"]
    model += [f"+model.backbone_arguments={micro}"]
    more = ["trainer.devices=2", "trainer.strategy=fsdp2", "schedule.steps=2"]
    more += ["callbacks.cost_curve.settings=[{budget_gmacs: 0.1}]"]
    run(folder, ([*launch, *small, *TWO, *model, *more], {}))
    trained = folder / "runs" / "dovit_segmenter_s-scenes-budget"
    weights = f"ckpt={trained}/checkpoints/last.ckpt"
    alone = ["trainer.devices=1", "trainer.strategy=auto", "setting={budget_gmacs: 0.1}"]
    assert train.main(["task=validate", weights, *alone, "name=alone"]) == 0
    (budget,), (other,) = (
        [row for row in rows(where) if row["setting"] == "budget_0.1"]
        for where in (trained, "runs/alone")
    )
    assert budget["cost"]["gmacs"] == pytest.approx(0.1, rel=0.01)
    for key in ("threshold", "mIoU"):
        assert other[key] == budget[key]
    assert other["cost"] == budget["cost"]
    assert train.main(["task=validate", weights, *alone, "~callbacks.cost_curve"]) == 2


def restart(run, copied):
    """A copy of a run whose last checkpoint is the one of step 2."""
    shutil.copytree(run, copied)
    for path in (copied / "checkpoints").iterdir():
        if path.name != "step-000002.ckpt":
            path.unlink()
    (copied / "checkpoints" / "step-000002.ckpt").rename(copied / "checkpoints" / "last.ckpt")


def assert_close(ours, theirs, slack):
    """Equal but for rounding; `slack` is what rounding makes of gradients that should be zero."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        difference = (ours[name] - value).float().norm()
        assert difference <= 1e-3 * value.float().norm() + slack, name


def assert_equal_optimizers(ours, theirs):
    ours, theirs = ours["optimizer_states"][0], theirs["optimizer_states"][0]
    groups = [[group["params"] for group in state["param_groups"]] for state in (ours, theirs)]
    assert groups[0] == groups[1]
    assert len(groups[0]) > 1
    for number, state in theirs["state"].items():
        assert_close(ours["state"][number], state, slack=1e-9)


@pytest.fixture
def job(in_folder, monkeypatch):
    """Environment variables of a process that something else started."""

    def describe(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        config = {"resume": None, "name": None, "model": {"name": "m"}, "data": {"name": "d"}}
        return run_folder.choose_folder(config, None)

    return describe


def test_all_processes_of_a_job_choose_one_name(job):
    assert job(SLURM_NTASKS="8", SLURM_PROCID="3", SLURM_JOB_ID="77") == Path("runs/m-d-77")


def test_a_job_of_torchrun_has_the_name_that_it_was_given(job):
    started = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1"}
    assert job(**started, TORCHELASTIC_RUN_ID="mine") == Path("runs/m-d-mine")


def test_a_job_without_a_name_is_refused(job):
    with pytest.raises(segtrain.UserError, match="name=NAME is needed"):
        job(WORLD_SIZE="4", RANK="1", LOCAL_RANK="1", TORCHELASTIC_RUN_ID="none")


@pytest.fixture(scope="module")
def averaged(small, tmp_path_factory):
    """A run of four steps, one process, that averages its weights."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("averaged"))
        arguments = ["callbacks.ema={decay: 0.5}", "callbacks.checkpoints.keep=-1", "name=run"]
        assert train.main([*small, *arguments]) == 0
        patch.delenv(run_folder.RUN_NAME)
        return Path("runs/run").resolve()


def test_checkpoints_hold_the_weights_and_their_average(averaged):
    steps = [checkpoint(averaged, f"step-{step:06d}") for step in (2, 4)]
    assert [int(step["averaging_state"]["n_averaged"]) for step in steps] == [2, 4]
    for step in steps:
        name = "network.decoder.classifier.weight"
        assert not torch.equal(step["state_dict"][name], step["current_model_state"][name])


def test_validations_score_the_average(averaged, in_folder):
    weights = f"ckpt={averaged}/checkpoints/last.ckpt"
    assert train.main(["task=validate", weights, "name=scored"]) == 0
    assert accuracies("runs/scored", 0) == accuracies(averaged, 4)


def test_averaging_goes_on_exactly(averaged, in_folder):
    restart(averaged, in_folder / "runs" / "again")
    assert train.main(["resume=runs/again"]) == 0
    whole, again = checkpoint(averaged), checkpoint("runs/again")
    for part in ("state_dict", "current_model_state", "averaging_state"):
        assert whole[part].keys() == again[part].keys()
        for name, value in whole[part].items():
            assert torch.equal(again[part][name], value), f"{part}: {name}"


def test_training_goes_on_from_the_weights_where_the_average_is_left_out(averaged, in_folder):
    restart(averaged, in_folder / "runs" / "again")
    assert train.main(["resume=runs/again", "callbacks.ema=null"]) == 0
    whole, again = checkpoint(averaged)["current_model_state"], checkpoint("runs/again")
    assert all(torch.equal(again["state_dict"][name], value) for name, value in whole.items())


def test_averaging_sharded_weights_is_refused(small, fails):
    more = ["callbacks.ema={}", "trainer.accelerator=cpu", "trainer.strategy=fsdp2"]
    assert "callbacks.ema does not go with trainer.strategy=fsdp2" in fails(*small, *more)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("isr_2211_222", ["isr_2211_222"]),
        ("{encoder: [4, 2, 1, 1], decoder: [1, 1, 2]}", ["pools_4.2.1.1_1.1.2"]),
        ("[isr_global, full]", ["isr_global", "full"]),
    ],
)
def test_one_checkpoint_under_chosen_settings(averaged, in_folder, capsys, setting, names):
    arguments = ["task=validate", f"ckpt={averaged}/checkpoints/best.ckpt", f"setting={setting}"]
    assert train.main([*arguments, "name=scored", "~callbacks.pictures"]) == 0
    scored = rows("runs/scored")
    assert [row["setting"] for row in scored] == names
    assert [row["training_setting"] for row in scored] == [name == "full" for name in names]
    assert all(name in capsys.readouterr().out for name in names[:1])
    metrics = rows("runs/scored", "metrics.jsonl")
    assert [row["val/mIoU"] for row in metrics if "val/mIoU" in row] == [scored[0]["mIoU"]]


def test_an_unknown_setting_is_a_slip(averaged, fails):
    weights = f"ckpt={averaged}/checkpoints/best.ckpt"
    message = fails("task=validate", weights, "setting=isr_2211_22")
    assert "setting: " in message
    assert "did you mean 'isr_2211_222'" in message
    assert "setting= goes with task=validate" in fails("setting=full")


def test_recomputed_blocks_give_the_same_gradients_and_names():
    def gradients(recompute):
        torch.manual_seed(0)
        network = segtrain.create_network("edaformer_nano", 5, drop_path=0.5, dropout=0.5)
        before = list(network.state_dict())
        if recompute:
            recompute_blocks(network)
            network = copy.deepcopy(network)
        runs = []
        hooks = [
            block.norm1.register_forward_hook(lambda *_: runs.append(1)) for block in network.blocks
        ]
        network.train()(torch.randn(2, 3, 64, 64)).square().mean().backward()
        assert len(runs) == (1 + recompute) * len(hooks)
        assert list(network.state_dict()) == before
        return {name: parameter.grad for name, parameter in network.named_parameters()}

    plain, recomputed = gradients(False), gradients(True)
    assert all(torch.equal(recomputed[name], value) for name, value in plain.items())


def test_a_slurm_job_puts_itself_back_and_goes_on(in_folder):
    tools = in_folder / "tools"
    tools.mkdir()
    for name, status in (("srun", 138), ("scontrol", 0)):
        (tools / name).write_text(f'#!/bin/bash\necho {name} "$@"\nexit {status}\n')
        (tools / name).chmod(0o755)
    job = {"SLURM_JOB_ID": "4242", "SLURM_NTASKS_PER_NODE": "8", "SLURM_NNODES": "2"}
    environment = os.environ | job | {"PATH": f"{tools}:{os.environ['PATH']}", "NAME": "mine"}

    def submit():
        command = ["bash", ROOT / "scripts" / "slurm.sh", "model=segformer_b0"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 138
        started, requeued = done.stdout.splitlines()
        assert requeued == "scontrol requeue 4242"
        return started.partition(" train.py ")[2]

    first = submit()
    assert first == "name=mine trainer.devices=8 trainer.num_nodes=2 model=segformer_b0"
    (in_folder / "runs" / "mine").mkdir(parents=True)
    (in_folder / "runs" / "mine" / "config.yaml").touch()
    assert submit() == "resume=runs/mine"
