"""SETR's, Segmenter's and timm's files into our networks over a plain vision transformer."""

import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from segtrain import UserError, create_network, load_weights
from segtrain.weights.setr import OFFICIAL_MLA

REFERENCE = "tests/reference/plain_vit"
SIZES = {"embed_dim": 32, "depth": 4, "num_heads": 4}


def micro(name, num_classes=5, **arguments):
    sizes = {
        "backbone": "vit_tiny_patch16_384",
        "backbone_arguments": SIZES,
        "image_size": (64, 64),
    }
    return create_network(name, num_classes, **(sizes | arguments))


def timm_vit(image_size=64, backbone="vit_tiny_patch16_384"):
    return timm.create_model(backbone, num_classes=3, img_size=image_size, **SIZES)


def as_openmmlab_names_it(name):
    """timm's name of a parameter -> OpenMMLab's, without what precedes the encoder's."""
    name = re.sub(r"^norm\.", "ln1.", name).replace("patch_embed.proj.", "patch_embed.projection.")
    for ours, theirs in {
        "blocks.": "layers.",
        ".norm": ".ln",
        ".attn.qkv.": ".attn.attn.in_proj_",
        ".attn.proj.": ".attn.attn.out_proj.",
        ".mlp.fc1.": ".ffn.layers.0.0.",
        ".mlp.fc2.": ".ffn.layers.1.",
    }.items():
        name = name.replace(ours, theirs)
    return name


def is_full(report):
    return (report.missing, report.unexpected, report.reshaped) == ((), (), ())


# --------------------------------------------------------------------------------- encoders alone


@pytest.mark.parametrize("name", ["setr_naive_s", "setr_mla_s", "segmenter_s"])
@pytest.mark.parametrize("names", ["timm", "OpenMMLab", "OpenMMLab, in a segmentation file"])
def test_an_encoder_of_imagenet(name, names, tmp_path):
    vit, network = timm_vit(), micro(name)
    file = vit.state_dict()
    if names != "timm":
        prefix = "backbone." if "segmentation" in names else ""
        file = {
            f"{prefix}{as_openmmlab_names_it(key)}": value
            for key, value in file.items()
            if not key.startswith("head.")
        }
    save_file(file, tmp_path / "vit.safetensors")
    before = {key: value.clone() for key, value in network.decoder.state_dict().items()}
    report = load_weights(network, tmp_path / "vit.safetensors", backbone_only=True)
    assert not report.missing
    assert report.origin.startswith(names.split(",")[0])
    for key, value in network.encoder.vit.state_dict().items():
        assert torch.equal(value, vit.state_dict()[key]), key
    assert all(torch.equal(before[key], v) for key, v in network.decoder.state_dict().items())


@pytest.mark.parametrize(
    ("backbone", "side"),
    [
        ("vit_small_patch14_reg4_dinov2", 56),
        ("vit_small_patch16_dinov3", 64),
        ("eva02_tiny_patch14_336", 56),
    ],
)
def test_the_names_of_other_families(backbone, side, tmp_path):
    vit = timm_vit(side, backbone)
    network = micro("segmenter_s", backbone=backbone, image_size=(side, side))
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    report = load_weights(network, tmp_path / "vit.safetensors", backbone_only=True)
    assert not report.missing
    for key, value in network.encoder.vit.state_dict().items():
        assert torch.equal(value, vit.state_dict()[key]), key


@pytest.mark.parametrize("positions", ["bilinear", "bicubic", "bicubic_antialiased"])
def test_positions_of_another_size_are_resized_by_the_networks_own_rule(positions, tmp_path):
    vit = timm_vit(96)
    torch.nn.init.normal_(vit.pos_embed)
    network = micro("segmenter_s", image_size=(64, 128), positions=positions)
    save_file(vit.state_dict(), tmp_path / "vit.safetensors")
    assert not load_weights(network, tmp_path / "vit.safetensors", backbone_only=True).reshaped
    found = network.encoder.vit.pos_embed
    expected = network.encoder.resize_positions(vit.pos_embed, (4, 8), (6, 6))
    assert torch.equal(found, expected)
    assert torch.equal(found[:, 0], vit.pos_embed[:, 0])
    assert not torch.equal(found[:, 1:6], vit.pos_embed[:, 1:6])


def test_an_encoder_trained_under_another_head():
    network = micro("segmenter_s")
    path = f"{REFERENCE}/setr_pup_mmseg_micro.safetensors"
    report = load_weights(network, path, strict=False, backbone_only=True)
    assert report.missing == ("encoder.vit.norm.weight", "encoder.vit.norm.bias")
    projection = network.encoder.vit.blocks[3].attn.qkv.weight
    assert torch.equal(projection, load_file(path)["backbone.layers.3.attn.attn.in_proj_weight"])
    # A norm is no reason to refuse, and the report tells that it is new.
    report = load_weights(network, path, backbone_only=True)
    (note,) = report.notes
    assert note.startswith("encoder.vit.norm.weight, encoder.vit.norm.bias: not in the file")


def test_an_encoder_of_another_width_is_refused(tmp_path):
    save_file(timm_vit().state_dict(), tmp_path / "vit.safetensors")
    network = micro("setr_naive_s", backbone_arguments=SIZES | {"embed_dim": 64})
    with pytest.raises(UserError, match="of another shape"):
        load_weights(network, tmp_path / "vit.safetensors", backbone_only=True)


# --------------------------------------------------------------------------------- whole networks


# Ours -> theirs, where a name alone does not tell that it is right.
PLACES = {
    "setr_naive_mmseg": {
        "encoder.vit.blocks.2.mlp.fc1.weight": "backbone.layers.2.ffn.layers.0.0.weight",
        "encoder.vit.blocks.2.norm2.bias": "backbone.layers.2.ln2.bias",
        "decoder.head.convolutions.0.1.running_var": "decode_head.up_convs.0.0.bn.running_var",
        "decoder.auxiliary_heads.0.norm.weight": "auxiliary_head.0.norm.weight",
    },
    "setr_mla_mmseg": {
        "decoder.neck.norms.1.weight": "neck.norm.1.weight",
        "decoder.neck.projections.0.0.weight": "neck.mla.channel_proj.0.conv.weight",
        "decoder.neck.extractions.0.0.weight": "neck.mla.feat_extract.3.conv.weight",
        "decoder.head.branches.3.1.0.weight": "decode_head.up_convs.0.1.conv.weight",
        "decoder.head.branches.1.0.1.running_mean": "decode_head.up_convs.2.0.bn.running_mean",
        "decoder.auxiliary_heads.0.bias": "auxiliary_head.0.conv_seg.bias",
    },
    "setr_pup_official": {
        "decoder.head.convolutions.3.0.bias": "decode_head.conv_3.bias",
        "decoder.head.convolutions.3.1.bias": "decode_head.syncbn_fc_3.bias",
        "decoder.head.classifier.weight": "decode_head.conv_4.weight",
        "decoder.auxiliary_heads.0.classifier.bias": "auxiliary_head.0.conv_1.bias",
    },
}


@pytest.mark.parametrize("case", PLACES)
def test_files_of_setr(case):
    _, head, head_style = case.split("_")
    network = micro(
        f"setr_{head}_s",
        head_style=head_style,
        channels=24,
        auxiliary=(3,) if head == "mla" else (1,),
    )
    report = load_weights(network, f"{REFERENCE}/{case}_micro.safetensors")
    assert is_full(report)
    assert not report.notes
    official = load_file(f"{REFERENCE}/{case}_micro.safetensors")
    for ours, theirs in PLACES[case].items():
        assert torch.equal(network.state_dict()[ours], official[theirs]), ours


def test_the_authors_mla_is_named_completely():
    network = micro("setr_mla_s", head_style="official", channels=24)
    ours = {name.rpartition(".")[0] for name in network.state_dict()}
    theirs = [
        "backbone.norm_2",
        "backbone.mla.mla_p4_1x1.0",
        "backbone.mla.mla_p4_1x1.1",
        "backbone.mla.mla_p4.0",
        "backbone.mla.mla_p4.1",
        *(f"decode_head.mlahead.head4.{layer}" for layer in (0, 1, 3, 4)),
        "decode_head.cls",
        "auxiliary_head.2.aux",
    ]
    named, unknown = OFFICIAL_MLA.rename({f"{name}.weight": torch.empty(0) for name in theirs})
    assert not unknown
    assert len(named) == len(theirs)
    assert {name.rpartition(".")[0] for name in named} <= ours
    # What the others have, four times over: all of the decoder.
    of_a_level = [name for name in named if "classifier" not in name]
    decoder = [name for name in ours if name.startswith("decoder.")]
    assert 4 * len(of_a_level) + 1 == len(decoder)


def test_files_of_segmenter():
    network = micro("segmenter_s", decoder_heads=2)
    report = load_weights(network, f"{REFERENCE}/segmenter_mask_micro.safetensors")
    assert is_full(report)
    official = load_file(f"{REFERENCE}/segmenter_mask_micro.safetensors")
    decoder = network.decoder
    assert torch.equal(decoder.patch_projection.weight, official["decoder.proj_patch"].T)
    assert torch.equal(decoder.class_projection.weight, official["decoder.proj_classes"].T)
    assert torch.equal(decoder.class_tokens, official["decoder.cls_emb"])


def openmmlabs_segmenter():
    """OpenMMLab's file: what DoViT adds to it, and names otherwise, undone."""
    return {
        key.replace(".attn.qkv.", ".attn.attn.in_proj_").replace(
            ".attn.proj.", ".attn.attn.out_proj."
        ): value
        for key, value in load_file(f"{REFERENCE}/dovit_segmenter_micro.safetensors").items()
        if "auxiliary_head" not in key
    }


@torch.no_grad()
def test_openmmlabs_segmenter(tmp_path):
    save_file(openmmlabs_segmenter(), tmp_path / "segmenter.safetensors")
    arguments = {
        "num_classes": 7,
        "decoder_heads": 4,
        "normalisation": "imagenet",
        "backbone_arguments": SIZES | {"depth": 6, "patch_size": 8},
    }
    network = micro("segmenter_s", head_style="mmseg", **arguments).eval()
    report = load_weights(network, tmp_path / "segmenter.safetensors")
    assert is_full(report)
    assert not report.notes
    # Where no token stops, DoViT is Segmenter.
    tensors = load_file(f"{REFERENCE}/dovit_segmenter_micro_io.safetensors")
    scores = network(tensors["b1_full.input"])
    torch.testing.assert_close(scores, tensors["b1_full.decode_logits"], rtol=0, atol=1e-4)
    (note,) = load_weights(
        micro("segmenter_s", **arguments), tmp_path / "segmenter.safetensors"
    ).notes
    assert note == (
        "OpenMMLab's Segmenter has head_style=mmseg, the network official: "
        'create it with head_style="mmseg" for equal outputs'
    )


@pytest.mark.parametrize("origin", ["authors", "OpenMMLab"])
def test_files_of_the_linear_decoder(origin, tmp_path):
    head = {"weight": torch.randn(5, 32), "bias": torch.randn(5)}
    vit = {key: v for key, v in timm_vit().state_dict().items() if not key.startswith("head.")}
    if origin == "authors":
        file = {f"encoder.{key}": value for key, value in vit.items()}
        file |= {f"decoder.head.{key}": value for key, value in head.items()}
        file |= {"encoder.head.weight": torch.randn(1000, 32)}
    else:
        file = {f"backbone.{as_openmmlab_names_it(key)}": value for key, value in vit.items()}
        file |= {
            "decode_head.conv_seg.weight": head["weight"][:, :, None, None],
            "decode_head.conv_seg.bias": head["bias"],
        }
    save_file(file, tmp_path / "linear.safetensors")
    network = micro("segmenter_s", decoder="linear")
    assert is_full(load_weights(network, tmp_path / "linear.safetensors"))
    assert torch.equal(network.decoder.weight, head["weight"])


@pytest.mark.parametrize("name", ["setr_pup_s", "setr_mla_s", "segmenter_s"])
def test_our_own_files(name, tmp_path):
    network, other = micro(name), micro(name)
    save_file(network.state_dict(), tmp_path / "ours.safetensors")
    report = load_weights(other, tmp_path / "ours.safetensors")
    assert is_full(report)
    assert report.origin == "segtrain"
    # Its encoder goes into others, too.
    report = load_weights(micro("setr_naive_s"), tmp_path / "ours.safetensors", backbone_only=True)
    assert not report.missing


def openmmlabs_setr(num_classes):
    """A file of SETR-naive with ViT-S, by OpenMMLab's names."""
    with torch.device("meta"):
        network = create_network("setr_naive_s", num_classes)
    heads = {"decoder.head": "decode_head"}
    heads |= {f"decoder.auxiliary_heads.{i}": f"auxiliary_head.{i}" for i in range(3)}
    names = {
        f"{ours}.{our_layer}": f"{theirs}.{layer}"
        for ours, theirs in heads.items()
        for our_layer, layer in {
            "norm": "norm",
            "convolutions.0.0": "up_convs.0.0.conv",
            "convolutions.0.1": "up_convs.0.0.bn",
            "classifier": "conv_seg",
        }.items()
    }
    file = {}
    for name, value in network.state_dict().items():
        module, _, parameter = name.rpartition(".")
        in_encoder = f"backbone.{as_openmmlab_names_it(name.removeprefix('encoder.vit.'))}"
        theirs = f"{names[module]}.{parameter}" if module in names else in_encoder
        file[theirs] = torch.empty(value.shape)
    return file


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("setr_pup_b", 'create the network with create_network("setr_naive_s", num_classes=19)'),
        ("segmenter_s", 'create the network with create_network("setr_naive_s", num_classes=19)'),
        ("segformer_b0", 'create the network with create_network("setr_naive_s", num_classes=19)'),
        ("setr_naive_s", "for 19 classes, the network has 5: create it with num_classes=19"),
    ],
)
def test_a_file_for_another_network_is_refused_with_the_call_that_it_needs(name, message, tmp_path):
    save_file(openmmlabs_setr(19), tmp_path / "setr.safetensors")
    with torch.device("meta"):
        network = create_network(name, 5)
    with pytest.raises(UserError) as caught:
        load_weights(network, tmp_path / "setr.safetensors")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
