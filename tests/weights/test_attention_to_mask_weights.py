"""The authors' SegViT and DToP, OpenMMLab's and timm's backbones, into our networks."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from segtrain import UserError, create_network, load_weights

REFERENCE = Path(__file__).parent.parent / "reference" / "plain_vit"
OFFICIAL = {
    "segvit_b": REFERENCE / "segvit_atm_micro.safetensors",
    "dtop_b": REFERENCE / "dtop_micro.safetensors",
}
MICRO = {
    "backbone": "vit_tiny_patch16_384",
    "backbone_arguments": {"embed_dim": 32, "depth": 6, "num_heads": 4},
    "image_size": (128, 128),
    "outputs": (1, 3, 5),
}
OWN = {"segvit_b": {"num_heads": 4, "num_layers": 2}, "dtop_b": {"num_heads": 2}}
CLASSES = {"segvit_b": 7, "dtop_b": 4}


def micro(name, num_classes=None, **arguments):
    values = MICRO | OWN[name] | arguments
    return create_network(name, num_classes or CLASSES[name], **values)


def save(weights, folder):
    torch.save(weights, folder / "weights.pth")
    return folder / "weights.pth"


def refusal(network, path, **arguments):
    with pytest.raises(UserError) as error:
        load_weights(network, path, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("name", OFFICIAL)
def test_the_authors_file_fills_the_network(name):
    network = micro(name)
    report = load_weights(network, OFFICIAL[name])
    assert report.origin == {"segvit_b": "SegViT's authors", "dtop_b": "DToP's authors"}[name]
    assert (report.missing, report.unexpected, report.reshaped) == ((), (), ())
    assert len(report.matched) == len(network.state_dict())
    assert report.notes == ()


@pytest.mark.parametrize("name", OFFICIAL)
def test_another_number_of_classes(name):
    message = refusal(micro(name, 19), OFFICIAL[name])
    if name == "segvit_b":  # whose classifier has one more
        assert "of another shape (decoder.queries.weight (7, 16) for (19, 16)" in message
    else:
        assert "for 4 classes, the network has 19: create it with num_classes=4" in message


def test_another_network():
    message = refusal(micro("segvit_b"), OFFICIAL["dtop_b"])
    assert "of DToP's authors, not for SegViT" in message


def test_the_encoder_of_another_network():
    network, official = micro("dtop_b"), load_file(OFFICIAL["segvit_b"])
    load_weights(network, OFFICIAL["segvit_b"], backbone_only=True)
    theirs = official["backbone.layers.5.attn.attn.in_proj_weight"]
    assert torch.equal(network.encoder.vit.blocks[5].attn.qkv.weight, theirs)


def test_positions_of_another_size(tmp_path):
    network = micro("dtop_b", image_size=(64, 96))
    report = load_weights(network, OFFICIAL["dtop_b"])
    assert (report.missing, report.unexpected, report.reshaped) == ((), (), ())
    positions = load_file(OFFICIAL["dtop_b"])["backbone.pos_embed"]
    expected = network.encoder.resize_positions(positions, (4, 6), (8, 8))
    torch.testing.assert_close(network.encoder.vit.pos_embed.data, expected)


@pytest.mark.parametrize("name", OFFICIAL)
def test_backbones_of_openmmlab_and_timm(name, tmp_path):
    official = load_file(OFFICIAL[name])
    norm = {"ln1.weight": torch.ones(32), "ln1.bias": torch.zeros(32)}
    backbone = {
        key.removeprefix("backbone."): value
        for key, value in official.items()
        if key.startswith("backbone.")
    } | norm
    expected = micro(name)
    load_weights(expected, OFFICIAL[name])
    timm = {
        key.removeprefix("encoder.vit."): value
        for key, value in expected.state_dict().items()
        if key.startswith("encoder.")
    } | {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32), "head.bias": torch.ones(9)}
    for weights in (backbone, timm):
        network = micro(name)
        load_weights(network, save(weights, tmp_path), backbone_only=True)
        for key, value in network.encoder.state_dict().items():
            assert torch.equal(value, expected.encoder.state_dict()[key]), key


def in_authors_names(name, num_classes):
    """What a published file of the full size holds, without the values."""
    from segtrain.weights import dtop, segvit

    def pattern(module):
        return re.compile(re.escape(module).replace(r"\*", r"(\d+)"))

    table = segvit.OFFICIAL if name.startswith("segvit") else dtop.OFFICIAL
    with torch.device("meta"):
        network = create_network(name, num_classes)
    weights = {}
    for key, value in network.state_dict().items():
        module, _, parameter = key.rpartition(".")
        for theirs, ours in table.modules.items():
            if found := pattern(ours).fullmatch(module):
                theirs = theirs.replace("*", "{}").format(*found.groups())
                weights[f"{theirs}.{parameter}"] = torch.zeros(()).expand(value.shape)
    assert len(weights) == len(network.state_dict())
    return weights


@pytest.mark.parametrize(
    ("name", "num_classes", "num_heads", "normalisation"),
    [
        ("segvit_b", 150, 12, "half"),
        ("segvit_l", 171, 16, "half"),
        ("dtop_b", 150, 6, "imagenet"),
        ("dtop_l", 150, 8, "half"),
        ("dtop_l", 171, 16, "half"),
    ],
)
def test_what_the_authors_weights_do_not_show(
    name, num_classes, num_heads, normalisation, tmp_path
):
    path = save(in_authors_names(name, num_classes), tmp_path)
    with torch.device("meta"):
        network = create_network(name[:-1] + {"b": "l", "l": "b"}[name[-1]], 19)
    message = refusal(network, path)
    assert message.split("create the network with ")[1].startswith(
        f'create_network("{name}", num_classes={num_classes}, num_heads={num_heads}, '
        f'normalisation="{normalisation}")'
    )
