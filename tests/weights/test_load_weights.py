"""Official and own checkpoints into networks, and what is said about those that do not fit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segtrain import UserError, create_network, load_weights
from segtrain.networks.edaformer import EDAFormer
from segtrain.weights.edaformer import OFFICIAL
from segtrain.weights.keys import key_tables

REFERENCE = Path(__file__).parent.parent / "reference" / "edaformer"
OFFICIAL_SHAPES = json.loads((REFERENCE / "edaformer_keys.json").read_text())
MICRO = REFERENCE / "edaformer_micro.safetensors"


def micro(num_classes=19, **arguments):
    sizes = {"widths": (16, 32, 48, 64), "depths": (1, 2, 2, 1), "fuse_width": 24}
    return EDAFormer(num_classes, **(sizes | arguments))


@pytest.fixture(scope="module")
def official():
    return load_file(MICRO)


@pytest.fixture(scope="module")
def imagenet(official):
    """The encoder as an ImageNet file names it, with the classifier of ImageNet."""
    encoder = {
        key.removeprefix("backbone."): value
        for key, value in official.items()
        if key.startswith("backbone.")
    }
    return encoder | {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}


def save(tensors, folder, name="weights.pth"):
    torch.save(tensors, folder / name)
    return folder / name


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


# Parameters with the unused classifier, of which the last column (published totals).
@pytest.mark.parametrize(
    ("size", "num_classes", "total", "unused"),
    [
        ("tiny", 150, 4_949_264, 19_350),
        ("tiny", 19, 4_915_466, 2_451),
        ("tiny", 171, 4_954_682, 22_059),
        ("base", 150, 29_457_516, 19_350),
        ("base", 19, 29_339_878, 2_451),
        ("base", 171, 29_476_374, 22_059),
    ],
)
def test_parameter_totals(size, num_classes, total, unused):
    network = create_network(f"edaformer_{size}", num_classes)
    assert unused == 128 * num_classes + num_classes
    assert sum(p.numel() for p in network.parameters()) == total - unused


@pytest.mark.parametrize("size", ["tiny", "base"])
def test_official_keys_and_ours_are_one_to_one(size):
    shapes = OFFICIAL_SHAPES[size]
    classes = shapes["decode_head.linear_pred.weight"][0]
    network = create_network(f"edaformer_{size}", classes)
    official = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    named, unknown = OFFICIAL.rename(official)
    assert not unknown
    assert len(named) == len(shapes) - 2  # conv_seg's weight and bias
    ours = {name: value.shape for name, value in network.state_dict().items()}
    assert {name: value.shape for name, value in named.items()} == ours


def test_decoder_blocks_are_not_mixed_up(official):
    network = micro()
    load_weights(network, MICRO)
    block = network.decoder.levels[2][0]  # 1/8
    assert torch.equal(block.mlp.expand.weight, official["decode_head.attn2.mlp.fc1.weight"])
    block = network.decoder.levels[0][1]  # 1/32
    assert torch.equal(block.mlp.expand.weight, official["decode_head.attn44.mlp.fc1.weight"])


def test_every_form_of_an_official_file_gives_the_same_network(official, tmp_path):
    expected = micro()
    report = load_weights(expected, MICRO)
    assert len(report.matched) == len(official) - 2
    assert (report.missing, report.unexpected, report.reshaped) == ((), (), ())
    assert "212 loaded" in str(report)
    parallel = {f"module.{key}": value for key, value in official.items()}
    forms = {
        "bare.pth": official,
        "mmseg.pth": {"meta": {"epoch": 3}, "state_dict": parallel, "optimizer": {"state": {}}},
        "model.pth": {"model": official},
    }
    for name, content in forms.items():
        network = micro()
        load_weights(network, save(content, tmp_path, name))
        assert same_state(network, expected), name


def test_own_checkpoints_come_back(tmp_path):
    network, other = micro(), micro()
    save_file(network.state_dict(), tmp_path / "bare.safetensors")
    lightning = {f"network.{key}": value for key, value in network.state_dict().items()}
    lightning |= {"criterion.class_weights": torch.ones(19)}
    save({"state_dict": lightning, "global_step": 5}, tmp_path, "last.ckpt")
    for name in ("bare.safetensors", "last.ckpt"):
        other = micro()
        report = load_weights(other, tmp_path / name)
        assert report.origin == "segtrain"
        assert same_state(network, other)


def test_imagenet_file_fills_the_encoder_alone(official, imagenet, tmp_path):
    path = save(imagenet, tmp_path)
    network = micro(num_classes=7)
    decoder = {name: value.clone() for name, value in network.decoder.state_dict().items()}
    report = load_weights(network, path, backbone_only=True)
    assert report.unexpected == ("head.weight", "head.bias")
    assert report.matched == tuple(f"encoder.{name}" for name in network.encoder.state_dict())
    key = "patch_embed1.proj.weight"
    assert torch.equal(network.encoder.stages[0].embedding.projection.weight, imagenet[key])
    assert all(torch.equal(decoder[name], v) for name, v in network.decoder.state_dict().items())

    with pytest.raises(UserError, match="holds an encoder alone: load it with backbone_only=True"):
        load_weights(network, path)
    short = {key: value for key, value in imagenet.items() if "block3.1" not in key}
    path = save(short, tmp_path)
    with pytest.raises(UserError, match="missing"):
        load_weights(network, path, backbone_only=True)


def test_backbone_only_from_a_segmentation_file():
    network = micro(num_classes=7)
    report = load_weights(network, MICRO, backbone_only=True)
    assert not report.missing
    assert all(name.startswith("encoder.") for name in report.matched)


def test_another_number_of_classes(tmp_path):
    network = micro(num_classes=7)
    with pytest.raises(UserError, match=r"for 19 classes, .* has 7: create it with num_classes=19"):
        load_weights(network, MICRO)
    report = load_weights(network, MICRO, strict=False)
    assert report.reshaped == (
        ("decoder.classifier.weight", (19, 24, 1, 1), (7, 24, 1, 1)),
        ("decoder.classifier.bias", (19,), (7,)),
    )


def test_anything_short_of_a_full_match_is_an_error_and_changes_nothing(official, tmp_path):
    cases = {
        "1 missing": {k: v for k, v in official.items() if k != "backbone.norm2.bias"},
        "1 unexpected": official | {"decode_head.extra.weight": torch.zeros(1)},
        "1 of another shape": official | {"backbone.norm1.weight": torch.zeros(3)},
    }
    for message, weights in cases.items():
        path = save(weights, tmp_path)
        network = micro()
        before = {name: value.clone() for name, value in network.state_dict().items()}
        with pytest.raises(UserError, match=message) as error:
            load_weights(network, path)
        assert "\n" not in str(error.value)
        assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())
        report = load_weights(network, path, strict=False)
        assert len(report.matched) >= 211


def test_another_size_of_the_same_network():
    with pytest.raises(UserError, match="does not fit EDAFormer; names of EDAFormer's authors"):
        load_weights(create_network("edaformer_nano", 19), MICRO)


@pytest.mark.parametrize("strict", [True, False])
def test_another_network(tmp_path, strict):
    resnet = {"conv1.weight": torch.zeros(64, 3, 7, 7), "layer1.0.bn1.weight": torch.zeros(64)}
    with pytest.raises(UserError, match=r"not for EDAFormer; its names begin with conv1\.weight"):
        load_weights(micro(), save(resnet, tmp_path), strict=strict)


def test_a_file_of_a_known_other_network(tmp_path, monkeypatch):
    class Other(EDAFormer):
        __module__ = "segtrain.networks.other"

    network = Other(19, widths=(16, 32, 48, 64), depths=(1, 2, 2, 1), fuse_width=24)
    with pytest.raises(UserError, match="of EDAFormer's authors, not for Other"):
        load_weights(network, MICRO, strict=False)


def test_tables_are_found_by_themselves():
    assert OFFICIAL in key_tables()
