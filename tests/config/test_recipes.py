"""The files in configs/ compose, agree with what they configure, and hold the published values."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from segtrain.config import compose, read_file, to_yaml
from tests.config.test_exit_recipes import EXITS
from tests.config.test_mask_recipes import MASKS
from tests.config.test_plain_vit_recipes import RECIPES as PLAIN_VIT

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
# Recipe -> model, data set, side of the training crops, images for each process.
EDAFORMER = {
    f"edaformer_{size}_{data}": (f"edaformer_{size}", data, side, batch_size)
    for size, batch_of_cityscapes in (("tiny", 2), ("base", 1))
    for data, side, batch_size in (
        ("ade20k", 512, 4),
        ("cityscapes", 1024, batch_of_cityscapes),
        ("cocostuff", 512, 4),
    )
}
SEGFORMER = {
    f"segformer_{size}_{data}": (f"segformer_{size}", data, side, batch_size)
    for size in ("b0", "b1", "b2", "b3", "b4", "b5")
    for data, side, batch_size in (
        ("ade20k", 512, 2),
        ("cityscapes", 1024, 1),
        ("cocostuff", 512, 2),
    )
} | {"segformer_b5_ade20k_640": ("segformer_b5", "ade20k", 640, 2)}
SEGFORMERPP = {
    "segformerpp_b2_cityscapes": ("segformer_b2", "cityscapes", 1024, 4),
    "segformerpp_b5_cityscapes": ("segformer_b5", "cityscapes", 1024, 4),
    "segformerpp_b5_ade20k_640": ("segformer_b5", "ade20k", 640, 8),
    "segformerpp_b5_cocostuff": ("segformer_b5", "cocostuff", 512, 8),
}
# What all recipes but the embedded data's have in common.
CRITERION = {
    "class_weights": None,
    "auxiliary_weight": 0.4,
    "hard_examples": None,
    "label_smoothing": 0.0,
}
RTFORMER = {
    f"rtformer_{size}_{data}": (f"rtformer_{size}", data)
    for size in ("slim", "base")
    for data in ("ade20k", "camvid", "cityscapes", "cocostuff")
}
PRETRAINING = {f"rtformer_{size}_imagenet": f"rtformer_{size}" for size in ("slim", "base")}


def names(group: str) -> list[str]:
    return sorted(file.stem for file in (CONFIGS / group).glob("*.yaml"))


def values(*arguments: str) -> dict:
    return compose(list(arguments), CONFIGS).values


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_and_survives_saving(experiment, tmp_path):
    composed = values(f"experiment={experiment}")
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(composed))
    assert read_file(saved) == composed
    assert values(f"config={saved}") == composed


def test_every_choice_composes_and_says_what_it_is():
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
    for group in sorted(groups - {"sweep"}):  # sweep.py's
        for name in names(group):
            values(f"{group}={name}")
            first = (CONFIGS / group / f"{name}.yaml").read_text().splitlines()[0]
            assert first.startswith("# "), f"{group}/{name}.yaml"


def test_composing_imports_no_torch():
    program = (
        "import sys; from pathlib import Path; from segtrain.config import compose, help_text\n"
        "folder = Path(sys.argv[1])\n"
        "for name in sys.argv[2:]: compose([f'experiment={name}'], folder)\n"
        "help_text(compose([], folder), folder)\n"
        "heavy = {'torch', 'lightning', 'numpy', 'wandb'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-c", program, str(CONFIGS), *EXPERIMENTS]
    subprocess.run(command, check=True, cwd=CONFIGS.parent)


@pytest.mark.parametrize("name", names("data"))
def test_data_files_name_the_arguments_of_their_data_module(name):
    import data

    module = {
        "ade20k": data.ADE20K,
        "camvid": data.CamVid,
        "cityscapes": data.Cityscapes,
        "cocostuff": data.COCOStuff,
        "imagenet": data.ImageNet,
        "scenes": data.Scenes,
    }[name]
    accepted = set(inspect.signature(module).parameters)
    if "options" in accepted:  # what it hands on
        accepted = accepted - {"options"} | set(inspect.signature(data.SegmentationData).parameters)
    section = values(f"data={name}")["data"]
    assert section.pop("name") == name
    assert section.keys() == accepted


@pytest.mark.parametrize("name", names("model"))
def test_model_files_hold_the_published_values(name):
    import torch

    from segtrain import create_network

    section = values(f"model={name}")["model"]
    assert section.pop("name") == name
    with torch.device("meta"):  # no weights are needed
        network = create_network(name, num_classes=5, **section)
        published = create_network(name, num_classes=5)
    assert str(network) == str(published)
    assert network.training_setting == published.training_setting


def test_every_recipe_is_checked_below():
    tables = (EDAFORMER, SEGFORMER, SEGFORMERPP, RTFORMER, PRETRAINING, PLAIN_VIT, MASKS, EXITS)
    assert set(EXPERIMENTS) == set().union(*tables)


def check_what_the_papers_share(composed, model, data, side, batch_size):
    assert composed["model"]["name"] == model
    assert composed["data"]["name"] == data
    optimizer = {"learning_rate": 6e-5, "betas": [0.9, 0.999], "weight_decay": 0.01}
    assert optimizer.items() <= composed["optimizer"].items()
    schedule = {"steps": 160000, "warmup_steps": 1500, "warmup_factor": 1e-6, "power": 1.0}
    assert schedule.items() <= composed["schedule"].items()
    assert composed["criterion"] == CRITERION | {"reduction": "all"}
    cityscapes = data == "cityscapes"
    images = {
        "batch_size": batch_size,
        "crop_size": [side, side],
        "train_scale": [2048, side],
        "scale_range": [0.5, 2.0],
        "cat_max_ratio": 0.75,
        "photometric": True,
        "eval_scale": None if cityscapes else [2048, side],
    }
    assert images.items() <= composed["data"].items()
    assert composed["inference"] == {
        "mode": "slide" if cityscapes else "whole",
        "window": [1024, 1024],
        "stride": [768, 768],
        "scales": [1.0],
        "flip": False,
    }
    trainer = {"sync_batchnorm": True, "precision": "32-true", "gradient_clip_val": None}
    assert trainer.items() <= composed["trainer"].items()


@pytest.mark.parametrize("name", EDAFORMER)
def test_recipes_of_edaformer(name):
    model, data, side, batch_size = EDAFORMER[name]
    composed = values(f"experiment={name}")
    check_what_the_papers_share(composed, model, data, side, batch_size)
    assert composed["optimizer"]["groups"] == {
        "norm": {"weight_decay_scale": 0.0},
        "decoder": {"learning_rate_scale": 10.0},
    }
    assert composed["data"]["size_divisor"] == (None if data == "cityscapes" else 32)
    assert composed["schedule"]["validate_every"] == (8000 if data == "ade20k" else 4000)
    assert composed["callbacks"]["checkpoints"]["every"] == 4000


@pytest.mark.parametrize("name", SEGFORMER | SEGFORMERPP)
def test_recipes_of_segformer(name):
    model, data, side, batch_size = (SEGFORMER | SEGFORMERPP)[name]
    composed = values(f"experiment={name}")
    check_what_the_papers_share(composed, model, data, side, batch_size)
    assert composed["model"] == {
        "name": model,
        "head": "mmseg",
        "ln_eps": 1e-6,
        "drop_path": 0.1,
        "dropout": 0.1,
        "training_setting": "bsm_hq" if name in SEGFORMERPP else "full",
    }
    # What these rules do to the network: tests/training/test_optimization.py.
    assert composed["optimizer"] == values("optimizer=adamw_segformer")["optimizer"]
    assert composed["data"]["size_divisor"] is None
    assert composed["schedule"]["validate_every"] == 16000
    assert composed["callbacks"]["checkpoints"]["every"] == 16000


@pytest.mark.parametrize("name", RTFORMER)
def test_recipes_of_rtformer(name):
    model, data = RTFORMER[name]
    composed = values(f"experiment={name}")
    small = data in ("ade20k", "cocostuff")  # crops of 512x512, as PaddleSeg has them for ADE20K
    one_injection = small or model == "rtformer_base"
    assert composed["model"] == values(f"model={model}")["model"] | {
        "name": model,
        "head": "segmentation",
        "cross_size": 8 if small and model == "rtformer_slim" else 12,
        "injection": [True, not one_injection],
        "attention": "gfa",
        "drop_path": 0.1 if small else 0.2,
    }
    assert composed["optimizer"] == {
        "name": "adamw",
        "learning_rate": 1e-4 if small else 4e-4,
        "betas": [0.9, 0.999],
        "weight_decay": 0.05 if small else 0.0125,
        "groups": {"decoder": {"learning_rate_scale": 10.0}},
    }
    # The learning rates are compared in tests/training/test_rtformer_step.py.
    steps = {"ade20k": 160000, "cocostuff": 160000, "cityscapes": 120000, "camvid": 37752}
    schedule = {"steps": steps[data], "warmup_steps": 1500, "decay_start": 1500, "power": 1.0}
    assert schedule.items() <= composed["schedule"].items()
    assert composed["criterion"] == CRITERION | {"reduction": "valid"}
    images = {
        "batch_size": 4 if small else 3,
        "crop_size": {"cityscapes": [512, 1024], "camvid": [720, 960]}.get(data, [512, 512]),
        "train_scale": None,
        "scale_range": [0.4, 1.6] if data == "camvid" else [0.5, 2.0],
        "scale_step": None if data == "camvid" else 0.25,
        "cat_max_ratio": 1.0,
        "photometric": "pil",
        "eval_batch_size": 1,
        "eval_scale": [2048, 512] if small else None,
        "size_divisor": 32 if small else None,
    }
    assert images.items() <= composed["data"].items()
    assert composed["inference"]["mode"] == "whole"
    trainer = {"sync_batchnorm": True, "precision": "32-true", "gradient_clip_val": None}
    assert trainer.items() <= composed["trainer"].items()
    assert composed["callbacks"]["ema"] is None


@pytest.mark.parametrize("name", PRETRAINING)
def test_recipes_of_pretraining(name):
    composed = values(f"experiment={name}")
    assert composed["data"]["name"] == "imagenet"
    assert composed["model"] == values(f"model={PRETRAINING[name]}")["model"] | {
        "head": "classification",
        "drop_path": 0.1,
    }
    epoch = 1281167 / 1024  # steps
    assert composed["schedule"]["steps"] == pytest.approx(300 * epoch, rel=0.002)
    assert composed["schedule"]["warmup_steps"] == pytest.approx(5 * epoch, rel=0.002)
    assert composed["criterion"] == CRITERION | {"reduction": "valid", "label_smoothing": 0.1}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_the_batch_is_the_same_on_all_numbers_of_gpus(name):
    lines = (CONFIGS / f"experiment/{name}.yaml").read_text().splitlines()
    comments = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    ((steps, batch),) = re.findall(r"([\d,]+k?) steps of (\d+) (?:crops|images)", comments)
    steps = int(steps.replace(",", "").replace("k", "000"))
    ways = re.findall(r"trainer\.devices=\d+(?: [\w.]+=\d+)*", comments)
    assert len(ways) == 3
    for way in ways:
        composed = values(f"experiment={name}", *way.split())
        assert composed["schedule"]["steps"] == steps
        trainer, data = composed["trainer"], composed["data"]
        parts = trainer["accumulate_grad_batches"]
        assert trainer["devices"] * data["batch_size"] * parts == int(batch), way


def test_a_training_setting_by_its_values(tmp_path):
    by_values = "model.training_setting={stages: [{kv: {mode: bsm, ratio: 0.6}}, {}, {}, {}]}"
    composed = values("experiment=segformerpp_b2_cityscapes", by_values)
    assert composed["model"]["training_setting"] == {
        "stages": [{"kv": {"mode": "bsm", "ratio": 0.6}}, {}, {}, {}]
    }
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(composed))
    assert values(f"config={saved}") == composed
    changed = values(f"config={saved}", "model.training_setting={isr: [2,2,1,1]}")
    assert changed["model"] == composed["model"] | {"training_setting": {"isr": [2, 2, 1, 1]}}


def test_hard_examples_by_some_of_their_values(tmp_path):
    composed = values(
        "experiment=rtformer_slim_cityscapes", "criterion.hard_examples={min_kept: 9}"
    )
    assert composed["criterion"]["hard_examples"] == {"min_kept": 9}
    saved = tmp_path / "config.yaml"
    saved.write_text(to_yaml(composed))
    assert values(f"config={saved}") == composed
    for given, kept in (("{threshold: 0.7}", {"threshold": 0.7}), ("null", None)):
        changed = values(f"config={saved}", f"criterion.hard_examples={given}")
        assert changed["criterion"] == composed["criterion"] | {"hard_examples": kept}
