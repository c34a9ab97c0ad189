"""RTFormer's checkpoints from PaddleSeg, and ports in its names, into our network."""

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segtrain import UserError, create_network, load_weights
from segtrain.weights.rtformer import PADDLESEG

REFERENCE = Path(__file__).parent.parent / "reference" / "rtformer"
OFFICIAL = REFERENCE / "rtformer_micro.safetensors"
PADDLE = [REFERENCE / f"rtformer_micro_paddle{version}.pdparams" for version in ("2.6.2", "3.3.1")]
KEYS = json.loads((REFERENCE / "rtformer_micro.json").read_text())["keys"]

MICRO = {
    "base_channels": 4,
    "context_channels": 12,
    "num_heads": 4,
    "head_channels": 10,
    "cross_size": 6,
    "injection": (True, False),
}


def micro(num_classes=19, **arguments):
    return create_network("rtformer_slim", num_classes, **(MICRO | arguments))


def bare(network):
    """A network's state without what only torch's batch norms have."""
    state = network.state_dict()
    return {name: v for name, v in state.items() if not name.endswith("num_batches_tracked")}


def same_state(one, other):
    one, other = bare(one), bare(other)
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def in_official_names(network):
    """Our weights as PaddleSeg names them."""
    theirs = {}
    for key in KEYS:
        ((ours, _),) = PADDLESEG.rename({key: torch.empty(0)})[0].items()
        theirs[ours] = key
        theirs[ours.replace("block4", "block5")] = key.replace("layer4", "layer5")
    return {theirs[name]: value for name, value in bare(network).items()}


def refusal(network, path, **arguments):
    """The one line that refuses a file; the network is left as it was."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(network, path, **arguments)
    message = str(error.value)
    assert "\n" not in message
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())
    return message.replace(str(path), "X")


def follow(message, **untold):
    """Create the network that a message advises, with the values that it leaves open."""
    call = re.search(r"create the network with (create_network\(.*?\))(,? or load|$)", message)[1]
    for argument, value in untold.items():
        call = call.replace(f"{argument}=...", f"{argument}={value}")
    return eval(call, {"create_network": create_network})


def is_full(report):
    return (report.missing, report.unexpected, report.reshaped) == ((), (), ())


def test_official_keys_and_ours_are_one_to_one():
    weights = {key: torch.empty(shape, device="meta") for key, shape in KEYS.items()}
    named, unknown = PADDLESEG.rename(weights)
    assert not unknown
    assert len(named) == len(KEYS) == 261
    ours = {name: value.shape for name, value in bare(micro()).items()}
    assert {name: value.shape for name, value in named.items()} == ours


@pytest.mark.parametrize("path", [OFFICIAL, *PADDLE], ids=["safetensors", "numpy 1", "numpy 2"])
def test_every_form_of_an_official_file_fills_the_network(path):
    official, network = load_file(OFFICIAL), micro()
    report = load_weights(network, path)
    assert is_full(report)
    assert report.origin == "PaddleSeg's RTFormer"
    assert len(report.matched) == len(official)
    for name, key in {
        "encoder.stem.4.running_var": "conv1.4._variance",
        "encoder.stage3.0.shortcut.0.weight": "layer3.0.downsample.0.weight",
        "encoder.stage2.1.norm2.weight": "layer2.1.bn2.weight",
        "encoder.high.0.conv2.weight": "layer3_.0.conv2.weight",
        "encoder.compression.0.running_mean": "compression3.0._mean",
        "encoder.block4.low_shortcut.1.weight": "layer4.attn_shortcut_l.1.weight",
        "encoder.block5.low_attention.key": "layer5.attn_l.k",
        "encoder.block5.low_attention.value": "layer5.attn_l.v",
        # Without effect on the scores, which could not tell that they are lost.
        "encoder.block4.low_attention.norm.bias": "layer4.attn_l.norm.bias",
        "encoder.block5.low_attention.norm.running_mean": "layer5.attn_l.norm._mean",
        "encoder.block4.low_mlp.conv2.bias": "layer4.mlp_l.conv2.bias",
        "encoder.block5.high_mlp.norm.running_var": "layer5.mlp_h.norm._variance",
        "encoder.block5.high_attention.norm.weight": "layer5.attn_h.norm.weight",
        "encoder.block5.high_attention.low_norm.weight": "layer5.cross_kv.0.weight",
        "encoder.block4.high_attention.key_value.weight": "layer4.cross_kv.2.weight",
        "encoder.block4.injection.3.weight": "layer4.down.3.weight",
        "decoder.context.branches.0.2.weight": "spp.scale0.2.weight",
        "decoder.context.branches.4.0.running_mean": "spp.scale4.1._mean",
        "decoder.context.branches.3.2.weight": "spp.scale3.3.weight",
        "decoder.context.processes.0.2.weight": "spp.process1.2.weight",
        "decoder.context.shortcut.0.bias": "spp.shortcut.0.bias",
        "decoder.head.norm2.bias": "seghead.bn2.bias",
        "decoder.head.classifier.bias": "seghead.conv2.bias",
        "decoder.auxiliary_head.conv1.weight": "seghead_extra.conv1.weight",
    }.items():
        assert torch.equal(network.state_dict()[name], official[key]), name


def test_a_port_in_torchs_names_gives_the_same_network(tmp_path):
    official, network, expected = load_file(OFFICIAL), micro(), micro()
    load_weights(expected, OFFICIAL)
    port = {}
    for key, value in official.items():
        key = key.replace("._mean", ".running_mean").replace("._variance", ".running_var")
        port[key] = value
        if key.endswith("running_mean"):
            port[key.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
    torch.save({"state_dict": port}, tmp_path / "port.pth")
    report = load_weights(network, tmp_path / "port.pth")
    assert is_full(report)
    assert len(report.matched) == len(network.state_dict())
    assert same_state(network, expected)
    assert network.encoder.stem[1].num_batches_tracked == 7


# --------------------------------------------------------------------------- what is not in a file


def test_a_file_of_no_recipe_says_what_is_assumed():
    assert load_weights(micro(cross_size=4), OFFICIAL).notes == (
        "fits no recipe of PaddleSeg's RTFormer, the network's own values are assumed: cross_size "
        "and num_heads leave no trace in a file, the network has cross_size=4, num_heads=4",
    )


def taken_for(recipe, cross_size, network_has):
    return (
        f'taken for the recipe "{recipe}" of PaddleSeg\'s RTFormer (cross_size={cross_size}, '
        "num_heads=8): cross_size and num_heads leave no trace in a file, the network has "
        f"cross_size={network_has}, num_heads=8"
    )


def test_a_file_says_which_recipe_it_is_taken_for(tmp_path):
    path = tmp_path / "slim.safetensors"
    network = create_network("rtformer_slim", 19)
    save_file(in_official_names(network), path)
    assert len(load_file(path)) == 271
    assert load_weights(network, path).notes == (taken_for("Slim on Cityscapes", 12, 12),)

    arguments = {"injection": (True, False)}
    network = create_network("rtformer_slim", 150, **arguments, cross_size=8)
    save_file(in_official_names(network), path)
    assert load_weights(network, path).notes == (taken_for("Slim on ADE20K", 8, 8),)
    other = create_network("rtformer_slim", 150, **arguments)
    assert load_weights(other, path).notes == (
        taken_for("Slim on ADE20K", 8, 12),
        "PaddleSeg's RTFormer has cross_size=8, the network 12: create it with cross_size=8 for "
        "equal outputs",
    )
    assert same_state(network, other)


def meta_network(name, num_classes, **arguments):
    with torch.device("meta"):
        return create_network(name, num_classes, **arguments)


SLIM, BASE, ONE = {"name": "rtformer_slim"}, {"name": "rtformer_base"}, {"injection": (True, False)}


@pytest.mark.parametrize(
    ("arguments", "recipe", "cross_size"),
    [
        (SLIM | {"num_classes": 19}, "Slim on Cityscapes", 12),
        (SLIM | {"num_classes": 11}, "Slim on Cityscapes", 12),
        (SLIM | {"num_classes": 150} | ONE, "Slim on ADE20K", 8),
        (SLIM | {"num_classes": 150, "auxiliary_head": False} | ONE, "Slim on ADE20K", 8),
        (SLIM | {"num_classes": 19} | ONE, "", ...),
        (SLIM | {"num_classes": 19, "context_channels": 96}, "", ...),
        (BASE | {"num_classes": 19}, "Base", 12),
        (BASE | {"num_classes": 150}, "Base", 12),
        (BASE | {"num_classes": 19, "injection": (False, False)}, "", ...),
        (BASE | {"num_classes": 19, "head_channels": 64}, "", ...),
        (SLIM | {"num_classes": 19, "base_channels": 48}, "", ...),
    ],
)
def test_weights_tell_what_their_network_is_created_with(arguments, recipe, cross_size):
    weights = meta_network(**arguments).state_dict()
    assert PADDLESEG.read_arguments(weights) == arguments
    assert PADDLESEG.recipe(weights) == recipe
    num_heads = 8 if recipe else ...
    assert PADDLESEG.traceless(weights) == {"cross_size": cross_size, "num_heads": num_heads}
    encoder = {name: value for name, value in weights.items() if name.startswith("encoder.")}
    of_encoder = {"name", "base_channels", "injection"}
    assert PADDLESEG.read_arguments(encoder) == {
        key: value for key, value in arguments.items() if key in of_encoder
    }


def test_weights_of_other_forms_of_the_network():
    weights = meta_network("rtformer_base", 1000, head="classification").state_dict()
    expected = BASE | {"num_classes": 1000, "head": "classification"}
    assert PADDLESEG.read_arguments(weights) == expected
    for attention in ("external", "self", "linformer"):
        weights = meta_network("rtformer_slim", 19, attention=attention).state_dict()
        assert PADDLESEG.read_arguments(weights) == {}


# --------------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    "arguments",
    [
        {"base_channels": 8},
        {"context_channels": 16},
        {"head_channels": 12},
        {"injection": (True, True)},
        {"injection": (False, False)},
        {"auxiliary_head": False},
    ],
)
def test_a_network_of_another_size_gets_the_call_that_it_needs(arguments):
    message = refusal(micro(7, **arguments), PADDLE[0])
    assert "of PaddleSeg's RTFormer, does not fit create_network(" in message
    network = follow(message, cross_size=6, num_heads=4)
    assert is_full(load_weights(network, PADDLE[0]))


def test_a_file_without_an_auxiliary_head(tmp_path):
    official = load_file(OFFICIAL)
    bare = {key: value for key, value in official.items() if not key.startswith("seghead_extra.")}
    save_file(bare, tmp_path / "bare.safetensors")
    message = refusal(micro(), tmp_path / "bare.safetensors")
    assert "auxiliary_head=False" in message
    network = follow(message, cross_size=6, num_heads=4)
    assert is_full(load_weights(network, tmp_path / "bare.safetensors"))
    report = load_weights(micro(), tmp_path / "bare.safetensors", strict=False)
    assert len(report.matched) == len(bare)


def test_another_number_of_classes():
    assert refusal(micro(7), PADDLE[0]) == (
        "weights X: for 19 classes, the network has 7: create it with num_classes=19, or load the "
        "encoder alone with backbone_only=True"
    )


def test_a_network_of_another_kind(tmp_path):
    message = refusal(create_network("segformer_b0", 7), PADDLE[1])
    assert message.startswith("weights X: of PaddleSeg's RTFormer, not for SegFormer: create")
    assert is_full(load_weights(follow(message, cross_size=6, num_heads=4), PADDLE[1]))
    path = tmp_path / "slim.safetensors"
    save_file(
        in_official_names(create_network("rtformer_slim", 150, injection=(True, False))), path
    )
    assert refusal(create_network("segformer_b0", 150), path).endswith(
        'create the network with create_network("rtformer_slim", num_classes=150, '
        "injection=(True, False), cross_size=8, num_heads=8)"
    )


def test_a_resnet_is_not_taken_for_it(tmp_path):
    """Three of its layers have the same names."""
    resnet = {
        f"layer{stage}.{block}.{part}.weight": torch.zeros(4)
        for stage in (1, 2, 3, 4)
        for block in (0, 1)
        for part in ("conv1", "bn1", "conv2", "bn2")
    }
    save_file(resnet, tmp_path / "resnet.safetensors")
    message = refusal(create_network("segformer_b0", 7), tmp_path / "resnet.safetensors")
    assert "of an unknown network, not for SegFormer; its names begin with layer" in message
    message = refusal(micro(), tmp_path / "resnet.safetensors")
    assert "of an unknown network, not for RTFormer; its names begin with layer" in message


# --------------------------------------------------------------------------- ImageNet


@pytest.fixture
def imagenet(tmp_path):
    """An ImageNet file: the encoder, and what else pre-training may have left."""
    content = {
        key: value
        for key, value in load_file(OFFICIAL).items()
        if not key.startswith(("spp.", "seghead"))
    }
    content |= {"fc.weight": torch.zeros(1000, 40), "spp.scale0.2.weight": torch.zeros(5)}
    save_file(content, tmp_path / "imagenet.safetensors")
    return tmp_path / "imagenet.safetensors"


def test_imagenet_file_fills_the_encoder_alone(imagenet):
    network, expected = micro(7), micro()
    load_weights(expected, OFFICIAL)
    decoder = {name: value.clone() for name, value in network.decoder.state_dict().items()}
    report = load_weights(network, imagenet, backbone_only=True)
    assert same_state(network.encoder, expected.encoder)
    assert all(torch.equal(decoder[name], v) for name, v in network.decoder.state_dict().items())
    assert report.unexpected == ("fc.weight",)
    assert report.notes == ()


def test_one_imagenet_file_goes_into_networks_of_any_injection(imagenet):
    report = load_weights(micro(injection=(True, True)), imagenet, backbone_only=True)
    (note,) = report.notes
    assert note == (
        "encoder.block5.injection.0.weight, encoder.block5.injection.0.bias, "
        "encoder.block5.injection.0.running_mean, ...: not in the file, begin with the network's "
        "values"
    )
    report = load_weights(micro(injection=(False, False)), imagenet, backbone_only=True)
    assert report.notes == ()
    assert "encoder.block4.injection.2.weight" in report.unexpected
    assert not report.missing


def test_an_encoder_of_another_size_is_refused(imagenet):
    message = refusal(micro(base_channels=8), imagenet, backbone_only=True)
    assert "base_channels=4" in message


def test_a_network_pretrained_with_ours_comes_back(tmp_path):
    pretrained, network = micro(1000, head="classification"), micro(7)
    torch.save({"state_dict": pretrained.state_dict()}, tmp_path / "last.ckpt")
    report = load_weights(network, tmp_path / "last.ckpt", backbone_only=True)
    assert report.origin == "segtrain"
    assert same_state(network.encoder, pretrained.encoder)
    message = refusal(network, tmp_path / "last.ckpt")
    assert 'num_classes=1000, base_channels=4, injection=(True, False), head="classification"' in (
        message
    )
