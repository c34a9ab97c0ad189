"""Mask2Former and PRO-SCALE against the official tensors, and what their settings promise."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from segtrain import UserError, create_network
from segtrain.networks.mask_prediction import MaskPrediction
from segtrain.weights.mask2former import AUTHORS
from tests.training.recorded_criterion import LOSS, Replayed, official_points, official_targets

REFERENCE = Path("tests/reference/mask2former_proscale")
MICRO = json.loads((REFERENCE / "micro.json").read_text())
TENSORS = load_file(REFERENCE / "proscale_micro_io.safetensors")
PLAIN_TENSORS = load_file(REFERENCE / "mask2former_micro_io.safetensors")
IMAGES = torch.zeros(2, 3, 64, 96)  # whose maps are stored
SIZES = {
    "backbone_arguments": {"embed_dim": 16, "depths": (1, 1, 1, 1), "num_heads": (1, 2, 4, 8)},
    "num_queries": 10,
    "decoder_layers": 3,
    "width": 32,
    "num_heads": 4,
    "encoder_mlp_width": 64,
    "decoder_mlp_width": 64,
}


class StoredMaps(nn.Module):
    """Gives the reference's maps in the place of a backbone's."""

    def forward(self, images):
        return [TENSORS[f"in.res{number}"] for number in (2, 3, 4, 5)]


class StoredPlainMaps(nn.Module):
    def forward(self, images):
        return [PLAIN_TENSORS[f"in.res{number}"] for number in (2, 3, 4, 5)]


def micro(name="proscale_swin_t", **arguments):
    return create_network(name, 19, **(SIZES | arguments))


def official(network, weights, maps):
    """A network with the reference's head behind the reference's maps."""
    named, unknown = AUTHORS.rename(weights)
    assert not unknown
    parameters = {name for name in network.state_dict() if name.startswith("decoder.")}
    assert named.keys() == parameters
    network.load_state_dict(named, strict=False)
    network.encoder = maps
    return network.eval()


def plain():
    return official(
        micro("mask2former_swin_t", encoder_layers=(0, 0, MICRO["mask2former"]["encoder_layers"])),
        load_file(REFERENCE / "mask2former_micro.safetensors"),
        StoredPlainMaps(),
    )


def proscale(setting):
    """PRO-SCALE in one of the reference's configurations."""
    stored = MICRO["settings"][setting]
    weights = load_file(REFERENCE / "proscale_micro.safetensors")
    for name, value in load_file(REFERENCE / "proscale_micro_delta.safetensors").items():
        prefix, _, key = name.partition("/")
        if prefix == stored["weights_delta_prefix"]:
            weights[key] = value
    weights = {key: value for key, value in weights.items() if key not in stored["keys_absent"]}
    config = stored["config"]
    network = micro(
        encoder_layers=tuple(config["PROSCALE_NUM_LAYERS"]),
        residual=config["RESIDUAL"],
        recalibration={None: None, False: "linear", True: "convolution"}[config["IS_EXCITE_CONV"]],
        pixel_embedding={"maxpool": "max_pool", "conv": "convolution"}[config["MASK_OUTPUT_OPS"]],
        temperature=config["EXCITE_TEMP"],
    )
    return official(network, weights, StoredMaps())


def assert_near(value, stored):
    torch.testing.assert_close(value, stored, rtol=0, atol=1e-4)


def assert_as_stored(network, stored):
    """All that is stored of a configuration, in evaluation and in training."""
    with torch.no_grad():
        features = network.decoder.pixels(network.encoder(IMAGES), network.setting.encoder)
        classes, masks = network.masks(IMAGES)
        scores = network(IMAGES)
        heads = network.train()(IMAGES).heads
    for number, level in enumerate(features.levels):
        assert_near(level, stored[f"ms{number}"])
    if "mask_features" in stored:
        assert_near(features.pixels, stored["mask_features"])
    for head in (heads[0], (classes, masks)):
        assert_near(head[0], stored["pred_logits"])
        assert_near(head[1], stored["pred_masks"])
    assert len(heads) == 4
    for number, head in enumerate(heads[1:]):
        assert_near(head.classes, stored[f"aux{number}.pred_logits"])
        if f"aux{number}.pred_masks" in stored:
            assert_near(head.masks, stored[f"aux{number}.pred_masks"])
    step = 4 if "semseg_sub4" in stored else 8
    assert_near(scores[..., ::step, ::step], stored[f"semseg_sub{step}"])
    assert torch.equal(scores.argmax(dim=1), stored["semseg_argmax"].long())


def test_mask2former_of_the_official_code():
    assert_as_stored(plain(), PLAIN_TENSORS)


@pytest.mark.parametrize("setting", MICRO["settings"])
def test_proscale_of_the_official_code(setting):
    prefix = f"{setting}/"
    stored = {
        name.removeprefix(prefix): value
        for name, value in TENSORS.items()
        if name.startswith(prefix)
    }
    assert_as_stored(proscale(setting), stored)


def test_encoder_layers_and_recalibration_of_the_official_code():
    network = proscale("base")
    outputs = {}
    pixels = network.decoder.pixels
    calls = iter(range(2))
    pixels.recalibration.register_forward_hook(
        lambda module, args, out: outputs.update({f"trc_call{next(calls)}.out": out})
    )
    for number, layer in enumerate(pixels.layers):
        layer.register_forward_hook(
            lambda module, args, out, number=number: outputs.update({f"enc_layer{number}.out": out})
        )
    with torch.no_grad():
        network.masks(IMAGES)
    assert len(outputs) == 5
    for name, value in outputs.items():
        assert_near(value, TENSORS[f"base/tap.{name}"])


def test_loss_and_gradients_of_the_official_code():
    network = proscale("base").train()
    criterion = Replayed(official_points(), num_points=LOSS["num_points"])
    total = criterion.loss(network(IMAGES), official_targets())
    assert total.item() == pytest.approx(LOSS["weighted_total"], rel=1e-5)
    total.backward()
    gradients = {name: value.grad for name, value in network.decoder.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    for key, norm in LOSS["grad_norms"].items():
        part = "" if key.startswith("predictor.") else "pixel_decoder."
        (name,) = AUTHORS.rename({f"sem_seg_head.{part}{key}": torch.zeros(1)})[0]
        gradient = gradients[name.removeprefix("decoder.")]
        assert gradient.norm().item() == pytest.approx(norm, rel=1e-4), key


def test_settings_leave_layers_out():
    network = proscale("l123")
    assert list(network.settings) == ["full", "layers_122", "layers_111"]
    assert network.settings["layers_111"].values == {
        "encoder": [1, 1, 1],
        "decoder": 3,
        "gate": False,
    }
    scores = {}
    with torch.no_grad():
        for name in network.settings:
            with network.using(name):
                scores[name] = network(IMAGES)
        with network.using({"encoder": [0, 0, 0], "decoder": 0}) as setting:
            assert setting.name == "layers_000_decoder_0"
            assert network(IMAGES).shape == (2, 19, 64, 96)
    assert not torch.equal(scores["full"], scores["layers_122"])
    assert network.setting.name == "full"


@torch.no_grad()
def test_fewer_decoder_layers_give_what_those_layers_predict_in_training():
    network = proscale("base")
    heads = network.train()(IMAGES).heads
    network.eval()
    for layers, head in enumerate(heads[1:]):
        with network.using({"encoder": [1, 1, 1], "decoder": layers}):
            classes, masks = network.masks(IMAGES)
        assert_near(classes, head.classes)
        assert_near(masks, head.masks)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"encoder": [2, 1, 1], "decoder": 3}, "'encoder' of a setting is at most [1, 1, 1]"),
        ({"encoder": [1, 1], "decoder": 3}, "'encoder' of a setting is at most [1, 1, 1]"),
        ({"encoder": [1, 1, 1], "decoder": 4}, "'decoder' of a setting is at most 3"),
        ({"encoder": [1, 1, -1], "decoder": 3}, "counts the layers of each stage"),
        ({"encoder": 3, "decoder": 3}, "counts the layers of each stage, not 3"),
        ({"encoder": [1, 1, 1], "decoder": True}, "'decoder' of a setting counts layers"),
        ({"encoder": [1, 1, 1], "decoder": 3, "gate": True}, "needs a gate"),
        ({"encoder": [1, 1, 1]}, "decoder is missing"),
        ({"encoders": [1, 1, 1], "decoder": 3}, "no field 'encoders': did you mean 'encoder'?"),
    ],
)
def test_settings_that_do_not_fit(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        micro(encoder_layers=(1, 1, 1)).resolve_setting(values)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"encoder_layers": (3, 3)}, "'encoder_layers' counts the layers at stride 32"),
        ({"encoder_layers": (3, 3, 0.5)}, "'encoder_layers' counts"),
        ({"width": 48, "num_heads": 4}, "width=48 is to be a multiple of"),
        ({"num_queries": 0}, "at least 1"),
        ({"exits": (2, 1)}, "'exits' are numbers of layers"),
        ({"exits": (2, 4)}, "from 1 to 3"),
        ({"recalibration": "conv"}, "no recalibration 'conv'"),
        ({"pixel_embedding": "pool"}, "no pixel_embedding 'pool'"),
        ({"backbone": "vit_tiny_patch16_384"}, "stride"),
    ],
)
def test_arguments_that_do_not_fit(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        micro(**arguments)


@torch.no_grad()
def test_images_of_any_size_are_padded_below_and_right():
    network = micro("mask2former_swin_t").eval()
    images = torch.randn(2, 3, 70, 45)
    padded = nn.functional.pad(images, (0, 19, 0, 26))
    classes, masks = network.masks(images)
    assert masks.shape == (2, 10, 24, 16)
    torch.testing.assert_close(network.masks(padded), MaskPrediction(classes, masks))
    scores = network(images)
    assert scores.shape == (2, 19, 70, 45)
    torch.testing.assert_close(scores, network(padded)[:, :, :70, :45])


@torch.no_grad()
def test_as_published_gives_the_same_scores():
    network = micro().eval()
    images = torch.randn(1, 3, 64, 96)
    scores = network(images)
    network.as_published = True
    torch.testing.assert_close(network(images), scores, rtol=0, atol=1e-5)
