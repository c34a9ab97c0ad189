"""SegFormer's checkpoints from OpenMMLab, the authors and Hugging Face, into our network."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segtrain import UserError, create_network, load_weights
from segtrain.networks.edaformer import EDAFormer
from segtrain.networks.segformer import SegFormer

REFERENCE = Path(__file__).parent.parent / "reference"
OPENMMLAB = REFERENCE / "segformerpp" / "segformerpp_micro.safetensors"
HUGGING_FACE = REFERENCE / "segformer_hf" / "segformer_hf_micro.safetensors"
EDAFORMER = REFERENCE / "edaformer" / "edaformer_micro.safetensors"

MICRO = {"widths": (16, 32, 48, 64), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 2, 1)}
HF_MICRO = {"widths": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4), "depths": (1, 1, 1, 1)}


def openmmlab_micro(num_classes=19, **arguments):
    return SegFormer(num_classes, **({**MICRO, "head_width": 32} | arguments))


def authors_micro(num_classes=19, **arguments):
    head = {"head": "nvlabs", "head_width": 24, "ln_eps": "mixed"}
    return SegFormer(num_classes, **(MICRO | head | arguments))


def hf_micro(num_classes=19, **arguments):
    head = {"head": "nvlabs", "head_width": 24, "ln_eps": 1e-5}
    return SegFormer(num_classes, **(HF_MICRO | head | arguments))


def eda_micro():
    return EDAFormer(19, widths=(16, 32, 48, 64), depths=(1, 2, 2, 1), fuse_width=24)


def randomise(module):
    """Make no parameter or statistic trivial."""
    with torch.no_grad():
        for value in module.parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.2)
        for name, value in module.named_buffers():
            if name.endswith("running_mean"):
                value.normal_()
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2)
    return module.eval()


def in_authors_names(network):
    """Our weights as NVlabs' code names and orders them, with the classifier it never calls."""
    named = {}
    for name, value in network.state_dict().items():
        if stage := re.match(r"encoder\.stages\.(\d)\.", name):
            number, rest = int(stage[1]) + 1, name[stage.end() :]
            rest = re.sub(r"^embedding\.projection", f"patch_embed{number}.proj", rest)
            rest = re.sub(r"^embedding\.norm", f"patch_embed{number}.norm", rest)
            rest = re.sub(r"^norm", f"norm{number}", rest)
            rest = re.sub(r"^blocks", f"block{number}", rest)
            for ours, theirs in {
                "attention.query": "attn.q",
                "attention.key_value": "attn.kv",
                "attention.projection": "attn.proj",
                "attention.reduction": "attn.sr",
                "attention.norm": "attn.norm",
                "mlp.expand": "mlp.fc1",
                "mlp.depthwise": "mlp.dwconv.dwconv",
                "mlp.contract": "mlp.fc2",
            }.items():
                rest = rest.replace(ours, theirs)
            named[f"backbone.{rest}"] = value
        elif level := re.match(r"decoder\.levels\.(\d)\.projection\.", name):
            value = value.flatten(1) if value.ndim == 4 else value  # a linear layer there
            named[f"decode_head.linear_c{int(level[1]) + 1}.proj.{name[level.end() :]}"] = value
        else:
            for ours, theirs in {
                "decoder.fuse.": "linear_fuse.conv.",
                "decoder.fuse_norm.": "linear_fuse.bn.",
                "decoder.classifier.": "linear_pred.",
            }.items():
                if name.startswith(ours):
                    named[f"decode_head.{theirs}{name.removeprefix(ours)}"] = value
    assert len(named) == len(network.state_dict())
    named["decode_head.conv_seg.weight"] = torch.zeros(network.num_classes, 128, 1, 1)
    named["decode_head.conv_seg.bias"] = torch.zeros(network.num_classes)
    return named


def of_imagenet(weights, prefix="backbone."):
    """The encoder as an ImageNet file has it, with the classifier of ImageNet."""
    encoder = {k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)}
    return encoder | {"head.weight": torch.zeros(1000, 64), "head.bias": torch.zeros(1000)}


def save(tensors, folder, name="weights.pth"):
    torch.save(tensors, folder / name)
    return folder / name


def same_state(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def refusal(network, path, **arguments):
    """The one line that refuses a file; the network is left as it was."""
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(UserError) as error:
        load_weights(network, path, **arguments)
    message = str(error.value)
    assert "\n" not in message
    assert str(path) in message
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())
    return message.replace(str(path), "X")


def follow(message):
    """Create the network that a message advises."""
    call = re.search(r"create the network with (create_network\(.*?\))(,? or load|$)", message)[1]
    return eval(call, {"create_network": create_network})


def is_full(report):
    return (report.missing, report.unexpected, report.reshaped) == ((), (), ())


# --------------------------------------------------------------------------- OpenMMLab


def test_openmmlab_file_fills_the_network():
    official, network = load_file(OPENMMLAB), openmmlab_micro()
    report = load_weights(network, OPENMMLAB)
    assert is_full(report)
    assert report.origin == "OpenMMLab's SegFormer"
    assert len(report.matched) == len(network.state_dict())
    assert report.notes == ()
    # Rows of the packed projection: query | key | value.
    attention = "backbone.layers.2.1.1.attn.attn"
    block = network.encoder.stages[2].blocks[1]
    for parameter in ("weight", "bias"):
        query, key, value = official[f"{attention}.in_proj_{parameter}"].split(48)
        assert torch.equal(getattr(block.attention.query, parameter), query)
        assert torch.equal(getattr(block.attention.key_value, parameter)[:48], key)
        assert torch.equal(getattr(block.attention.key_value, parameter)[48:], value)
    hidden = official["backbone.layers.2.1.1.ffn.layers.0.weight"]
    assert torch.equal(block.mlp.expand.weight, hidden[:, :, 0, 0])
    fuse = official["decode_head.fusion_conv.conv.weight"]
    assert torch.equal(network.decoder.fuse.weight, fuse)
    variance = official["decode_head.convs.1.bn.running_var"]
    assert torch.equal(network.decoder.levels[1].norm.running_var, variance)


def test_openmmlab_checkpoint_as_saved_in_training(tmp_path):
    parallel = {f"module.{key}": value for key, value in load_file(OPENMMLAB).items()}
    path = save({"meta": {"epoch": 3}, "state_dict": parallel, "optimizer": {}}, tmp_path)
    network, expected = openmmlab_micro(), openmmlab_micro()
    load_weights(expected, OPENMMLAB)
    assert is_full(load_weights(network, path))
    assert same_state(network, expected)


def test_openmmlab_imagenet_file(tmp_path):
    path = save(of_imagenet(load_file(OPENMMLAB)), tmp_path)
    network, expected = openmmlab_micro(7, ln_eps=1e-5), openmmlab_micro()
    load_weights(expected, OPENMMLAB)
    decoder = {name: value.clone() for name, value in network.decoder.state_dict().items()}
    report = load_weights(network, path, backbone_only=True)
    assert report.unexpected == ("head.weight", "head.bias")
    assert report.notes == ()
    assert same_state(network.encoder, expected.encoder)
    assert all(torch.equal(decoder[name], v) for name, v in network.decoder.state_dict().items())
    assert refusal(network, path).endswith(
        "holds an encoder alone: load it with backbone_only=True"
    )


# --------------------------------------------------------------------------- the authors


def test_authors_file_comes_back(tmp_path):
    network, other = randomise(authors_micro()), authors_micro()
    path = save({"state_dict": in_authors_names(network), "meta": {}}, tmp_path)
    report = load_weights(other, path)
    assert is_full(report)
    assert report.origin == "NVlabs' SegFormer"
    assert report.notes == ()
    assert same_state(network, other)


def test_authors_imagenet_file(tmp_path):
    network, other = randomise(authors_micro()), openmmlab_micro(7)
    path = save(of_imagenet(in_authors_names(network)), tmp_path)
    report = load_weights(other, path, backbone_only=True)
    assert report.origin == "NVlabs' SegFormer"
    assert report.unexpected == ("head.weight", "head.bias")
    assert same_state(network.encoder, other.encoder)
    assert "holds an encoder alone" in refusal(other, path)


def test_authors_and_edaformers_names_are_told_apart(tmp_path):
    """EDAFormer's authors kept most of the names; of an ImageNet file, all that they have."""
    eda = load_file(EDAFORMER)
    mit = in_authors_names(randomise(authors_micro()))
    eda_imagenet = save(of_imagenet(eda), tmp_path, "eda.pth")
    mit_imagenet = save(of_imagenet(mit), tmp_path, "mit.pth")

    for path in (EDAFORMER, eda_imagenet):
        report = load_weights(eda_micro(), path, backbone_only=True)
        assert report.origin == "EDAFormer's authors"
        for strict in (True, False):
            message = refusal(authors_micro(), path, backbone_only=True, strict=strict)
            assert "of EDAFormer's authors, not for SegFormer" in message
    for path in (save(mit, tmp_path), mit_imagenet):
        report = load_weights(authors_micro(), path, backbone_only=True)
        assert report.origin == "NVlabs' SegFormer"
        for strict in (True, False):
            message = refusal(eda_micro(), path, backbone_only=True, strict=strict)
            assert "of NVlabs' SegFormer, not for EDAFormer: create the network with" in message


# --------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def transformers():
    """The library, with the network out of its reach."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    return transformers


@pytest.fixture(scope="module")
def hf_config(transformers):
    def create(**arguments):
        sizes = {"depths": [1, 1, 2, 1], "hidden_sizes": [8, 16, 24, 32], "decoder_hidden_size": 24}
        heads = {"num_attention_heads": [1, 2, 3, 4], "num_labels": 5}
        return transformers.SegformerConfig(**(sizes | heads | arguments))

    return create


@pytest.fixture(scope="module")
def hf_model(transformers, hf_config):
    torch.manual_seed(0)
    return randomise(transformers.SegformerForSemanticSegmentation(hf_config()))


@pytest.fixture
def hf_folder(hf_model, tmp_path):
    hf_model.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def deeper_hf_micro(**arguments):
    return hf_micro(5, **({"depths": (1, 1, 2, 1)} | arguments))


def in_old_format(folder):
    """Put a folder's weights into a pickle, as transformers wrote them before safetensors."""
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return save(weights, folder, "pytorch_model.bin")


def test_hugging_face_file_fills_the_network():
    official, network = load_file(HUGGING_FACE), hf_micro()
    report = load_weights(network, HUGGING_FACE)
    assert is_full(report)
    assert report.origin == "Hugging Face's SegFormer"
    assert report.notes == ()
    attention = network.encoder.stages[2].blocks[0].attention
    for name, rows in {"key": slice(24), "value": slice(24, 48)}.items():
        theirs = official[f"segformer.encoder.block.2.0.attention.self.{name}.weight"]
        assert torch.equal(attention.key_value.weight[rows], theirs)
    theirs = official["decode_head.linear_c.3.proj.weight"]
    assert torch.equal(network.decoder.levels[3].projection.weight.flatten(1), theirs)


PUBLISHED = {
    "segformer_b0": {},
    "segformer_b2": {
        "depths": [3, 4, 6, 3],
        "hidden_sizes": [64, 128, 320, 512],
        "decoder_hidden_size": 768,
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_hugging_face_model_gives_equal_logits(transformers, name, tmp_path):
    torch.manual_seed(0)
    config = transformers.SegformerConfig(num_labels=7, **PUBLISHED[name])
    model = randomise(transformers.SegformerForSemanticSegmentation(config))
    model.save_pretrained(tmp_path)
    network = create_network(name, 7, head="nvlabs", ln_eps=1e-5).eval()
    report = load_weights(network, tmp_path)
    assert is_full(report)
    assert report.notes == ()
    images = torch.randn(1, 3, 96, 128)
    with torch.inference_mode():
        torch.testing.assert_close(network(images), model(images).logits, atol=1e-4, rtol=0)


def test_every_form_of_a_hugging_face_model_gives_the_same_network(
    transformers, hf_model, hf_folder, tmp_path
):
    expected = deeper_hf_micro()
    assert is_full(load_weights(expected, hf_folder))

    forms = [hf_folder / "model.safetensors", save(hf_model.state_dict(), tmp_path)]
    assert any("q_proj" in name for name in torch.load(forms[1]))  # transformers 5 in memory
    forms.append(tmp_path / "memory.safetensors")
    save_file(hf_model.state_dict(), forms[-1])
    hf_model.save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    forms.append(tmp_path / "sharded")
    hf_model.save_pretrained(tmp_path / "old")
    in_old_format(tmp_path / "old")
    forms.append(tmp_path / "old")
    for form in forms:
        network = deeper_hf_micro()
        assert is_full(load_weights(network, form)), form
        assert same_state(network, expected), form


def test_hugging_face_encoders(transformers, hf_config, hf_model, tmp_path):
    encoder = deeper_hf_micro()
    hf_model.save_pretrained(tmp_path / "whole")
    load_weights(encoder, tmp_path / "whole")

    bare = hf_model.segformer
    bare.save_pretrained(tmp_path / "bare")
    classifier = transformers.SegformerForImageClassification(hf_config())
    classifier.segformer.load_state_dict(bare.state_dict())
    classifier.save_pretrained(tmp_path / "classifier")
    forms = {
        tmp_path / "whole": (),
        tmp_path / "bare": (),
        save(bare.state_dict(), tmp_path): (),
        tmp_path / "classifier": ("classifier.bias", "classifier.weight"),
        save(classifier.state_dict(), tmp_path, "c.pth"): ("classifier.weight", "classifier.bias"),
    }
    for form, unexpected in forms.items():
        network = openmmlab_micro(3, **HF_MICRO | {"depths": (1, 1, 2, 1)})
        report = load_weights(network, form, backbone_only=True)
        assert report.origin == "Hugging Face's SegFormer"
        assert report.unexpected == unexpected
        assert report.notes == ()
        assert same_state(network.encoder, encoder.encoder), form
    assert "holds an encoder alone" in refusal(network, tmp_path / "bare")
    assert "holds an encoder alone" in refusal(network, tmp_path / "classifier")


def change_config(folder, **values):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_what_config_json_tells_and_weights_do_not(hf_folder):
    for arguments in ({}, {"strict": False}, {"backbone_only": True}):
        message = refusal(deeper_hf_micro(num_heads=(1, 2, 2, 4)), hf_folder, **arguments)
        assert message == (
            "weights X: config.json asks for num_heads=(1, 2, 3, 4), which the weights do not "
            "show, the network has (1, 2, 2, 4): create it with num_heads=(1, 2, 3, 4)"
        )
    change_config(hf_folder, strides=[4, 2, 2, 1])
    message = refusal(deeper_hf_micro(), hf_folder, strict=False)
    assert "config.json has strides [4, 2, 2, 1], segtrain's SegFormer [4, 2, 2, 2]" in message
    change_config(hf_folder, strides=[4, 2, 2, 2], hidden_act="relu")
    assert "hidden_act 'relu', segtrain's SegFormer 'gelu'" in refusal(deeper_hf_micro(), hf_folder)
    change_config(hf_folder, hidden_act="gelu", num_attention_heads="many")
    assert "asks for num_heads='many'" in refusal(deeper_hf_micro(), hf_folder)


def test_another_model_type(hf_folder):
    change_config(hf_folder, model_type="swin")
    message = refusal(deeper_hf_micro(), hf_folder, strict=False)
    assert (
        message
        == "weights X: config.json is of model_type 'swin', segtrain reads: mask2former, segformer"
    )


def test_code_in_a_hugging_face_folder(hf_folder):
    path = in_old_format(hf_folder)
    torch.save(torch.load(path) | {"extra": os.getcwd}, path)
    assert re.search(r"holds code \(\w+\.getcwd\)", refusal(deeper_hf_micro(), hf_folder))


# --------------------------------------------------------------------------- misfits


def test_the_message_tells_which_network_to_create(tmp_path):
    """Every piece of advice, followed, loads the file."""

    def saved(name, **arguments):
        network = create_network(name, **arguments)
        return save(network.state_dict(), tmp_path, "own.pth"), network

    # Our own file, of another variant, head and number of classes.
    path, _ = saved("segformer_b1", num_classes=5, head="nvlabs")
    network = create_network("segformer_b0", 19)
    message = refusal(network, path)
    assert message == (
        'weights X: of segtrain, does not fit create_network("segformer_b0", num_classes=19): '
        'create the network with create_network("segformer_b1", num_classes=5, head="nvlabs")'
    )
    assert is_full(load_weights(follow(message), path))

    # The authors' file into the other head.
    path = save(in_authors_names(create_network("segformer_b0", 5, head="nvlabs")), tmp_path)
    message = refusal(network, path)
    assert message == (
        "weights X: of NVlabs' SegFormer, does not fit "
        'create_network("segformer_b0", num_classes=19, ln_eps=1e-06): create the network with '
        'create_network("segformer_b0", num_classes=5, head="nvlabs", ln_eps="mixed"), '
        "or load the encoder alone with backbone_only=True"
    )
    report = load_weights(follow(message), path)
    assert is_full(report)
    assert report.notes == ()
    assert is_full(load_weights(network, path, backbone_only=True))
    # Not SegFormer at all.
    message = refusal(eda_micro(), path, strict=False)
    assert is_full(load_weights(follow(message), path))


def test_larger_variants_have_a_wider_authors_head(tmp_path):
    with torch.device("meta"):
        weights = in_authors_names(create_network("segformer_b2", 150, head="nvlabs"))
    weights = {name: torch.zeros(()).expand(value.shape) for name, value in weights.items()}
    message = refusal(create_network("segformer_b0", 19), save(weights, tmp_path))
    assert 'create_network("segformer_b2", num_classes=150, head="nvlabs", ln_eps="m' in message


def test_sizes_that_nobody_published():
    message = refusal(create_network("segformer_b0", 150), OPENMMLAB)
    assert message.endswith(
        'create the network with create_network("segformer_b0", num_classes=19, '
        "widths=(16, 32, 48, 64), num_heads=..., depths=(1, 1, 2, 1), head_width=32, ln_eps=1e-06)"
    )
    network = follow(message.replace("num_heads=...", "num_heads=(1, 2, 3, 4)"))
    assert is_full(load_weights(network, OPENMMLAB))


def test_a_folder_also_tells_the_heads(hf_folder):
    message = refusal(create_network("segformer_b0", 5), hf_folder)
    assert "num_heads=(1, 2, 3, 4)" in message
    assert is_full(load_weights(follow(message), hf_folder))
    message = refusal(deeper_hf_micro(depths=(1, 1, 1, 1)), hf_folder)
    assert is_full(load_weights(follow(message), hf_folder))
    message = refusal(deeper_hf_micro(head="mmseg"), hf_folder, strict=True)
    assert message.endswith("or load the encoder alone with backbone_only=True")


def test_other_ratios(tmp_path):
    ratios = {"sr_ratios": (4, 2, 1, 1), "mlp_ratio": 2}
    path = save(openmmlab_micro(**ratios).state_dict(), tmp_path)
    message = refusal(openmmlab_micro(), path)
    assert "sr_ratios=(4, 2, 1, 1), mlp_ratio=2.0, head_width=32)" in message
    # The message also tells this network's own heads.
    assert "does not fit create_network" in message
    assert "num_heads=(1, 2, 3, 4)" in message
    assert is_full(load_weights(openmmlab_micro(**ratios), path))


def test_a_deeper_encoder_is_not_cut_off(tmp_path):
    path = save(of_imagenet(load_file(OPENMMLAB)), tmp_path)
    message = refusal(openmmlab_micro(depths=(1, 1, 1, 1)), path, backbone_only=True)
    assert "depths=(1, 1, 2, 1)" in message
    assert "ln_eps" not in message


def test_another_number_of_classes():
    message = refusal(openmmlab_micro(7), OPENMMLAB)
    assert "for 19 classes, the network has 7: create it with num_classes=19" in message
    report = load_weights(openmmlab_micro(7), OPENMMLAB, strict=False)
    assert [name for name, *_ in report.reshaped] == [
        "decoder.classifier.weight",
        "decoder.classifier.bias",
    ]


@pytest.mark.parametrize("origin", ["OpenMMLab", "NVlabs", "Hugging Face", "segtrain"])
def test_a_file_short_of_one_parameter(origin, tmp_path):
    network, weights, left_out = {
        "OpenMMLab": (
            openmmlab_micro(),
            load_file(OPENMMLAB),
            "backbone.layers.1.1.0.attn.attn.in_proj_bias",
        ),
        "NVlabs": (
            authors_micro(),
            in_authors_names(authors_micro()),
            "backbone.block2.0.attn.kv.bias",
        ),
        "Hugging Face": (
            hf_micro(),
            load_file(HUGGING_FACE),
            "segformer.encoder.block.1.0.attention.self.value.bias",
        ),
        "segtrain": (
            authors_micro(),
            dict(authors_micro().state_dict()),
            "encoder.stages.1.blocks.0.attention.key_value.bias",
        ),
    }[origin]
    missing = "encoder.stages.1.blocks.0.attention.key_value.bias"
    del weights[left_out]
    path = save(weights, tmp_path)
    for arguments in ({}, {"backbone_only": True}):
        message = refusal(network, path, **arguments)
        assert "does not fit SegFormer; names of " + origin in message
        assert f"missing ({missing})" in message or f", {missing})" in message
    assert missing in load_weights(network, path, strict=False).missing


def test_one_by_one_convolutions_and_linear_layers_are_the_same(tmp_path):
    weights, expected = load_file(HUGGING_FACE), hf_micro()
    load_weights(expected, HUGGING_FACE)
    for name in ("segformer.encoder.block.1.0.mlp.dense1", "decode_head.linear_c.1.proj"):
        weights[f"{name}.weight"] = weights[f"{name}.weight"][:, :, None, None]
    name = "decode_head.linear_fuse.weight"
    weights[name] = weights[name].flatten(1)
    network = hf_micro()
    assert is_full(load_weights(network, save(weights, tmp_path)))
    assert same_state(network, expected)


def test_nonsense_under_known_names(tmp_path):
    for name in (
        "backbone.layers.1.1.0.attn.attn.in_proj_bias",
        "backbone.layers.1.1.0.ffn.layers.0.weight",
        "backbone.layers.1.0.projection.weight",
        "decode_head.conv_seg.weight",
    ):
        path = save(load_file(OPENMMLAB) | {name: torch.tensor(1.0)}, tmp_path)
        refusal(openmmlab_micro(), path)
    for name in ("key.bias", "value.weight"):
        name = f"segformer.encoder.block.1.0.attention.self.{name}"
        path = save(load_file(HUGGING_FACE) | {name: torch.tensor(1.0)}, tmp_path)
        refusal(hf_micro(), path)


# --------------------------------------------------------------------------- layer norms


@pytest.mark.parametrize(
    ("origin", "path", "create", "eps"),
    [
        ("OpenMMLab's SegFormer", OPENMMLAB, openmmlab_micro, 1e-6),
        ("Hugging Face's SegFormer", HUGGING_FACE, hf_micro, 1e-5),
        ("NVlabs' SegFormer", None, authors_micro, "mixed"),
    ],
)
def test_the_origins_layer_norms_are_noted(origin, path, create, eps, tmp_path, recwarn):
    path = path or save(in_authors_names(create()), tmp_path)
    for other in {1e-6, 1e-5, "mixed"} - {eps}:
        report = load_weights(create(ln_eps=other), path)
        written = '"mixed"' if eps == "mixed" else eps
        assert report.notes == (
            f"{origin} has ln_eps={eps}, the network {other}: "
            f"create it with ln_eps={written} for equal outputs",
        )
        assert str(report).endswith(f"; {report.notes[0]}")
        assert load_weights(create(ln_eps=other), path, backbone_only=True).notes == ()
    assert load_weights(create(), path).notes == ()
    assert not recwarn
