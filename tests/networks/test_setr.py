"""SETR's decoders against the tensors of the authors' code and of OpenMMLab's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn

from segtrain import UserError, create_network, load_weights, measure_cost
from tests.networks.graphs import assert_baked_into_export, assert_one_graph_each

REFERENCE = "tests/reference/plain_vit"
# Reference -> what the network is created with, beside the sizes.
CASES = {
    "naive_mmseg": {"auxiliary": (1,)},
    "pup_mmseg": {"auxiliary": (1,)},
    "mla_mmseg": {"auxiliary": (3,)},
    "naive_official": {"auxiliary": (1,), "head_style": "official"},
    "pup_official": {"auxiliary": (1,), "head_style": "official"},
}
VARIANTS = list(itertools.product(("naive", "pup", "mla"), ("mmseg", "official")))


def micro(variant="naive", **arguments):
    sizes = {
        "backbone": "vit_tiny_patch16_384",
        "backbone_arguments": {"embed_dim": 32, "depth": 4, "num_heads": 4},
        "image_size": (64, 64),
        "channels": 24,
    }
    return create_network(f"setr_{variant}_s", 5, **(sizes | arguments))


def reference(case):
    """A network with the weights of a case, in evaluation, and the tensors of the case."""
    network = micro(case.split("_")[0], **CASES[case])
    report = load_weights(network, f"{REFERENCE}/setr_{case}_micro.safetensors")
    assert (report.missing, report.unexpected, report.reshaped) == ((), (), ())
    return network.eval(), load_file(f"{REFERENCE}/setr_{case}_micro_io.safetensors")


def assert_same(scores, expected):
    """Up to the resize of the authors' heads to the image, which segtrain's networks leave out."""
    size = (expected.shape[2], expected.shape[3])
    resized = F.interpolate(scores, size, mode="bilinear", align_corners=False)
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_scores_of_the_official_codes(case):
    network, tensors = reference(case)
    expected = tensors["logits" if "logits" in tensors else "decode_logits"]
    scores = network(tensors["input"])
    assert_same(scores, expected)
    network.as_published = True
    torch.testing.assert_close(network(tensors["input"]), scores)


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_auxiliary_scores_of_the_official_codes(case):
    network, tensors = reference(case)
    network.decoder.train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    scores, auxiliary = network.score(tensors["input"])
    assert_same(scores, tensors["logits" if "logits" in tensors else "decode_logits"])
    assert_same(auxiliary, tensors["aux_logits0"])


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_features_of_the_official_codes(case):
    network, tensors = reference(case)
    levels, grid = network.levels(tensors["input"], [0, 1, 2, 3])
    for index, level in enumerate(levels):
        expected = tensors[f"feat{index}"]
        if expected.ndim == 3:  # tokens, the first of which is the class token
            tokens = expected[:, 1:]
        else:
            assert grid == expected.shape[2:]
            tokens = expected.flatten(2).transpose(1, 2)
        torch.testing.assert_close(level.tokens, tokens, rtol=0, atol=1e-4)
    if "neck0" in tensors:  # the deepest first
        maps = [level.tokens.transpose(1, 2).unflatten(2, grid) for level in levels]
        for index, aggregated in enumerate(reversed(network.decoder.neck(maps))):
            torch.testing.assert_close(aggregated, tensors[f"neck{index}"], rtol=0, atol=1e-4)


# The image's sides times the scale over the patches' side, rounded up.
@pytest.mark.parametrize(
    ("head", "head_style", "scale"),
    [
        ("naive", "mmseg", 4),
        ("pup", "mmseg", 16),
        ("mla", "mmseg", 4),
        ("naive", "official", 1),
        ("pup", "official", 8),
        ("mla", "official", 4),
    ],
)
@torch.no_grad()
def test_images_of_any_size(head, head_style, scale):
    network = micro(head, head_style=head_style).eval()
    for height, width in ((64, 64), (50, 70), (96, 33), (1, 1)):
        scores = network(torch.randn(2, 3, height, width))
        assert scores.shape == (2, 5, -(-height * scale // 16), -(-width * scale // 16))
    assert network.stride == 16 // scale


@torch.no_grad()
def test_padding_leaves_no_scores():
    network = micro("naive").eval()
    image = torch.randn(1, 3, 50, 70)
    padded = F.pad(image, (0, 10, 0, 14))
    torch.testing.assert_close(network(image), network(padded)[:, :, :13, :18])


@torch.no_grad()
def test_patches_of_another_size():
    sizes = {"embed_dim": 32, "depth": 4, "num_heads": 4}
    backbone = "vit_small_patch14_reg4_dinov2"
    network = micro("naive", backbone=backbone, backbone_arguments=sizes).eval()
    assert network(torch.randn(1, 3, 28, 42)).shape == (1, 5, 8, 12)


@pytest.mark.parametrize(("head", "head_style"), VARIANTS)
def test_training_scores_with_every_parameter(head, head_style):
    network = micro(head, head_style=head_style, drop_path=0.5).train()
    torch.manual_seed(0)
    scores = network(torch.randn(2, 3, 50, 70))
    assert isinstance(scores, tuple)
    assert len(scores) == 1 + len(network.decoder.auxiliary_heads)
    sum(each.square().mean() for each in scores).backward()
    # A process group would wait for a gradient that never comes.
    assert not [name for name, p in network.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in network.parameters())


def test_without_auxiliary_heads_training_gives_scores():
    network = micro("pup", auxiliary=()).train()
    assert network(torch.randn(2, 3, 64, 64)).shape == (2, 5, 64, 64)


@pytest.mark.parametrize(
    ("size", "head", "head_style", "blocks"),
    [
        ("l", "naive", "mmseg", (9, 14, 19)),
        ("l", "pup", "mmseg", (9, 14, 19)),
        ("l", "pup", "official", (9, 14, 19, 23)),
        ("l", "mla", "mmseg", (23, 17, 11, 5)),
        ("l", "mla", "official", (5, 11, 17, 23)),
        ("s", "naive", "mmseg", (2, 5, 8)),
        ("b", "mla", "official", (2, 5, 8, 11)),
    ],
)
def test_blocks_that_auxiliary_heads_follow(size, head, head_style, blocks):
    with torch.device("meta"):
        network = create_network(f"setr_{head}_{size}", 5, head_style=head_style)
    assert tuple(network.decoder.auxiliary) == blocks
    assert len(network.decoder.auxiliary_heads) == len(blocks)


# Parameters in millions: all, and those of the auxiliary heads and of the head.
@pytest.mark.parametrize(
    ("size", "classes", "side", "millions"),
    [
        ("s", 19, 768, (22.89, 0.313, 0.10)),
        ("s", 150, 512, (22.54, 0.414, 0.14)),
        ("b", 19, 768, (88.23, 0.611, 0.20)),
        ("b", 150, 512, (87.38, 0.712, 0.24)),
        ("l", 19, 768, (306.54, 0.809, 0.27)),
    ],
)
def test_parameters_of_the_official_configurations(size, classes, side, millions):
    with torch.device("meta"):
        network = create_network(f"setr_naive_{size}", classes, image_size=(side, side))
    parts = (network, network.decoder.auxiliary_heads, network.decoder.head)
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in parts]
    assert counts == pytest.approx(millions, abs=0.006)


def test_macs_of_the_naive_decoder():
    with torch.device("meta"):
        network = create_network("setr_naive_b", 150)
    published = measure_cost(network, convention="official", latency=False).macs
    assert published == pytest.approx(107.7e9, rel=0.005)  # DToP's baseline
    # The classifier sees the pixels of the patches' grid, not sixteen times as many.
    saved = published - measure_cost(network, latency=False).macs
    assert saved == 15 * 32 * 32 * 256 * 150


@pytest.mark.parametrize("head", ["naive", "pup", "mla"])
@torch.no_grad()
def test_one_graph_for_a_setting(head):
    images = torch.randn(2, 3, 50, 70)
    assert_one_graph_each(micro(head).eval(), images, ["full", "expedit_0.5"])


@pytest.mark.parametrize(("head", "head_style"), VARIANTS)
@torch.no_grad()
def test_an_export_gives_the_same_scores(head, head_style):
    images = torch.randn(1, 3, 50, 70)
    assert_baked_into_export(micro(head, head_style=head_style).eval(), images, "full")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head": "puc"}, "there is no head 'puc': did you mean 'pup'?"),
        ({"head_style": "offical"}, "there is no head_style 'offical': did you mean 'official'?"),
        ({"auxiliary": [4]}, "'auxiliary' lists blocks of 0, 1, 2, 3, not [4]"),
        ({"auxiliary": 3}, "'auxiliary' lists blocks of 0, 1, 2, 3, not 3"),
        ({"image_size": 512}, "'image_size' is (height, width), not 512"),
        ({"image_size": [512]}, "'image_size' is (height, width), not [512]"),
        ({"head": "mla", "backbone_arguments": {"depth": 8}, "auxiliary": (2,)}, "of 1, 3, 5, 7"),
        ({"backbone": "vit_small_patch16"}, "timm has no plain vision transformer"),
        ({"drop_pathes": 0.1}, "has no argument 'drop_pathes': did you mean 'drop_path'?"),
    ],
)
def test_slips_in_arguments(arguments, message):
    with pytest.raises(UserError) as caught, torch.device("meta"):
        micro(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
