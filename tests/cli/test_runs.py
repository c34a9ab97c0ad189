"""Whole runs on small scenes: what they leave behind, how they go on, and how ranks share them."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

import run_folder
import train

SETTINGS = [
    "full",
    "isr_1111_222",
    "isr_2211_222",
    "isr_2222_222",
    "isr_4444_444",
    "isr_global",
]

#: Runs the command line, writes down which samples train, and dies at a step if told to.
DRIVER = """
import os, signal, sys
import train
from segtrain.training import SegmentationModule

original = SegmentationModule.training_step

def training_step(self, batch, batch_index):
    if self.global_step == int(os.environ.get("DIE_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    with open(f"seen-{self.global_rank}.txt", "a") as file:
        for epoch, name in zip(batch["epoch"].tolist(), batch["name"]):
            file.write(f"{self.global_step} {epoch} {name}\\n")
    return original(self, batch, batch_index)

SegmentationModule.training_step = training_step
sys.exit(train.main(sys.argv[1:]))
"""


def rows(folder, name="curve.jsonl"):
    return [json.loads(line) for line in (Path(folder) / name).read_text().splitlines()]


def seen(folder, rank=0):
    lines = (folder / f"seen-{rank}.txt").read_text().splitlines()
    return [tuple(line.split(maxsplit=2)) for line in lines]


@pytest.fixture(scope="module")
def finished(small, tmp_path_factory):
    """The folder of a run of four steps that was validated twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("finished"))
        assert train.main([*small, "name=done"]) == 0
        patch.delenv(run_folder.RUN_NAME)
        return Path("runs/done").resolve()


def test_every_validation_scores_every_setting(finished):
    curve = rows(finished)
    assert [(row["step"], row["setting"]) for row in curve] == [
        (step, setting) for step in (2, 4) for setting in SETTINGS
    ]
    assert all(row["images"] == 5 and len(row["IoU"]) == 19 for row in curve)
    macs = [row["cost"]["macs"] for row in curve[: len(SETTINGS)]]
    assert macs[:4] == sorted(macs[:4], reverse=True)
    assert len(set(macs[:4])) == 4


def test_the_run_folder_is_complete(finished):
    for name in ("config.yaml", "run.json", "metrics.jsonl", "report.html"):
        assert (finished / name).stat().st_size > 0, name
    assert {path.name for path in (finished / "checkpoints").iterdir()} == {
        "last.ckpt",
        "previous.ckpt",
        "best.ckpt",
    }
    metrics = {name for row in rows(finished, "metrics.jsonl") for name in row}
    assert {"train/loss", "train/learning_rate", "val/mIoU", "best/mIoU"} <= metrics
    assert {f"val/mIoU/{setting}" for setting in SETTINGS} <= metrics


def test_checkpoints_hold_plain_types(finished):
    checkpoint = torch.load(finished / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert checkpoint["config"]["model"]["name"] == "edaformer_nano"


def test_the_saved_configuration_repeats_the_run(finished, in_folder):
    assert train.main([f"config={finished}/config.yaml", "name=again"]) == 0
    again = OmegaConf.load("runs/again/config.yaml")
    assert again | {"name": "done"} == OmegaConf.load(finished / "config.yaml")
    assert [r["mIoU"] for r in rows("runs/again")] == [r["mIoU"] for r in rows(finished)]


def test_a_checkpoint_scores_the_same_when_it_is_validated(finished, in_folder):
    checkpoint = f"ckpt={finished}/checkpoints/last.ckpt"
    arguments = [f"config={finished}/config.yaml", "task=validate", checkpoint, "name=scored"]
    assert train.main(arguments) == 0
    scored = {row["setting"]: row["mIoU"] for row in rows("runs/scored")}
    assert scored == {row["setting"]: row["mIoU"] for row in rows(finished) if row["step"] == 4}


def test_validation_needs_no_training_data(finished, small, in_folder):
    rendered = Path(small[0].removeprefix("data.root=")) / "cityscapes-64x128-24-5-v1"
    for kind in ("leftImg8bit", "gtFine"):
        shutil.copytree(rendered / kind / "val", in_folder / "city" / kind / "val")
    rendering = ("data.train_images", "data.eval_images", "data.image_size", "criterion")
    arguments = [argument for argument in small if not argument.startswith(rendering)]
    arguments += ["data=cityscapes", "data.root=city", "criterion.class_weights=balanced"]
    checkpoint = f"weights={finished}/checkpoints/last.ckpt"
    assert train.main([*arguments, "task=validate", checkpoint, "name=scored"]) == 0
    assert rows("runs/scored")[0]["mIoU"] == rows(finished)[6]["mIoU"]


def test_a_killed_run_goes_on_with_the_samples_it_has_not_seen(small, start, in_folder):
    """24 images in batches of 4 are epochs of 6 steps; the run dies in the middle of the second."""
    (in_folder / "driver.py").write_text(DRIVER)
    arguments = [*small, "name=run", "tracking.mode=offline", "data.workers=1"]
    arguments += ["schedule.steps=16", "schedule.validate_every=4", "callbacks.checkpoints.every=2"]
    died = start(*arguments, script="driver.py", check=False, DIE_AT="11")
    assert died.returncode == -9
    before = seen(in_folder)
    identity = json.loads((in_folder / "runs/run/run.json").read_text())["wandb_id"]
    assert [row["step"] for row in rows("runs/run")] == [4] * 6 + [8] * 6

    (in_folder / "seen-0.txt").unlink()
    start("resume=runs/run", script="driver.py")
    after = seen(in_folder)
    assert after[0][0] == "10"  # the last checkpoint
    kept = [sample for sample in before if int(sample[0]) < 10]
    epochs = [(epoch, name) for _, epoch, name in kept + after]
    for epoch in "01":
        names = [name for e, name in epochs if e == epoch]
        assert len(names) == len(set(names)) == 24
    # The steps that were lost come again with the same samples.
    assert [s for s in before if s[0] == "10"] == [s for s in after if s[0] == "10"]

    scored = [row["step"] for row in rows("runs/run")]
    assert scored == [step for step in (4, 8, 12, 16) for _ in SETTINGS]
    steps = [row["step"] for row in rows("runs/run", "metrics.jsonl")]
    assert steps == sorted(steps)
    record = json.loads((in_folder / "runs/run/run.json").read_text())
    assert record["wandb_id"] == identity
    assert len(record["resumed"]) == 1
    fragments = list((in_folder / "runs/run/wandb").glob("offline-run-*"))
    assert len(fragments) == 2
    assert all(fragment.name.endswith(identity) for fragment in fragments)


def test_two_ranks_share_the_samples_and_log_once(small, start, in_folder):
    (in_folder / "driver.py").write_text(DRIVER)
    arguments = [*small, "name=run", "schedule.steps=3", "schedule.validate_every=3"]
    arguments += ["trainer.accelerator=cpu", "trainer.devices=2", "trainer.sync_batchnorm=false"]
    arguments += ["tracking.mode=offline"]
    start(*arguments, script="driver.py")
    names = [name for rank in (0, 1) for _, _, name in seen(in_folder, rank)]
    assert len(names) == len(set(names)) == 24
    curve = rows("runs/run")
    assert [row["setting"] for row in curve] == SETTINGS
    assert {row["images"] for row in curve} == {5}  # an uneven split, nothing counted twice
    logged = rows("runs/run", "metrics.jsonl")
    assert len([row for row in logged if "val/mIoU" in row]) == 1
    assert len(list(Path("runs/run/wandb").glob("offline-run-*"))) == 1


def test_mixed_precision_accumulation_and_clipping(small, in_folder):
    """Steps are optimiser steps: two batches make one, and the samples of both have been seen."""
    arguments = ["trainer.precision=bf16-mixed", "trainer.accumulate_grad_batches=2"]
    assert train.main([*small, *arguments, "trainer.gradient_clip_val=1.0", "name=run"]) == 0
    assert [row["step"] for row in rows("runs/run")] == [2] * 6 + [4] * 6
    checkpoint = torch.load("runs/run/checkpoints/last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 4
    assert checkpoint["Scenes"] == {"samples_seen": 4 * 2 * 4}


def test_a_compiled_run_scores_as_one_that_is_not(finished, small, in_folder, monkeypatch):
    """With the tracing of torch.compile; its code generation takes minutes on a CPU."""
    traced = functools.partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", traced)
    assert train.main([*small, "compile=true", "name=run"]) == 0
    scored = [row["mIoU"] for row in rows("runs/run")]
    assert scored == pytest.approx([row["mIoU"] for row in rows(finished)], abs=1e-4)


def test_resuming_with_another_network_is_refused(finished, in_folder, capsys):
    assert train.main([f"resume={finished}", "model=edaformer_tiny"]) == 2
    assert "that run has model=edaformer_nano" in capsys.readouterr().err


def test_help_shows_groups_choices_and_the_configuration(start):
    text = start("--help").stdout
    for part in ("experiment", "edaformer_tiny_ade20k", "cityscapes", "validate_every:"):
        assert part in text


def test_the_composed_configuration_is_printed(start):
    printed = OmegaConf.create(start("--cfg", "experiment=edaformer_base_cityscapes").stdout)
    assert printed.inference.mode == "slide"
    assert printed.model.name == "edaformer_base"


MERGING = "{stages: [{kv: {mode: bsm, ratio: 0.5, stride: 2}}, {}, {}, {}]}"
MICRO_SEGFORMER = [
    "model=segformer_b0",
    "+model.widths=[8,16,40,64]",
    "+model.depths=[1,1,1,1]",
    "+model.head_width=32",
]


def test_training_with_merging_and_going_on_with_it(small, in_folder):
    arguments = [*small, *MICRO_SEGFORMER, "schedule.steps=2"]
    assert train.main([*arguments, f"model.training_setting={MERGING}", "name=merged"]) == 0
    scored = rows("runs/merged")
    assert [row["setting"] for row in scored] == [
        "kv1_bsm_2x2_0.5",
        "full",
        "isr_2211",
        "bsm_hq",
        "bsm_fast",
        "n2d_2x2",
        "downsample",
    ]
    assert [row["training_setting"] for row in scored] == [True] + [False] * 6
    assert train.main(["resume=runs/merged", "schedule.steps=4"]) == 0
    checkpoint = "ckpt=runs/merged/checkpoints/last.ckpt"
    both = "callbacks.cost_curve.settings=[{merge: bsm_hq, isr: [2,1,1,1]}]"
    assert train.main(["task=validate", checkpoint, "name=scored", both]) == 0
    settings = [row["setting"] for row in rows("runs/scored")]
    assert settings == ["kv1_bsm_2x2_0.5", "isr_2111_bsm_hq"]
    assert rows("runs/scored")[0]["mIoU"] == rows("runs/merged")[7]["mIoU"]


def test_weights_from_a_hugging_face_folder(small, in_folder, capsys):
    from transformers import SegformerConfig, SegformerForSemanticSegmentation

    sizes = {"hidden_sizes": [8, 16, 40, 64], "depths": [1, 1, 1, 1], "decoder_hidden_size": 32}
    model = SegformerForSemanticSegmentation(SegformerConfig(num_labels=19, **sizes))
    model.save_pretrained("theirs")
    arguments = [*small, *MICRO_SEGFORMER, "model.head=nvlabs", "task=validate", "weights=theirs"]
    assert train.main([*arguments, "name=scored"]) == 0
    assert len(rows("runs/scored")) == 6
    assert "segtrain: warning: Hugging Face's SegFormer has ln_eps=1e-05" in capsys.readouterr().err
    assert train.main([*arguments, "model.ln_eps=1e-5", "name=again"]) == 0
    assert "ln_eps" not in capsys.readouterr().err
