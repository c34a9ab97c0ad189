"""Segmenter against the official tensors, and against the published costs."""

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from segtrain import UserError, create_network, load_weights, measure_cost
from segtrain.networks.mask_transformer import MaskTransformer
from tests.networks.graphs import assert_baked_into_export, assert_one_graph_each

REFERENCE = "tests/reference/plain_vit/segmenter_mask_micro"
TENSORS = load_file(f"{REFERENCE}_io.safetensors")
# Size, classes, side of the image -> the GFLOPs that the authors of ALGM measured.
PUBLISHED = [
    ("ti", 150, 512, "12.8"),
    ("s", 150, 512, "38.6"),
    ("b", 150, 512, "130"),
    ("l", 150, 640, "672"),
    ("s", 19, 768, "116"),
    ("s", 60, 480, "32.1"),
]


def micro(**arguments):
    sizes = {
        "backbone": "vit_tiny_patch16_384",
        "backbone_arguments": {"embed_dim": 32, "depth": 4, "num_heads": 4},
        "decoder_heads": 2,
        "image_size": (64, 64),
        "normalisation": "imagenet",
    }
    return create_network("segmenter_s", 5, **(sizes | arguments))


def on_meta(size, classes, side, **arguments):
    with torch.device("meta"):
        return create_network(f"segmenter_{size}", classes, image_size=(side, side), **arguments)


@pytest.fixture(scope="module")
def network():
    network = micro()
    report = load_weights(network, f"{REFERENCE}.safetensors")
    assert (report.missing, report.unexpected, report.reshaped) == ((), (), ())
    return network.eval()


@pytest.mark.parametrize("case", ["native", "wide", "padded"])
@torch.no_grad()
def test_scores_of_the_official_code(network, case):
    images, expected = TENSORS[f"{case}.input"], TENSORS[f"{case}.logits"]
    scores = F.interpolate(network(images), scale_factor=16, mode="bilinear", align_corners=False)
    height, width = expected.shape[2:]
    visible = scores[:, :, :height, :width]
    torch.testing.assert_close(visible, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_features_of_the_official_code(network):
    (level,), grid = network.levels(TENSORS["native.input"], [3])
    assert grid == (4, 4)
    expected = TENSORS["native.encoder"][:, 1:]  # behind the class token
    torch.testing.assert_close(level.tokens, expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_a_token_has_its_scores_wherever_it_stands():
    decoder = MaskTransformer(32, 5, num_heads=2).eval()
    tokens, order = torch.randn(2, 7, 32), torch.randperm(7)
    torch.testing.assert_close(decoder(tokens[:, order]), decoder(tokens)[:, order])


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@torch.no_grad()
def test_images_of_any_size(decoder):
    network = micro(decoder=decoder).eval()
    for height, width in ((64, 64), (50, 70), (96, 33), (1, 1)):
        scores = network(torch.randn(2, 3, height, width))
        assert scores.shape == (2, 5, -(-height // 16), -(-width // 16))
    assert network.stride == 16


@torch.no_grad()
def test_a_linear_decoder_scores_each_token_alone():
    network = micro(decoder="linear").eval()
    images = torch.randn(1, 3, 64, 64)
    (level,), _ = network.levels(images, [3])
    expected = level.tokens @ network.decoder.weight.T + network.decoder.bias
    torch.testing.assert_close(network(images).flatten(2).transpose(1, 2), expected)


def test_images_are_given_in_the_range_of_the_pretraining():
    by_imagenet, by_half = micro().eval(), micro(normalisation="half").eval()
    by_half.load_state_dict(by_imagenet.state_dict())
    mean, std = (
        torch.tensor(v)[:, None, None] for v in ((123.675, 116.28, 103.53), (58.395, 57.12, 57.375))
    )
    pixels = torch.randint(0, 256, (1, 3, 64, 64)).float()
    with torch.no_grad():
        expected = by_imagenet((pixels - 127.5) / 127.5)
        torch.testing.assert_close(by_half((pixels - mean) / std), expected)


def test_what_the_authors_and_openmmlab_do_differently():
    official, mmseg = micro(), micro(head_style="mmseg")

    def facts(network):
        block, last = network.encoder.vit.blocks[0], network.decoder.blocks[1]
        paths = [type(path).__name__ for path in (last.drop_path1, last.drop_path2)]
        encoder_paths = network.encoder.vit.blocks[3]
        return (
            block.norm1.eps,
            network.decoder.norm.eps,
            network.encoder.positions,
            last.mlp.drop1.p,
            paths,
            type(encoder_paths.drop_path1).__name__,
        )

    assert facts(official) == (
        1e-5, 1e-5, "bilinear", 0.1, ["Identity", "Identity"], "DropPath",
    )  # fmt: skip
    assert facts(mmseg) == (
        1e-6, 1e-5, "bicubic", 0.0, ["Identity", "DropPath"], "Identity",
    )  # fmt: skip
    assert mmseg.decoder.blocks[1].drop_path2.drop_prob == 0.1


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@pytest.mark.parametrize("head_style", ["official", "mmseg"])
def test_training_reaches_every_parameter(decoder, head_style):
    network = micro(decoder=decoder, head_style=head_style).train()
    network(torch.randn(2, 3, 50, 70)).square().mean().backward()
    # A process group would wait for a gradient that never comes.
    assert not [name for name, p in network.named_parameters() if p.grad is None]
    assert all(p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize(("size", "classes", "side", "gflops"), PUBLISHED)
def test_the_published_costs(size, classes, side, gflops):
    cost = measure_cost(
        on_meta(size, classes, side), (side, side), convention="fvcore", latency=False
    )
    # The network measured there resizes its scores to the image.
    total = (cost.macs + 4 * classes * side * side) / 1e9
    assert f"{total:.3g}" == gflops


@pytest.mark.parametrize(("size", "classes", "side"), [case[:3] for case in PUBLISHED])
def test_the_closed_formula_of_the_cost(size, classes, side):
    network = on_meta(size, classes, side)
    width, depth, patches = network.encoder.width, network.encoder.depth, (side // 16) ** 2

    def block(tokens):
        return 12 * tokens * width**2 + 2 * tokens**2 * width

    embedding = 768 * patches * width
    ends = 2 * patches * width**2 + classes * width**2 + patches * classes * width
    expected = embedding + depth * block(patches + 1) + 2 * block(patches + classes) + ends
    assert measure_cost(network, (side, side), latency=False).macs == expected


# In millions: all parameters, and those of the decoder.
@pytest.mark.parametrize(
    ("size", "classes", "side", "millions"),
    [
        ("s", 19, 768, (26.79 - 0.311, 4.00)),
        ("s", 150, 512, (26.45 - 0.412, 4.05)),
        ("b", 19, 768, (103.99 - 0.606, 15.96)),
        ("b", 150, 512, (103.20 - 0.707, 16.06)),
        ("l", 19, 768, (334.62 - 0.803, 28.36)),
        ("l", 150, 512, (333.55 - 0.904, 28.50)),
    ],
)
def test_parameters_of_the_official_configurations(size, classes, side, millions):
    network = on_meta(size, classes, side)
    counts = [
        sum(p.numel() for p in part.parameters()) / 1e6 for part in (network, network.decoder)
    ]
    assert counts == pytest.approx(millions, abs=0.006)


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@torch.no_grad()
def test_one_graph_for_a_setting(decoder):
    images = torch.randn(2, 3, 50, 70)
    assert_one_graph_each(micro(decoder=decoder).eval(), images, ["full", "expedit_0.5"])


@pytest.mark.parametrize("decoder", ["mask", "linear"])
@torch.no_grad()
def test_an_export_gives_the_same_scores(decoder):
    images = torch.randn(1, 3, 50, 70)
    assert_baked_into_export(micro(decoder=decoder).eval(), images, "full")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"decoder": "masks"}, "there is no decoder 'masks': did you mean 'mask'?"),
        ({"head_style": "mmsegs"}, "there is no head_style 'mmsegs': did you mean 'mmseg'?"),
        ({"normalisation": "halve"}, "there is no normalisation 'halve': did you mean 'half'?"),
        ({"positions": "bilinea"}, "there is no resizing of positions 'bilinea': did you mean"),
        ({"decoder_heads": 3}, "decoder_heads=3 does not divide the encoder's 32 channels"),
        ({"layers": 3}, "has no argument 'layers'"),
    ],
)
def test_slips_in_arguments(arguments, message):
    with pytest.raises(UserError) as caught, torch.device("meta"):
        micro(**arguments)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)
