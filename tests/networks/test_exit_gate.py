"""The exits of a Mask2Former's encoder (ECO-M2F): drawn in training, chosen by a gate after it."""

import collections

import pytest
import torch

from segtrain import UserError, create_network, load_weights

EXITS = (2, 3, 4)
MICRO = {
    "backbone_arguments": {
        "embed_dim": 16,
        "depths": (1, 1, 1, 1),
        "num_heads": (1, 2, 2, 2),
        "img_size": 64,
    },
    "encoder_layers": (0, 0, 4),
    "decoder_layers": 2,
    "width": 64,  # two channels in a group of the norms, whose means differ between images
    "num_heads": 4,
    "num_queries": 5,
    "encoder_mlp_width": 32,
    "decoder_mlp_width": 32,
}


def micro(**arguments):
    torch.manual_seed(0)
    network = create_network("mask2former_swin_t", 4, **(MICRO | {"exits": EXITS} | arguments))
    return network.eval()


@pytest.fixture
def images():
    return torch.randn(3, 3, 64, 96, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def network(images):
    """A gate that sends the images different ways."""
    network = micro()
    gate = network.decoder.pixels.gate
    seen = []
    hook = gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        for image in images:
            with network.using("gate"):
                network(image[None])
        hook.remove()
        features = torch.cat([gate.describe(level) for level in seen]).double()
        # As many images as exits: one linear layer sends each where it is wanted.
        solution = torch.linalg.lstsq(features, torch.eye(3, dtype=torch.float64)).solution
        gate.head.weight.copy_(solution.T)
        gate.head.bias.zero_()
    return network


@torch.inference_mode()
def test_each_image_ends_where_its_gate_says(network, images):
    for index, layers in enumerate(EXITS):
        image = images[index : index + 1]
        with network.using("gate"):
            gated = network(image)
        with network.using({"encoder": [0, 0, layers], "decoder": 2}):
            torch.testing.assert_close(gated, network(image), rtol=0, atol=0)


@torch.inference_mode()
def test_a_batch_is_gated_image_by_image(network, images):
    with network.using("gate"):
        scores = network(images)
        masks = network.masks(images)
        for index in range(len(images)):
            image = images[index : index + 1]
            torch.testing.assert_close(scores[index], network(image)[0], rtol=0, atol=1e-6)
            torch.testing.assert_close(masks.masks[index], network.masks(image).masks[0])


def test_a_step_trains_the_layers_up_to_its_exit(images):
    network = micro().train()
    drawn = {}
    for network.step in range(6):
        network.zero_grad()
        heads, weight = network(images)
        sum(head.masks.square().mean() + head.classes.square().mean() for head in heads).backward()
        learnt = [
            any(p.grad is not None for p in x.parameters()) for x in network.decoder.pixels.layers
        ]
        drawn[network.step] = sum(learnt)
        assert learnt == sorted(learnt, reverse=True)
        assert weight == sum(learnt) / 4
        assert all(p.grad is None for p in network.decoder.pixels.gate.parameters())
    assert set(drawn.values()) <= set(EXITS)
    for network.step, layers in drawn.items():  # by the step alone, the same on all ranks
        assert network(images[:1]).weight == layers / 4


def test_exits_are_drawn_alike_often(monkeypatch):
    network = micro().train()
    monkeypatch.setattr(network, "_predict", lambda images, layers_run: [layers_run[2]])
    counts = collections.Counter()
    for network.step in range(3000):
        counts.update(network(None).heads)
    assert set(counts) == set(EXITS)
    assert min(counts.values()) > 900


def test_exits_of_an_encoder_that_is_fed_scale_by_scale(images):
    network = micro(encoder_layers=(1, 1, 2), exits=(1, 2), recalibration="linear")
    with torch.inference_mode(), network.using("gate"):
        assert network(images[:1]).shape == (1, 4, 64, 96)


def test_the_gate_is_among_the_weights(tmp_path):
    network = micro()
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    other = micro()
    torch.nn.init.zeros_(other.decoder.pixels.gate.head.weight)
    load_weights(other, tmp_path / "weights.pth")
    assert torch.equal(
        other.decoder.pixels.gate.head.weight, network.decoder.pixels.gate.head.weight
    )


@pytest.mark.parametrize("exits", [[], [0, 2], [3, 2], [2, 2], [4, 5]])
def test_exits_that_there_are_not(exits):
    with pytest.raises(UserError, match="from 1 to 4, ascending"):
        micro(exits=exits)


def test_a_setting_with_a_gate_needs_one():
    network = micro(exits=None)
    assert "gate" not in network.settings
    with pytest.raises(UserError, match="create the network with 'exits'"):
        network.resolve_setting({"encoder": [0, 0, 4], "decoder": 2, "gate": True})
