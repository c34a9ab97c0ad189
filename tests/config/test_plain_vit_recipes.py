"""The recipes of plain vision transformers hold the published values; COCO-Stuff is ours."""

import itertools
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from segtrain import create_network
from segtrain.config import compose

CONFIGS = Path(__file__).parents[2] / "configs"
# Sides of crops and windows, step between windows, images of a step, thousands of steps, the
# backbone's learning rate at first and at last, and the arguments that are not the model's own.
TABLE = """
setr_naive_{b,l}_cityscapes               768  512   8   80  1e-2  1e-4
setr_pup_l_cityscapes                     768  512   8   80  1e-2  1e-4
setr_mla_l_cityscapes                     768  512   8   80  2e-3  1e-4
setr_naive_l_{ade20k,cocostuff}           512  341  16  160  1e-2  1e-4
setr_{pup,mla}_l_{ade20k,cocostuff}       512  341  16  160  1e-3  1e-4

segmenter_{s,l}_cityscapes                768  512   8   80  1e-2  1e-5
segmenter_{ti,s,b}_{ade20k,cocostuff}     512  512   8  160  1e-3  1e-5
segmenter_l_ade20k                        640  640   8  160  1e-3  1e-5
segmenter_l_cocostuff                     512  512   8  160  1e-3  1e-5

cts_s_cityscapes                          768  512   8   80  1e-2  1e-5  training_setting: shared_0.4375
cts_{ti,s,b}_{ade20k,cocostuff}           512  512   8  160  1e-3  1e-5
cts_l_ade20k                              640  640   8  160  1e-3  1e-5
cts_l_cocostuff                           512  512   8  160  1e-3  1e-5
cts_policy_cityscapes                     768    -   8   50  5e-5  0
cts_policy_{ade20k,cocostuff}             512    -   8   50  5e-5  0

dovit_setr_{s,b,l}_cityscapes             768  512   8   80  1e-2  1e-4  training_setting: tau_0.985
dovit_setr_{s,b}_ade20k                   512  341  16  160  1e-2  1e-4  final_norm: false, training_setting: {threshold: [.96, .955, .95]}
dovit_setr_l_ade20k                       512  341  16  160  1e-2  1e-4  auxiliary_convolutions: 2, training_setting: tau_0.98
dovit_setr_{s,b}_cocostuff                512  341  16  160  1e-2  1e-4  final_norm: false
dovit_setr_l_cocostuff                    512  341  16  160  1e-2  1e-4
dovit_segmenter_{s,b,l}_cityscapes        768  512   8   80  1e-2  1e-4  ramp_steps: 70000, training_setting: tau_0.985
dovit_segmenter_{s,b}_{ade20k,cocostuff}  512  480   8  160  1e-3  1e-4  ramp_steps: 140000, normalisation: half

segvit_b_ade20k                           512  341  16  160  2e-5  0
segvit_{l,shrunk_l}_ade20k                640  320  16  160  2e-5  0
segvit_{l,shrunk_l}_cocostuff             512  341  16   80  2e-5  0

dtop_b_ade20k                             512  341  16  160  2e-5  0
dtop_b_ade20k_exits                       512  341  16   40  2e-5  0     training_setting: tau_0.9
dtop_l_ade20k                             640  320  16  160  2e-5  0
dtop_l_ade20k_exits                       640  320  16   40  2e-5  0     training_setting: tau_0.95
dtop_l_cocostuff                          512  341  16  160  2e-5  0     num_heads: 16
dtop_l_cocostuff_exits                    512  341  16   20  2e-5  0     num_heads: 16, training_setting: tau_0.95
"""  # noqa: E501


def expand(pattern: str) -> list[str]:
    """``a_{b,c}`` -> ``a_b`` and ``a_c``."""
    parts = [part.split(",") for part in re.split(r"[{}]", pattern)]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


ROWS = [line.split(maxsplit=7) for line in TABLE.split("\n") if line]
RECIPES = {name: row[1:] for row in ROWS for name in expand(row[0])}


def values(*arguments: str) -> dict[str, Any]:
    return compose(list(arguments), CONFIGS).values


def optimizer_of(name: str) -> dict[str, Any]:
    """What is said of a recipe's optimiser, but for its learning rate."""
    faster_decoder = {"decoder": {"learning_rate_scale": 10.0}}
    if name.startswith("cts_policy"):
        return {"name": "adamw", "betas": [0.9, 0.999], "weight_decay": 0.001, "groups": {}}
    if name.startswith(("segvit", "dtop")):
        groups = {"norm": {"weight_decay_scale": 0.0}} | faster_decoder
        decay = 0.02 if re.fullmatch("segvit_.*cocostuff", name) else 0.01
        return {"name": "adamw", "betas": [0.9, 0.999], "weight_decay": decay, "groups": groups}
    groups = faster_decoder if "setr" in name else {}
    return {"name": "sgd", "momentum": 0.9, "weight_decay": 0.0, "groups": groups}


@pytest.mark.parametrize("name", RECIPES)
def test_published_values(name):
    crop, stride, batch, thousands, first, last, *arguments = RECIPES[name]
    model, data = re.fullmatch("(.*)_(ade20k|cityscapes|cocostuff)(?:_exits)?", name).groups()
    side, policy, city = int(crop), model == "cts_policy", data == "cityscapes"
    composed = values(f"experiment={name}")
    title = (CONFIGS / f"experiment/{name}.yaml").read_text().partition("\n")[0]
    assert f": {thousands}k steps of {batch} crops of {crop}x{crop}, " in title

    expected = values(f"model={model}")["model"] | yaml.safe_load("{" + "".join(arguments) + "}")
    assert composed["model"] == expected | ({} if policy else {"image_size": [side, side]})
    assert composed["optimizer"] == optimizer_of(name) | {"learning_rate": float(first)}
    power = 0.9
    if model.startswith("segvit"):
        power = 2.0 if data == "cocostuff" else 1.0
    schedule = {
        "steps": int(thousands) * 1000,
        "warmup_steps": 1500 if model.startswith(("segvit", "dtop")) else 0,
        "warmup_factor": 1e-6,
        "power": power,
        "end_factor": pytest.approx(float(last) / float(first)),
        "decay_start": 0,
    }
    assert schedule.items() <= composed["schedule"].items()
    assert composed["criterion"] == {
        "reduction": "valid" if model.startswith(("segmenter", "cts")) else "all",
        "class_weights": None,
        "auxiliary_weight": 0.4,
        "hard_examples": None,
        "label_smoothing": 0.0,
    }
    images = {
        "crop_size": [side, side],
        "train_scale": [2048, side],
        "scale_range": [1.0, 1.0] if policy else [0.5, 2.0],
        "cat_max_ratio": 1.0 if policy else 0.75,
        "photometric": not policy,
        "eval_scale": None if city else [2048, side],
        "size_divisor": 32 if policy and not city else None,
    }
    if city:
        # OpenMMLab's base files, and so SETR's and DoViT's, ask for one pixel more.
        images["train_scale"] = [2049, 1025] if "setr" in name or "dovit" in name else [2048, 1024]
    if policy:
        images["superpatches"] = "ignore_void_borders" if data == "ade20k" else "all"
        images["train_scale"] = None if city else images["train_scale"]
    assert images.items() <= composed["data"].items()
    if policy:
        assert composed["inference"]["mode"] == "whole"
    else:
        step = int(stride)
        inference = {"mode": "slide", "window": [side, side], "stride": [step, step]}
        assert composed["inference"] == inference | {"scales": [1.0], "flip": False}
    trainer = {
        "precision": "32-true",
        "gradient_clip_val": 35.0 if model.startswith("segvit") else None,
        "sync_batchnorm": model.startswith(("setr", "dovit", "cts_policy")),
    }
    assert trainer.items() <= composed["trainer"].items()


@pytest.mark.parametrize("name", [expand(row[0])[0] for row in ROWS if len(row) == 8])
def test_networks_take_the_arguments(name):
    arguments = values(f"experiment={name}")["model"]
    with torch.device("meta"):  # no weights are needed
        network = create_network(**arguments, num_classes=5)
    asked = network.resolve_setting(arguments["training_setting"])
    assert network.training_setting == asked


@pytest.mark.parametrize("name", [name for name in RECIPES if "cocostuff" in name])
def test_recipes_of_ours_say_so(name):
    second = (CONFIGS / f"experiment/{name}.yaml").read_text().splitlines()[1]
    assert second.startswith("# Not a published recipe but ours, ")
