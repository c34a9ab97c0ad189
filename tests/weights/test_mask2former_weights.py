"""Mask2Former and PRO-SCALE from their authors and Hugging Face, and backbones for them."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from segtrain import UserError, create_network, load_weights
from segtrain.weights.mask2former import AUTHORS

REFERENCE = Path(__file__).parent.parent / "reference" / "mask2former_proscale"
PUBLISHED = {
    "m2f_r50": "mask2former_r50",
    "m2f_swint": "mask2former_swin_t",
    "proscale_r50_333": "proscale_r50",
    "proscale_swint_333": "proscale_swin_t",
}
SWIN = {"embed_dim": 32, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
RESNET = {"layers": (1, 1, 2, 1), "channels": (8, 16, 32, 64)}
HEAD = {
    "num_queries": 5,
    "encoder_layers": (0, 0, 2),
    "decoder_layers": 3,
    "width": 32,
    "num_heads": 4,
    "encoder_mlp_width": 64,
    "decoder_mlp_width": 48,
}
AUTHORS_WORDS = "Mask2Former's and PRO-SCALE's authors"


def micro(name, num_classes=7, **arguments):
    backbone = SWIN if "swin" in name else RESNET
    head = HEAD | ({"encoder_layers": (1, 2, 1)} if name.startswith("proscale") else {})
    values = {"backbone_arguments": backbone, **head, **arguments}
    return create_network(name, num_classes, **values).eval()


def randomise(module):
    """Make no parameter or statistic trivial."""
    with torch.no_grad():
        for value in module.parameters():
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * 0.2)
        for name, value in module.named_buffers():
            if name.endswith("running_mean"):
                value.normal_(0, 0.2)
            elif name.endswith("running_var"):
                value.uniform_(0.5, 2)
    return module.eval()


def in_authors_names(network):
    """Our weights as detectron2 names them, beside what else its files hold."""

    def pattern(module):
        return re.compile(re.escape(module).replace(r"\*", r"(\d+)"))

    named = {}
    for name, value in network.state_dict().items():
        module, _, parameter = name.rpartition(".")
        for theirs, ours in AUTHORS.modules.items():
            if found := pattern(ours).fullmatch(module):
                theirs = theirs.replace("*", "{}").format(*found.groups())
                named[f"{theirs}.{parameter}"] = value
                break
    assert len(named) == len(network.state_dict())
    packed = {}
    for name in named:
        if "attention_layers" in name and ".query." in name:
            parts = [named[name.replace(".query.", f".{p}.")] for p in ("query", "key", "value")]
            packed[name.replace(".query.", ".in_proj_")] = torch.cat(parts)
    named = {n: v for n, v in named.items() if not re.search(r"attn\.(query|key|value)\.", n)}
    level = "sem_seg_head.pixel_decoder.transformer.level_embed"
    named[level] = named.pop(f"{level}ding")
    if any("attn.qkv" in name for name in named):
        tables = [n for n in named if n.endswith("relative_position_bias_table")]
        packed |= {n.replace("bias_table", "index"): torch.zeros(49, 49).long() for n in tables}
    return named | packed | {"criterion.empty_weight": torch.ones(network.num_classes + 1)}


def save(content, folder, name="weights.pth"):
    torch.save(content, folder / name)
    return folder / name


def save_pickle(weights, folder, name="weights.pkl"):
    """As detectron2's tools and model zoo have it."""
    arrays = {key: value.numpy() for key, value in weights.items()}
    content = {"model": arrays, "__author__": "third_party", "matching_heuristics": True}
    (folder / name).write_bytes(pickle.dumps(content, protocol=2))
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
    assert all(torch.equal(before[name], v) for name, v in network.state_dict().items())
    return message.replace(str(path), "X")


def follow(message):
    """Create the network that a message advises."""
    call = re.search(r"create the network with (create_network\(.*?\))(,? or load|$)", message)[1]
    return eval(call, {"create_network": create_network})


def is_full(report):
    return (report.missing, report.unexpected, report.reshaped) == ((), (), ())


# --------------------------------------------------------------------------- the authors


@pytest.mark.parametrize("key", PUBLISHED)
def test_published_names_and_ours_are_one_to_one(key):
    shapes = json.loads((REFERENCE / "keys_full.json").read_text())[key]
    official = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    with torch.device("meta"):
        network = create_network(PUBLISHED[key], 133, batch_norm="trained")
    named, unknown = AUTHORS.rename(official)
    assert not unknown
    ours = {
        name: tuple(value.shape)
        for name, value in network.state_dict().items()
        if not name.endswith("num_batches_tracked")
    }
    assert {name: tuple(value.shape) for name, value in named.items()} == ours
    told = {"name": PUBLISHED[key], "num_classes": 133}
    assert AUTHORS.read_arguments(named) == told
    assert AUTHORS.read_arguments(network.state_dict()) == told


@pytest.mark.parametrize("name", ["mask2former", "proscale"])
def test_names_of_the_reference_heads(name):
    official = load_file(REFERENCE / f"{name}_micro.safetensors")
    named, unknown = AUTHORS.rename(official)
    assert not unknown
    layers = {"mask2former": (0, 0, 3), "proscale": (1, 1, 1)}[name]
    sizes = {"num_queries": 10, "encoder_layers": layers, "decoder_mlp_width": 64}
    backbone = {"backbone_arguments": SWIN | {"embed_dim": 16}}
    ours = micro(f"{name}_swin_t", 19, **sizes, **backbone).decoder.state_dict()
    theirs = {key.removeprefix("decoder."): value.shape for key, value in named.items()}
    assert theirs == {key: value.shape for key, value in ours.items()}


NETWORKS = ["mask2former_r50", "mask2former_swin_t", "proscale_r50", "proscale_swin_t"]


@pytest.mark.parametrize("name", NETWORKS)
def test_the_authors_file_comes_back(name, tmp_path):
    torch.manual_seed(0)
    network = randomise(micro(name))
    weights = in_authors_names(network)
    training = {"optimizer": {"state": {0: {"step": 3}}}, "scheduler": {"last_epoch": 3}}
    older = {
        key.replace("pixel_decoder.", "").replace("query_feat", "static_query"): value
        for key, value in weights.items()
    }
    for path in (
        save({"model": weights, **training, "iteration": 3}, tmp_path),
        save_pickle(weights, tmp_path),
        save({"model": older}, tmp_path, "older.pth"),
    ):
        other = micro(name)
        report = load_weights(other, path)
        assert is_full(report)
        assert report.origin == AUTHORS_WORDS
        assert same_state(network, other)
    layer = network.decoder.queries.layers[1].self_attention
    theirs = "sem_seg_head.predictor.transformer_self_attention_layers.1.self_attn.in_proj_weight"
    assert torch.equal(weights[theirs].split(32)[1], layer.key.weight)


def test_what_weights_of_proscale_do_not_show(tmp_path):
    path = save({"model": in_authors_names(micro("proscale_r50"))}, tmp_path)
    taken = f'taken for the recipe "PRO-SCALE" of {AUTHORS_WORDS} (temperature=0.1, residual=False)'
    report = load_weights(micro("proscale_r50"), path)
    assert len(report.notes) == 1
    assert report.notes[0].startswith(taken)
    report = load_weights(micro("proscale_r50", temperature=1.0), path)
    assert report.notes[1] == (
        f"{AUTHORS_WORDS} has temperature=0.1, the network 1.0: "
        "create it with temperature=0.1 for equal outputs"
    )
    convolution = micro("proscale_r50", recalibration="convolution")
    report = load_weights(convolution, save({"model": in_authors_names(convolution)}, tmp_path))
    assert report.notes == (
        f"fits no recipe of {AUTHORS_WORDS}, the network's own values are assumed: temperature and "
        "residual leave no trace in a file, the network has temperature=0.1, residual=False",
    )
    path = save({"model": in_authors_names(micro("mask2former_r50"))}, tmp_path)
    assert load_weights(micro("mask2former_r50"), path).notes == ()


def test_the_gate_of_eco_m2f(tmp_path):
    exits = {"encoder_layers": (0, 0, 6), "exits": (2, 3, 4, 5, 6)}
    network = micro("mask2former_r50", **exits)
    weights = in_authors_names(network)
    assert weights["sem_seg_head.pixel_decoder.transformer.encoder.gt.head.weight"].shape == (5, 32)
    path = save({"model": weights}, tmp_path)
    other = micro("mask2former_r50", **exits)
    assert is_full(load_weights(other, path))
    assert same_state(network, other)
    network = micro("mask2former_r50", encoder_layers=(0, 0, 6), exits=(1, 2, 3, 4, 6))
    assert "has exits=(2, 3, 4, 5, 6), the netw" in str(load_weights(network, path))
    message = refusal(micro("mask2former_r50", encoder_layers=(0, 0, 6)), path)
    assert is_full(load_weights(follow(message), path))


# --------------------------------------------------------------------------- Hugging Face


@pytest.fixture(scope="module")
def transformers():
    """The library, with the network out of its reach."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import transformers

    return transformers


STAGES = ["stage1", "stage2", "stage3", "stage4"]
HF_HEAD = {
    "feature_size": 32,
    "mask_feature_size": 32,
    "hidden_dim": 32,
    "encoder_feedforward_dim": 64,
    "dim_feedforward": 48,
    "encoder_layers": 2,
    "decoder_layers": 4,
    "num_attention_heads": 4,
    "num_queries": 5,
}


def hf_model(transformers, backbone, head=HF_HEAD):
    kind = transformers.SwinConfig if "embed_dim" in backbone else transformers.ResNetConfig
    config = transformers.Mask2FormerConfig(
        backbone_config=kind(out_features=STAGES, **backbone), num_labels=7, **head
    )
    return randomise(transformers.Mask2FormerForUniversalSegmentation(config))


HF_BACKBONES = {
    "mask2former_swin_t": {"embed_dim": 32, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8]},
    "mask2former_r50": {"depths": [1, 1, 2, 1], "hidden_sizes": [32, 64, 128, 256]},
}


@pytest.fixture(scope="module", params=HF_BACKBONES)
def hf(request, transformers, tmp_path_factory):
    """Name of ours, their model, the folder that it is saved in."""
    torch.manual_seed(1)
    model = hf_model(transformers, HF_BACKBONES[request.param])
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return request.param, model, folder


def check_equal(model, network, size):
    images = torch.randn(1, 3, *size)
    with torch.inference_mode():
        theirs, ours = model(images), network.masks(images)
    for mine, other in (
        (ours.classes, theirs.class_queries_logits),
        (ours.masks, theirs.masks_queries_logits),
    ):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-3 * float(other.abs().max()))


def test_hugging_face_model_gives_equal_logits(hf):
    name, model, folder = hf
    network = micro(name)
    report = load_weights(network, folder)
    assert is_full(report)
    assert report.origin == "Hugging Face's Mask2Former"
    assert report.notes == ()
    torch.manual_seed(0)
    for size in ((64, 96), (160, 96), (32, 224)):
        check_equal(model, network, size)


@pytest.mark.slow
@pytest.mark.parametrize("name", HF_BACKBONES)
def test_hugging_face_model_of_the_published_size(transformers, name, tmp_path):
    torch.manual_seed(0)
    model = hf_model(transformers, {"embed_dim": 96} if "swin" in name else {}, {})
    model.save_pretrained(tmp_path)
    network = create_network(name, 7).eval()
    assert is_full(load_weights(network, tmp_path))
    for size in ((64, 96), (224, 224), (224, 320)):
        check_equal(model, network, size)


def test_every_form_of_a_hugging_face_model_gives_the_same_network(hf, tmp_path):
    name, model, folder = hf
    expected = micro(name)
    load_weights(expected, folder)
    files = load_file(folder / "model.safetensors")
    tables = [key for key in files if key.endswith("relative_position_bias_table")]
    assert all(".attention.self." in key for key in tables)
    older = files | {key.replace("bias_table", "index"): torch.zeros(49, 49) for key in tables}
    memory = model.state_dict()
    assert any("encoder.swin.encoder" in key for key in memory) == ("swin" in name)
    for weights in (older, memory):
        network = micro(name)
        assert is_full(load_weights(network, save(weights, tmp_path)))
        assert same_state(network, expected)
    network = micro(name, 3)
    load_weights(network, folder, backbone_only=True)
    assert same_state(network.encoder, expected.encoder)


def test_what_config_json_tells_and_weights_do_not(hf, tmp_path):
    name, _, folder = hf
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    swin = "swin" in name
    for change, expected in (
        ({"pre_norm": True}, "config.json has pre_norm True, segtrain's Mask2Former False"),
        ({"activation_function": "gelu"}, "activation_function 'gelu'"),
        ({"feature_strides": [4, 8, 16, 16]}, "feature_strides"),
        ({"backbone_config": config["backbone_config"] | {"hidden_act": "silu"}}, "hidden_act"),
        ({"backbone_config": {"model_type": "dinat"}}, "model_type 'dinat'"),
        ({"backbone_config": None}, "model_type None, segtrain's Mask2Former 'swin' or 'resnet'"),
        ({"backbone_config": "swin"}, "backbone_config of model_type None"),
        (
            {"backbone_config": config["backbone_config"] | {"layer_norm_eps": 1e-12}}
            if swin
            else {"backbone_config": config["backbone_config"] | {"downsample_in_bottleneck": 1}},
            "layer_norm_eps" if swin else "downsample_in_bottleneck",
        ),
        ({"num_attention_heads": 2}, "config.json asks for num_heads=2"),
    ):
        if change.get("backbone_config", {}) and isinstance(change["backbone_config"], dict):
            assert change["backbone_config"] != config["backbone_config"]
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        assert expected in refusal(micro(name), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    message = refusal(micro(name, width=64), tmp_path)
    assert is_full(load_weights(follow(message), tmp_path))


# --------------------------------------------------------------------------- backbones


def test_timm_and_authors_swin_files(tmp_path):
    classifier = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    weights = classifier.state_dict()
    features = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, **SWIN)
    features.load_state_dict(
        {re.sub(r"^layers\.", "layers_", k): v for k, v in weights.items()}, strict=False
    )
    older = {k.replace("head.fc.", "head."): v for k, v in weights.items()}
    older["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(49, 49)
    # Of the authors, whose stages end with what timm's begin with.
    authors = {
        re.sub(r"(?<=^layers\.)\d(?=\.downsample)", lambda stage: str(int(stage[0]) - 1), k): v
        for k, v in older.items()
    } | {"layers.2.blocks.1.attn_mask": torch.zeros(4, 49, 49)}
    assert "layers.0.downsample.norm.weight" in authors
    for content, origin in (
        (weights, "timm's Swin transformer"),
        (features.state_dict(), "timm's Swin transformer"),
        (older, "timm's Swin transformer"),
        ({"model": authors}, AUTHORS_WORDS),
    ):
        network = micro("proscale_swin_t")
        norms = {key: value.clone() for key, value in network.encoder.norms.state_dict().items()}
        report = load_weights(network, save(content, tmp_path), backbone_only=True)
        assert report.origin == origin
        assert report.unexpected == ()
        assert report.notes == (
            "encoder.norms.0.weight, encoder.norms.0.bias, encoder.norms.1.weight, ...: "
            "not in the file, begin with the network's values",
        )
        backbone = network.encoder.backbone.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in backbone.items())
        assert all(torch.equal(norms[k], v) for k, v in network.encoder.norms.state_dict().items())


@pytest.mark.parametrize("batch_norm", ["frozen", "trained"])
def test_timm_and_detectron2_resnet_files(batch_norm, tmp_path):
    model = randomise(timm.create_model("resnet50", num_classes=3, **RESNET))
    weights = model.state_dict()
    detectron2 = {}
    for key, value in weights.items():
        if "layer" not in key:
            key = f"stem.{key}"
        key = re.sub(r"layer(\d)", lambda layer: f"res{int(layer[1]) + 1}", key)
        key = re.sub(r"bn(\d)", r"conv\1.norm", key).replace("downsample.0", "shortcut")
        detectron2[key.replace("downsample.1", "shortcut.norm")] = value
    assert "res2.0.shortcut.norm.running_mean" in detectron2
    for path, origin in (
        (save(weights, tmp_path), "timm's ResNet"),
        (save_pickle(detectron2, tmp_path), AUTHORS_WORDS),
    ):
        network = micro("mask2former_r50", batch_norm=batch_norm)
        report = load_weights(network, path, backbone_only=True)
        assert (report.origin, report.missing, report.unexpected) == (origin, (), ())
        backbone = network.encoder.backbone.state_dict()
        assert all(torch.equal(value, weights[key]) for key, value in backbone.items())
    other = micro("mask2former_r50", backbone_arguments=RESNET | {"layers": (1, 1, 1, 1)})
    message = refusal(other, path, backbone_only=True)
    assert "create the network with create_network(" in message
    assert f"backbone_arguments={RESNET}" in message


# --------------------------------------------------------------------------- misfits


@pytest.mark.parametrize("name", ["mask2former_swin_t", "proscale_r50"])
def test_another_number_of_classes(name, tmp_path):
    network = micro(name, 19)
    for content in (
        {"model": in_authors_names(micro(name))},
        micro(name).state_dict(),
    ):
        message = refusal(network, save(content, tmp_path))
        assert message == (
            "weights X: for 7 classes, the network has 19: create it with num_classes=7, "
            "or load the encoder alone with backbone_only=True"
        )
    # As many queries as classes are not taken for them.
    message = refusal(micro(name, 5), save(micro(name, 5, num_queries=8).state_dict(), tmp_path))
    assert "num_queries=8" in message


def test_the_message_tells_which_network_to_create(tmp_path):
    """Every piece of advice, followed, loads the file."""
    files = {
        "mask2former_r50": {},
        "mask2former_swin_t": {"num_queries": 8, "width": 64, "num_heads": 8},
        "proscale_r50": {"encoder_layers": (2, 1, 3)},
        "proscale_swin_t": {"pixel_embedding": "convolution", "recalibration": None},
    }
    for name, arguments in files.items():
        own = micro(name, **arguments)
        others = [
            micro(other) for other in (NETWORKS[0], NETWORKS[3]) if other != name or arguments
        ]
        for content in ({"model": in_authors_names(own)}, own.state_dict()):
            path = save(content, tmp_path)
            messages = [refusal(other, path) for other in others]
            assert all(f'the network with create_network("{name}", n' in m for m in messages)
            assert is_full(load_weights(follow(messages[0]), path))


def test_a_file_of_proscale_into_mask2former(tmp_path):
    path = save({"model": in_authors_names(micro("proscale_swin_t"))}, tmp_path)
    message = refusal(micro("mask2former_swin_t"), path)
    assert message.startswith(
        f"weights X: of {AUTHORS_WORDS}, does not fit "
        'create_network("mask2former_swin_t", num_classes=7'
    )
    assert 'create the network with create_network("proscale_swin_t", num_classes=7' in message
    assert message.endswith(
        "temperature=0.1, residual=False), or load the encoder alone with backbone_only=True"
    )
    network = micro("mask2former_swin_t")
    assert load_weights(network, path, backbone_only=True).missing == ()
    message = refusal(create_network("segformer_b0", 5), path)
    assert f"of {AUTHORS_WORDS}, not for SegFormer: create the network with create_n" in message
    assert is_full(load_weights(follow(message), path))


@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_one_recalibration_does_not_stand_for_the_other(kind, tmp_path):
    other = {"linear": "convolution", "convolution": "linear"}[kind]
    network = micro("proscale_r50", recalibration=kind)
    gate = "decoder.pixels.recalibration.gate.weight"
    for content in (network.state_dict(), {"model": in_authors_names(network)}):
        path = save(content, tmp_path)
        message = refusal(micro("proscale_r50", recalibration=other), path)
        advised = follow(message)
        assert is_full(load_weights(advised, path))
        assert advised.decoder.pixels.recalibration.kind == kind
        report = load_weights(micro("proscale_r50", recalibration=other), path, strict=False)
        assert [name for name, *_ in report.reshaped] == [gate]


def test_nonsense_under_known_names(tmp_path):
    network = micro("proscale_swin_t")
    weights = in_authors_names(network)
    for name in (
        "backbone.layers.1.blocks.0.attn.relative_position_bias_table",
        "sem_seg_head.pixel_decoder.transformer.level_embed",
        "sem_seg_head.pixel_decoder.transformer.encoder.token_excite.ops.weight",
        "sem_seg_head.pixel_decoder.transformer.encoder.layers.1.self_attn.attention_weights.weight",
        "sem_seg_head.predictor.transformer_self_attention_layers.0.self_attn.in_proj_bias",
        "sem_seg_head.predictor.query_feat.weight",
        "sem_seg_head.predictor.class_embed.weight",
    ):
        for value in (torch.tensor(1.0), torch.zeros(0), torch.zeros(1, 1)):
            refusal(network, save(weights | {name: value}, tmp_path))
