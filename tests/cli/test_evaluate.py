"""evaluate.py on a tiny run, and on the file of somebody else."""

import csv
import json
import shutil
from pathlib import Path

import pytest

import evaluate
import run_folder
import train

MICRO = Path(train.__file__).parent / "tests/reference/edaformer/edaformer_micro.safetensors"
TEXTS = ("setting", "device", "on_front")


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """The folder of a run of two steps, scored by its first batch alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("trained"))
        steps = ["schedule.steps=2", "callbacks.cost_curve.limit_batches=1"]
        without = ["~callbacks.report", "callbacks.pictures.count=1"]
        assert train.main([*small, *steps, *without, "name=done"]) == 0
        patch.delenv(run_folder.RUN_NAME)
        return Path("runs/done").resolve()


def read(folder):
    """The results as evaluation.json and evaluation.csv have them, and the lines of the .tex."""
    results = json.loads((folder / "evaluation.json").read_text())
    with (folder / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    return results, rows, (folder / "evaluation.tex").read_text().splitlines()


def test_two_settings_over_scaled_and_mirrored_images(trained, in_folder, capsys):
    arguments = ["setting=full,isr_2211_222", "scales=0.5,1", "flip=true"]
    assert evaluate.main([f"ckpt={trained}", *arguments]) == 0
    (folder,) = Path("runs").iterdir()
    assert folder.name.startswith("evaluate-edaformer_nano-scenes-")
    results, rows, lines = read(folder)

    # No pictures, no report, and nothing of a tracker.
    assert {path.name for path in folder.iterdir()} == {
        *("config.yaml", "run.json", "metrics.jsonl", "curve.jsonl", "confusion.npz"),
        *("evaluation.json", "evaluation.csv", "evaluation.tex"),
    }
    assert results["weights"]["source"] == str(trained)
    assert results["weights"]["step"] == 2
    assert results["images"] == 5  # all, though the training looked at fewer
    assert results["inference"] | {"window": None, "stride": None} == {
        "mode": "whole", "window": None, "stride": None, "scales": [0.5, 1.0], "flip": True,
    }  # fmt: skip
    assert "torch" in results["versions"]
    assert [row["setting"] for row in results["settings"]] == ["full", "isr_2211_222"]

    assert len(rows) == 2
    for row, in_json in zip(rows, results["settings"], strict=True):
        assert len(in_json["IoU"]) == 19
        assert row["setting"] == in_json["setting"]
        assert float(row["gmacs"]) == in_json["cost"]["gmacs"]
        for key in ("mIoU", "pixel_accuracy", "mean_accuracy"):
            assert 0 <= float(row[key]) == in_json[key] <= 1

    assert "\\begin{tabular}{lrrrrrr}" in lines
    body = [line for line in lines if line.endswith("\\\\")]
    assert len(body) == 3
    assert all(line.count(" & ") == 6 for line in body)
    assert body[2].startswith("isr\\_2211\\_222 & ")
    printed = capsys.readouterr().out
    assert "isr_2211_222" in printed
    assert "one pass of 4" in printed


def test_a_run_scores_as_in_its_training(trained, in_folder, capsys):
    asked = ["callbacks.cost_curve.limit_batches=1", "setting=isr_global"]
    assert evaluate.main([f"ckpt={trained}", *asked, "output=results"]) == 0
    results, _, _ = read(Path("results"))
    before = map(json.loads, (trained / "curve.jsonl").read_text().splitlines())
    expected = {row["setting"]: row["IoU"] for row in before}
    assert results["images"] == 2
    assert results["settings"][0]["IoU"] == expected["isr_global"]
    assert not Path("runs").exists()

    capsys.readouterr()
    assert evaluate.main([f"ckpt={trained}", "output=results"]) == 2
    assert "output=results exists" in capsys.readouterr().err


def test_a_file_of_others_needs_no_run(small, in_folder):
    data = [argument for argument in small if argument.startswith("data")]
    sizes = ["+model.widths=[16,32,48,64]", "+model.depths=[1,2,2,1]", "+model.fuse_width=24"]
    windows = ["inference.mode=slide", "inference.window=[64,64]", "inference.stride=[48,48]"]
    rest = ["callbacks.cost_curve.latency=false", "setting=full", "output=official"]
    shutil.copy(MICRO, "official.safetensors")
    arguments = ["weights=official.safetensors", "model=edaformer_tiny", "data=scenes"]
    assert evaluate.main([*arguments, *data, *sizes, *windows, *rest]) == 0
    results, rows, _ = read(Path("official"))
    assert results["weights"] == {
        "source": "official.safetensors", "file": "official.safetensors", "step": None,
    }  # fmt: skip
    assert results["inference"]["mode"] == "slide"
    assert len(rows) == 1


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (["scale=[0.5]"], ["scale=[0.5]", "did you mean 'scales'"]),
        (["scales=0"], ["inference.scales", "greater than 0"]),
        (["scales=[]"], ["inference.scales", "at least one"]),
        (["flip=maybe"], ["inference.flip", "true or false"]),
        (["setting=ful"], ["setting", "did you mean 'full'"]),
        (["data=ade20k", "data.root=nowhere"], ["19 classes", "ade20k has 150"]),
        (["weights=FILE"], ["ckpt=", "weights="]),
    ],
)
def test_slips(trained, in_folder, capsys, arguments, parts):
    assert evaluate.main([f"ckpt={trained}", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("segtrain: error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error
    assert not Path("runs").exists()


def test_other_names_for_as_many_classes_are_told(trained, in_folder, monkeypatch, capsys):
    monkeypatch.setattr("data.cityscapes.Cityscapes.class_names", [*"abcdefghijklmnopqrs"])
    config = {"data": {"name": "cityscapes", "root": "."}}
    assert evaluate.check_classes(trained / "checkpoints/best.ckpt", config) == 2
    assert "warning: class 0 is 'road'" in capsys.readouterr().err


def test_help(capsys):
    assert evaluate.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert "ckpt=runs/NAME" in printed
    assert all(f"  {option}=" in printed for option in evaluate.OPTIONS)


def test_costs_that_depend_on_the_image_have_a_spread():
    cost = {"gmacs": 24.8714, "gmacs_std": 2.31, "latency_ms": 3.14159, "device": "cpu"}
    row = {"setting": "tau_0.9 & more", "cost": cost | {"image_size": [64, 128]}, "mIoU": 0.5,
           "pixel_accuracy": 0.25, "mean_accuracy": None, "on_front": True}  # fmt: skip
    worse = row | {"setting": "100%", "mIoU": 0.45}
    results = {
        "weights": {"file": "a.pth", "step": None}, "images": 3, "data": {"name": "scenes"},
        "inference": {"mode": "whole", "scales": [1.0], "flip": False}, "settings": [row, worse],
    }  # fmt: skip
    assert evaluate.cells(results)[0][1:] == ["24.871 ± 2.310", "3.1", "50.00", "", "25.00", ""]
    table = evaluate.latex_table(results)
    assert "tau\\_0.9 \\& more & 24.871 $\\pm$ 2.310 & 3.1 & 50.00 &  & 25.00 &  \\\\" in table
    assert "100\\% & 24.871 $\\pm$ 2.310 & 3.1 & 45.00 & $-5.00$ & 25.00 &  \\\\" in table


@pytest.mark.slow
def test_two_processes_write_once(trained, start, in_folder):
    script = "import sys, evaluate; sys.exit(evaluate.main(sys.argv[1:]))\n"
    (in_folder / "scoring.py").write_text(script)
    several = ["trainer.devices=2", "trainer.accelerator=cpu", "flip=true", "output=two"]
    done = start(f"ckpt={trained}", "setting=full", *several, script="scoring.py")
    assert done.stdout.count("written to") == 1
    results, _, _ = read(Path("two"))
    assert results["images"] == 5
