"""The files in configs/ compose, agree with what they configure, and hold the published values."""

import inspect
import subprocess
import sys
from pathlib import Path

import pytest

from segtrain.config import compose, read_file, to_yaml

CONFIGS = Path(__file__).parents[2] / "configs"
EXPERIMENTS = sorted(file.stem for file in (CONFIGS / "experiment").glob("*.yaml"))
PUBLISHED = {
    f"edaformer_{size}_{data}": (size, data)
    for size in ("tiny", "base")
    for data in ("ade20k", "cityscapes", "cocostuff")
}


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
    for group in sorted(folder.name for folder in CONFIGS.iterdir() if folder.is_dir()):
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
        "cityscapes": data.Cityscapes,
        "cocostuff": data.COCOStuff,
        "scenes": data.Scenes,
    }[name]
    accepted: set[str] = set()
    for ancestor in inspect.getmro(module):
        if "data." in ancestor.__module__ and "__init__" in vars(ancestor):
            accepted |= set(inspect.signature(ancestor).parameters)
    section = values(f"data={name}")["data"]
    assert section.pop("name") == name
    assert section.keys() == accepted - {"options"}


@pytest.mark.parametrize("name", names("model"))
def test_model_files_hold_the_published_values(name):
    from segtrain import create_network

    section = values(f"model={name}")["model"]
    assert section.pop("name") == name
    network = create_network(name, num_classes=5, **section)
    published = create_network(name, num_classes=5)
    assert str(network) == str(published)


@pytest.mark.parametrize("name", PUBLISHED)
def test_recipes_of_edaformer(name):
    size, data = PUBLISHED[name]
    composed = values(f"experiment={name}")
    assert composed["model"]["name"] == f"edaformer_{size}"
    assert composed["data"]["name"] == data
    assert composed["optimizer"] == {
        "learning_rate": 6e-5,
        "betas": [0.9, 0.999],
        "weight_decay": 0.01,
        "groups": {"norm": {"weight_decay_scale": 0.0}, "decoder": {"learning_rate_scale": 10.0}},
    }
    assert composed["schedule"] == {
        "steps": 160000,
        "warmup_steps": 1500,
        "warmup_factor": 1e-6,
        "power": 1.0,
        "validate_every": 8000 if data == "ade20k" else 4000,
        "log_every": 50,
    }
    assert composed["callbacks"]["checkpoints"]["every"] == 4000
    assert composed["criterion"] == {"reduction": "all", "class_weights": None}
    cityscapes = data == "cityscapes"
    side = 1024 if cityscapes else 512
    batch_size = {"tiny": 2, "base": 1}[size] if cityscapes else 4
    expected = {
        "batch_size": batch_size,
        "crop_size": [side, side],
        "train_scale": [2048, side],
        "scale_range": [0.5, 2.0],
        "cat_max_ratio": 0.75,
        "photometric": True,
        "eval_scale": None if cityscapes else [2048, 512],
        "size_divisor": None if cityscapes else 32,
    }
    assert expected.items() <= composed["data"].items()
    assert composed["inference"] == {
        "mode": "slide" if cityscapes else "whole",
        "window": [1024, 1024],
        "stride": [768, 768],
    }
    assert composed["trainer"]["sync_batchnorm"] is True
    assert composed["trainer"]["precision"] == "32-true"
    assert composed["trainer"]["gradient_clip_val"] is None
