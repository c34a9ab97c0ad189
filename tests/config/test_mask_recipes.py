"""The recipes of Mask2Former hold its authors' values; COCO-Stuff and all of PRO-SCALE are ours."""

import re

import pytest
import torch

from segtrain import create_network
from tests.config.test_plain_vit_recipes import CONFIGS, expand, values

# Crop (height x width), long and short side in training, factors of it, long and short side in
# evaluation, steps, steps between validations, and the backbone's batch norms, where it has some.
TABLE = """
{mask2former,proscale}_{swin_t,swin_s}_ade20k          512x512   2048,512   0.5  2048,512  160000 5000
{mask2former,proscale}_{swin_b,swin_l}_ade20k          640x640   2560,640   0.5  2560,640  160000 5000
{mask2former,proscale}_r50_ade20k                      512x512   2048,512   0.5  2048,512  160000 5000 frozen
{mask2former,proscale}_r101_ade20k                     512x512   2048,512   0.5  2048,512  160000 5000 trained

{mask2former,proscale}_swin_{t,s,b,l}_cityscapes       512x1024  4096,1024  0.5  -          90000 5000
{mask2former,proscale}_{r50,r101}_cityscapes           512x1024  4096,1024  0.5  -          90000 5000 trained

{mask2former,proscale}_swin_{t,s,b,l}_cocostuff        1024x1024 1024,1024  0.1  1333,800  368750 7375
{mask2former,proscale}_{r50,r101}_cocostuff            1024x1024 1024,1024  0.1  1333,800  368750 7375 frozen
"""  # noqa: E501
ROWS = [line.split() for line in TABLE.split("\n") if line]
MASKS = {name: row[1:] for row in ROWS for name in expand(row[0])}


def numbers(text: str) -> list[int] | None:
    return None if text == "-" else [int(number) for number in re.split("[x,]", text)]


@pytest.mark.parametrize("name", MASKS)
def test_values_of_the_authors(name):
    crop, train_scale, lowest, eval_scale, steps, every, *norms = MASKS[name]
    model, _, data = name.rpartition("_")
    composed = values(f"experiment={name}")
    title = (CONFIGS / f"experiment/{name}.yaml").read_text().partition("\n")[0]
    assert f" of 16 crops of {crop}, whole images" in title

    expected = values(f"model={model}")["model"]
    assert ("batch_norm" in expected) == bool(norms)
    assert composed["model"] == expected | ({"batch_norm": norms[0]} if norms else {})
    assert composed["optimizer"] == values("optimizer=adamw_mask2former")["optimizer"]
    assert composed["schedule"] == {
        "steps": int(steps),
        "warmup_steps": 0,
        "warmup_factor": 1e-6,
        "power": 0.9,
        "end_factor": 0.0,
        "decay_start": 0,
        "validate_every": int(every),
        "log_every": 50,
    }
    assert int(steps) % int(every) == 0
    assert composed["callbacks"]["checkpoints"]["every"] == int(every)
    assert composed["criterion"]["class_weights"] is None  # a loss of the network's own
    assert composed["criterion"]["hard_examples"] is None
    jitter = data == "cocostuff"
    images = {
        "name": data,
        "batch_size": 2,
        "crop_size": numbers(crop),
        "train_scale": numbers(train_scale),
        "scale_range": [float(lowest), 2.0],
        "scale_step": None if jitter else 0.1,
        "shortest_edge": not jitter,
        "cat_max_ratio": 1.0,
        "joint_crop_offset": jitter,
        "photometric": not jitter,
        "eval_batch_size": 1,
        "eval_scale": numbers(eval_scale),
        "size_divisor": None,  # the network pads
    }
    if data != "cityscapes":  # where nothing needs padding
        images["pad_color"] = [128, 128, 128]
    assert images.items() <= composed["data"].items()
    assert composed["inference"]["mode"] == "whole"
    trainer = {
        "precision": "32-true",
        "gradient_clip_val": 0.01,
        "sync_batchnorm": norms == ["trained"],
    }
    assert trainer.items() <= composed["trainer"].items()


def test_crops_of_cityscapes_need_no_padding():
    composed = values("experiment=mask2former_r50_cityscapes")["data"]
    shortest = composed["train_scale"][1] * composed["scale_range"][0]
    assert shortest >= composed["crop_size"][0]
    assert 2 * shortest >= composed["crop_size"][1]  # images of 1024x2048


@pytest.mark.parametrize("model", ["mask2former", "proscale"])
@pytest.mark.parametrize(
    ("size", "weights"),
    [
        ("r50", "resnet50.tv_in1k"),
        ("r101", "resnet101.tv_in1k"),
        ("swin_t", "swin_tiny_patch4_window7_224.ms_in1k"),
        ("swin_s", "swin_small_patch4_window7_224.ms_in1k"),
        ("swin_b", "swin_base_patch4_window12_384.ms_in1k"),
        ("swin_l", "swin_large_patch4_window12_384.ms_in22k"),
    ],
)
def test_models(model, size, weights):
    section = values(f"model={model}_{size}")["model"]
    # timm's own choice of weights is another one for all but Swin-T.
    assert section["backbone"] == weights
    assert section["drop_path"] == (0.3 if size.startswith("swin") else 0.0)
    assert section["encoder_layers"] == ([3, 3, 3] if model == "proscale" else [0, 0, 6])
    first = (CONFIGS / f"model/{model}_{size}.yaml").read_text().partition("\n")[0]
    with torch.device("meta"):
        network = create_network(**section, num_classes=133)
    learnt = sum(parameter.numel() for parameter in network.parameters())
    assert f": {learnt / 1e6:.1f} M parameters, " in first


@pytest.mark.parametrize("name", [name for name in MASKS if "cocostuff" in name or "pro" in name])
def test_recipes_of_ours_say_so(name):
    second = (CONFIGS / f"experiment/{name}.yaml").read_text().splitlines()[1]
    assert second.startswith("# Not a published recipe but ours, ")
