"""Training ECO-M2F's gate: scores of exits, targets by hand, and the fit of a linear layer."""

import dataclasses
import itertools

import pytest
import torch

from segtrain import UserError, create_network
from segtrain.inference import Inference
from segtrain.networks.exit_gate import ExitGate
from segtrain.training.exit_gate import (
    ExitScores,
    choose_exits,
    computed_once,
    digest_weights,
    exit_settings,
    fit_gate,
    image_qualities,
    score_exits,
)

EXITS = (2, 3, 4)
QUALITIES = [
    [0.50, 0.60, 0.61],
    [0.40, 0.41, 0.60],
    [0.70, 0.70, 0.70],
    [0.30, 0.20, 0.29],
]


def scores(qualities, exits=EXITS, weights=""):
    qualities = torch.tensor(qualities)
    return ExitScores(exits, torch.zeros(len(qualities), 8), qualities, weights)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = create_network(
        "mask2former_swin_t",
        4,
        backbone_arguments={
            "embed_dim": 16,
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 2, 2),
            "img_size": 64,
        },
        encoder_layers=(0, 0, 4),
        decoder_layers=2,
        width=64,
        num_heads=4,
        num_queries=5,
        encoder_mlp_width=32,
        decoder_mlp_width=32,
        exits=EXITS,
    )
    for parameter in network.parameters():  # fewer pixels are of one class, whatever the exit
        if parameter.dim() > 1:
            parameter.data *= 1.5
    return network.eval()


@pytest.fixture
def images():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("beta", "chosen"),
    [
        (0.0, [2, 2, 0, 0]),
        (0.02, [1, 2, 0, 0]),  # the third layer brings 0.01 to the first image
        (0.098, [1, 2, 0, 0]),
        (0.101, [0, 0, 0, 0]),  # two layers bring 0.2 to the second image
    ],
)
def test_targets_by_hand(beta, chosen):
    assert scores(QUALITIES).targets(beta).tolist() == chosen


def test_layers_between_exits_count():
    apart = scores([[0.5, 0.6]], exits=(1, 5))
    assert apart.targets(0.02).tolist() == [1]
    assert apart.targets(0.03).tolist() == [0]


def test_a_larger_beta_never_takes_more_layers():
    qualities = torch.rand(500, 5, generator=torch.Generator().manual_seed(0)).tolist()
    table = scores(qualities, exits=(2, 3, 4, 5, 6))
    depths = [table.targets(beta) for beta in (0, 0.0005, 0.003, 0.01, 0.02, 0.1, 1)]
    for deeper, shallower in itertools.pairwise(depths):
        assert (shallower <= deeper).all()
    assert depths[0].float().mean() > 1.5
    assert not depths[-1].any()


def test_a_linear_rule_is_found():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(600, 8, generator=generator) * torch.logspace(-3, 3, 8) + 100
    features[:, 3] = 1.0  # says nothing
    rule = torch.randn(8, 3, generator=generator)
    standardised = (features - features.mean(0)) / (features.std(0) + 1e-9)
    targets = (standardised @ rule).argmax(dim=1)
    gate = ExitGate(8, EXITS)
    fit_gate(gate, features, targets)
    assert (choose_exits(gate, features) == targets).double().mean() > 0.98
    # As the network has it, from maps.
    level = features[:1, :, None, None].expand(-1, -1, 2, 3)
    assert gate.choose(level) == EXITS[targets[0]]


def test_one_exit_for_all_images_is_found():
    features = torch.randn(50, 8, generator=torch.Generator().manual_seed(0))
    gate = ExitGate(8, EXITS)
    fit_gate(gate, features, torch.ones(50, dtype=torch.int64))
    assert (choose_exits(gate, features) == 1).all()
    assert all(parameter.isfinite().all() for parameter in gate.parameters())


def test_without_a_rule_the_gate_follows_the_frequencies():
    features = torch.randn(4000, 4, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([0, 1, 1, 2]).repeat(1000)
    gate = ExitGate(4, EXITS)
    fit_gate(gate, features, targets)
    probabilities = gate.head(features).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(probabilities, torch.tensor([0.25, 0.5, 0.25]), rtol=0, atol=1e-3)


@torch.inference_mode()
def test_one_pass_of_the_encoder_gives_what_a_pass_for_each_exit_does(network, images):
    pixels = network.decoder.pixels
    computed = []
    parts = [network.encoder.backbone.patch_embed, *(layer.linear1 for layer in pixels.layers)]
    hooks = [
        part.register_forward_pre_hook(lambda module, _: computed.append(module)) for part in parts
    ]
    remembered = [network.encoder, *pixels.input_projections, *pixels.layers]
    with computed_once(remembered):
        once = [under(network, setting, images) for setting in exit_settings(network)]
    for hook in hooks:
        hook.remove()
    assert computed == parts  # each once
    for setting, prediction in zip(exit_settings(network), once, strict=True):
        alone = under(network, setting, images)
        for ours, theirs in zip(prediction, alone, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    assert not torch.equal(once[0].masks, once[1].masks)
    assert all("forward" not in vars(module) for module in remembered)


def under(network, setting, images):
    with network.using(setting):
        return network.masks(images)


def test_scores_of_exits(network, images):
    mask = torch.randint(0, 4, (2, 50, 70), generator=torch.Generator().manual_seed(2))
    mask[0, :20] = 255
    features, qualities = score_exits(network, Inference(), images, mask, 255)
    assert qualities.shape == (2, len(EXITS))
    for index, layers in enumerate(EXITS):
        with network.using({"encoder": [0, 0, layers], "decoder": 2}), torch.inference_mode():
            prediction = Inference()(network, images, (50, 70))
        torch.testing.assert_close(qualities[:, index], image_qualities(prediction, mask, 4, 255))
    level = []
    hook = network.decoder.pixels.gate.register_forward_pre_hook(lambda _, x: level.append(x[0]))
    with network.using("gate"), torch.inference_mode():
        network(images)
    hook.remove()
    torch.testing.assert_close(features, torch.cat(level).mean(dim=(2, 3)))


def test_the_quality_of_an_image_is_that_of_its_own_classes():
    mask = torch.tensor([[[0, 0, 1, 255]], [[2, 2, 2, 2]], [[255, 255, 255, 255]]])
    prediction = torch.tensor([[[0, 3, 1, 1]], [[2, 2, 2, 0]], [[0, 0, 0, 0]]])
    qualities = image_qualities(prediction, mask, 4, 255)
    torch.testing.assert_close(
        qualities, torch.tensor([0.75, 0.75, torch.nan], dtype=torch.float64), equal_nan=True
    )


def test_scores_are_read_as_written(network, tmp_path):
    table = scores(QUALITIES, weights=digest_weights(network))
    table.save(tmp_path / "gate.safetensors")
    read = ExitScores.load(tmp_path / "gate.safetensors", network)
    assert read.exits == table.exits
    assert torch.equal(read.features, table.features)
    assert torch.equal(read.qualities, table.qualities)


def test_scores_of_another_network_are_refused(network, tmp_path):
    path = tmp_path / "gate.safetensors"
    table = scores(QUALITIES, weights=digest_weights(network))
    dataclasses.replace(table, exits=(1, 2, 4)).save(path)
    with pytest.raises(UserError, match=r"scores the exits \[1, 2, 4\], the network has \[2, 3, 4"):
        ExitScores.load(path, network)
    dataclasses.replace(table, weights="0" * 64).save(path)
    with pytest.raises(UserError, match="scores other weights than these"):
        ExitScores.load(path, network)
    path.write_bytes(b"no safetensors")
    with pytest.raises(UserError, match="holds no scores of exits"):
        ExitScores.load(path, network)


def test_a_new_gate_leaves_the_digest(network):
    before = digest_weights(network)
    gate = network.decoder.pixels.gate
    fit_gate(gate, torch.randn(9, 64), torch.arange(9) % 3)
    assert digest_weights(network) == before
    network.decoder.pixels.level_embedding.data += 1
    assert digest_weights(network) != before
