"""Plain vision transformers against stored features, timm, and what stands in for attention."""

import json
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from segtrain import UserError, create_network
from segtrain.inference import IMAGE_MEAN, IMAGE_STD
from segtrain.networks.plain_vit import OWN_ARGUMENTS, PlainViT
from segtrain.reduction.attention_core import PackedAttention, ProportionalAttention
from segtrain.reduction.plain import Level, PlainReduction, run_levels

REFERENCE = Path("tests/reference/plain_vit")
#: mmseg's part of a name -> timm's.
FROM_MMSEG = {
    "projection.": "proj.",
    "layers.": "blocks.",
    "ffn.blocks.0.0.": "mlp.fc1.",
    "ffn.blocks.1.": "mlp.fc2.",
    "attn.attn.in_proj_": "attn.qkv.",
    "attn.attn.out_proj.": "attn.proj.",
    "ln1.": "norm1.",
    "ln2.": "norm2.",
}
MICRO = {"embed_dim": 32, "depth": 3, "num_heads": 4}


def micro(backbone="vit_tiny_patch16_384", image_size=(64, 64), **arguments):
    torch.manual_seed(0)
    own = {name: arguments.pop(name) for name in OWN_ARGUMENTS & arguments.keys()}
    encoder = PlainViT(backbone, image_size, backbone_arguments=MICRO | arguments, **own).eval()
    for parameter in encoder.parameters():
        torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
    return encoder


def features_of(encoder, images, outputs):
    """Maps (B, C, h, w) after blocks."""
    levels, grid = run_levels(encoder, images, PlainReduction("full"), outputs)
    return [level.restore(level.tokens).mT.unflatten(2, grid) for level in levels]


def close(found, expected, tolerance=1e-4):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def stored(name):
    config = json.loads((REFERENCE / f"{name}.json").read_text())
    weights = load_file(REFERENCE / f"{name}.safetensors")
    return config, weights, load_file(REFERENCE / f"{name}_io.safetensors")


@pytest.mark.parametrize(
    "name",
    ["setr_naive_mmseg_micro", "setr_pup_mmseg_micro", "setr_mla_mmseg_micro", "segvit_atm_micro"],
)
@torch.inference_mode()
def test_features_of_openmmlab(name):
    config, weights, tensors = stored(name)
    backbone = config["config"]["backbone"]
    encoder = PlainViT(
        "vit_tiny_patch16_384",
        backbone["img_size"],
        backbone_arguments={
            "embed_dim": backbone["embed_dims"],
            "depth": backbone["num_layers"],
            "num_heads": backbone["num_heads"],
        },
        prefix=backbone["with_cls_token"],
        final_norm=backbone.get("final_norm", False),
        positions=backbone["interpolate_mode"],
    ).eval()
    renamed = {}
    for key, value in weights.items():
        if key.startswith("backbone."):
            key = key.removeprefix("backbone.")
            for theirs, ours in FROM_MMSEG.items():
                key = key.replace(theirs, ours)
            renamed[key] = value
    encoder.vit.load_state_dict(renamed)
    features = features_of(encoder, tensors["input"], backbone["out_indices"])
    for index, found in enumerate(features):
        close(found, tensors[f"feat{index}"])


@torch.inference_mode()
def test_tokens_of_the_segmenter_code():
    config, weights, tensors = stored("segmenter_mask_micro")
    sizes = config["encoder"]
    encoder = PlainViT(
        "vit_tiny_patch16_384",
        sizes["image_size"],
        backbone_arguments={
            "embed_dim": sizes["d_model"],
            "depth": sizes["n_layers"],
            "num_heads": sizes["n_heads"],
        },
        ln_eps=1e-5,
        positions="bilinear",
    ).eval()
    encoder.vit.load_state_dict(
        {
            key.removeprefix("encoder."): value
            for key, value in weights.items()
            if key.startswith("encoder.") and "head" not in key
        }
    )
    (found,) = features_of(encoder, tensors["native.input"], [encoder.depth - 1])
    expected = tensors["native.encoder"]
    close(found.flatten(2).mT, expected[:, -16:])


@pytest.mark.parametrize(
    ("backbone", "sides"),
    [
        ("vit_tiny_patch16_384", (384, 320)),
        ("deit_tiny_patch16_224", (224, 320)),
        ("deit_tiny_distilled_patch16_224", (224, 128)),
        ("deit3_small_patch16_224", (224, 128)),
        ("vit_small_patch14_dinov2", (518, 280)),
        ("vit_small_patch14_reg4_dinov2", (518, 280)),
        ("vit_small_patch16_dinov3", (256, 128)),
        ("eva02_tiny_patch14_336", (336, 224)),
        ("eva_giant_patch14_224", (224, 112)),
    ],
)
@torch.inference_mode()
def test_every_family_gives_what_timm_gives(backbone, sides):
    for side in sides:
        torch.manual_seed(side)
        reference = timm.create_model(
            backbone, num_classes=0, img_size=side, dynamic_img_size=True, **MICRO
        ).eval()
        for parameter in reference.parameters():
            torch.nn.init.normal_(parameter, std=0.1 if parameter.ndim > 1 else 0.5)
        encoder = PlainViT(
            backbone, (side, side), positions="bicubic_antialiased", backbone_arguments=MICRO
        ).eval()
        weights = reference.state_dict()
        skipped = {key for key in weights if key.startswith(("head", "fc_norm"))}
        encoder.vit.load_state_dict({k: v for k, v in weights.items() if k not in skipped})
        patch = encoder.patch_size
        for height, width in ((side, side), (4 * patch, 7 * patch)):
            images = torch.randn(1, 3, height, width)
            (found,) = features_of(encoder, images, [encoder.depth - 1])
            expected = reference.forward_features(images)[:, encoder.num_prefix :]
            close(found.flatten(2).mT, expected)


@pytest.mark.parametrize("positions", ["bilinear", "bicubic", "bicubic_antialiased"])
def test_positions_are_resized_as_asked(positions):
    encoder = micro(image_size=(64, 96), positions=positions)
    own = encoder.vit.pos_embed
    assert encoder.grid == (4, 6)
    assert encoder.resize_positions(own, (4, 6)) is own
    for grid in ((8, 9), (3, 5), (2, 7)):
        patches = own[:, 1:].unflatten(1, (4, 6)).permute(0, 3, 1, 2)
        mode, _, antialiased = positions.partition("_")
        expected = F.interpolate(
            patches, size=grid, mode=mode, align_corners=False, antialias=bool(antialiased)
        )
        resized = encoder.resize_positions(own, grid)
        assert torch.equal(resized[:, :1], own[:, :1])
        close(resized[:, 1:], expected.flatten(2).mT, 1e-6)
        if antialiased:
            timms = timm.layers.resample_abs_pos_embed(own, list(grid), [4, 6])
            close(resized, timms, 1e-6)
    square = encoder.fit_positions(torch.randn(1, 1 + 49, 32))
    assert square.shape == own.shape


def test_positions_of_a_file_from_a_square_grid():
    encoder = micro(image_size=(64, 96))
    positions = torch.randn(1, 1 + 25, 32)
    fitted = encoder.fit_positions(positions)
    assert torch.equal(fitted, encoder.resize_positions(positions, (4, 6), (5, 5)))
    own = torch.randn(1, 1 + 24, 32)
    assert encoder.fit_positions(own) is own
    for odd in (torch.randn(1, 1 + 23, 32), torch.randn(25, 32)):
        assert encoder.fit_positions(odd) is odd  # refused where shapes are compared


@torch.inference_mode()
def test_images_of_any_size_are_padded_with_zeros():
    encoder = micro()
    images = torch.randn(1, 3, 50, 70)
    padded = F.pad(images, (0, 10, 0, 14))
    assert torch.equal(*(features_of(encoder, each, [2])[0] for each in (images, padded)))
    assert features_of(encoder, images[..., :1, :1], [2])[0].shape == (1, 32, 1, 1)


@torch.inference_mode()
def test_prefix_tokens_may_be_dropped_after_positions_are_added():
    encoder = micro("vit_small_patch14_reg4_dinov2", (56, 56))
    images = torch.randn(1, 3, 56, 56)
    tokens, grid, _ = encoder.embed(images)
    assert (encoder.num_prefix, grid, tokens.shape) == (5, (4, 4), (1, 21, 32))
    without = micro("vit_small_patch14_reg4_dinov2", (56, 56), prefix=False)
    without.load_state_dict(encoder.state_dict())
    assert torch.equal(without.embed(images)[0], tokens[:, 5:])
    assert torch.equal(encoder.maps(tokens, grid), without.maps(tokens[:, 5:], grid))


@torch.inference_mode()
def test_images_for_weights_that_were_trained_on_halves():
    encoder, half = micro(), micro(normalisation="half")
    mean, std = (torch.tensor(values)[:, None, None] for values in (IMAGE_MEAN, IMAGE_STD))
    pixels = torch.randint(256, (1, 3, 64, 64)).float()
    found = features_of(half, (pixels - mean) / std, [2])[0]
    close(found, features_of(encoder, (pixels - 127.5) / 127.5, [2])[0])


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_384", "deit3_small_patch16_224"])
@torch.inference_mode()
def test_what_stands_between_the_halves_of_a_block(backbone):
    encoder = micro(backbone)
    tokens = torch.randn(2, 10, 32)
    seen = []
    found = encoder.run([1], tokens, between=lambda tokens: seen.append(tokens) or tokens[:, :4])
    close(found, encoder.run([1], tokens)[:, :4], 1e-6)
    block = encoder.vit.blocks[1]
    close(seen[0], tokens + block.ls1(block.attn(block.norm1(tokens))), 1e-6)


@pytest.mark.parametrize("backbone", ["vit_tiny_patch16_384", "vit_small_patch16_dinov3"])
@torch.inference_mode()
def test_packed_images_are_separate(backbone):
    encoder = micro(backbone)
    tokens, _, rotations = encoder.embed(torch.randn(3, 3, 64, 64))
    lengths = [9, 1, 16 + encoder.num_prefix]
    separate, placed = [], []
    for image, length in zip(tokens, lengths, strict=True):
        own = None if rotations is None else rotations[:length]
        separate.append(encoder.run(range(3), image[None, :length], own))
        placed.append(own)
    packed = torch.cat([image[:length] for image, length in zip(tokens, lengths, strict=True)])
    together = None if rotations is None else torch.cat(placed)
    found = encoder.run(range(3), packed[None], together, PackedAttention(lengths))
    close(found, torch.cat(separate, dim=1), 1e-5)


@torch.inference_mode()
def test_packed_attention_holds_where_timm_was_told_to_fuse_nothing(monkeypatch):
    monkeypatch.setattr("timm.layers.config._USE_FUSED_ATTN", 0)
    assert not timm.create_model("vit_tiny_patch16_384", **MICRO).blocks[0].attn.fused_attn
    encoder = micro()
    tokens = torch.randn(1, 12, 32)
    found = encoder.run([0], tokens, core=PackedAttention([5, 7]))
    separate = [encoder.run([0], part) for part in tokens.split([5, 7], dim=1)]
    close(found, torch.cat(separate, dim=1), 1e-5)


@pytest.mark.parametrize("width", [5, 8, 20, 64])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 5e-6), (torch.bfloat16, 3e-2)], ids=["fp32", "bf16"]
)
def test_proportional_attention_adds_log_sizes(width, dtype, tolerance):
    torch.manual_seed(width)
    query, key, value = (torch.randn(2, 3, 30, width) for _ in range(3))
    sizes = torch.randint(1, 40, (2, 30)).float()
    logits = query @ key.mT / width**0.5 + sizes.log()[:, None, None]
    expected = logits.softmax(3) @ value
    with ProportionalAttention(sizes):
        found = F.scaled_dot_product_attention(query.to(dtype), key.to(dtype), value.to(dtype))
    assert found.dtype == dtype
    assert found.shape == value.shape
    close(found.float(), expected, tolerance)
    with ProportionalAttention(torch.ones(2, 30)):
        found = F.scaled_dot_product_attention(query, key, value)
    close(found, F.scaled_dot_product_attention(query, key, value), 5e-6)


@torch.inference_mode()
def test_a_token_of_size_two_counts_as_two():
    encoder = micro()
    tokens = torch.randn(1, 7, 32)
    twice = torch.cat([tokens, tokens[:, 2:3]], dim=1)
    sizes = torch.tensor([[1.0, 1, 2, 1, 1, 1, 1]])
    found = encoder.run(range(3), tokens, core=ProportionalAttention(sizes))
    close(found, encoder.run(range(3), twice)[:, :7], 1e-5)


def test_drop_path_of_mlps_only():
    rates = [block.drop_path2.drop_prob for block in micro(drop_path=0.2).vit.blocks[1:]]
    assert rates == pytest.approx([0.1, 0.2])
    blocks = micro(drop_path=0.2, drop_path_of_mlps_only=True).vit.blocks[1:]
    assert all(isinstance(block.drop_path1, torch.nn.Identity) for block in blocks)
    assert [block.drop_path2.drop_prob for block in blocks] == pytest.approx([0.1, 0.2])


def test_which_tokens_can_be_reduced():
    assert micro().reducible
    assert not micro("vit_small_patch16_dinov3").reducible
    assert not micro("eva02_tiny_patch14_336").reducible
    assert not micro("eva_giant_patch14_224").reducible  # its blocks have no halves of timm's name


def test_a_level_without_merging_is_its_own_restoration():
    values = torch.randn(1, 4, 2)
    assert Level(values).restore(values) is values


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"backbone": "vit_smal_patch16_384"},
            "no plain vision transformer 'vit_smal_patch16_384'",
        ),
        ({"backbone": "resnet50"}, "timm has no plain vision transformer 'resnet50'"),
        ({"backbone": "vit_base_patch16_rpn_224"}, "is no plain vision transformer"),
        ({"backbone": "vit_small_patch16_rope_mixed_224"}, "is no plain vision transformer"),
        ({"positions": "bicubik"}, "no resizing of positions 'bicubik': did you mean 'bicubic'?"),
        ({"normalisation": "halves"}, "no normalisation 'halves': did you mean 'half'?"),
        ({"backbone_arguments": {"embed_dims": 3}}, "timm cannot build 'vit_tiny_patch16_384'"),
    ],
)
def test_slips_in_arguments(arguments, message):
    with pytest.raises(UserError) as caught:
        PlainViT(**({"backbone": "vit_tiny_patch16_384"} | arguments))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_pretrained_weights_without_a_network(monkeypatch, tmp_path):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError) as caught:
        PlainViT("vit_tiny_patch16_384", pretrained=True)
    assert "timm cannot build 'vit_tiny_patch16_384'" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["drop_path", "drop_path_rate", "pretrained"])
def test_an_argument_of_the_network_is_not_one_of_timms(name):
    with pytest.raises(UserError, match=f"backbone_arguments: '{name}' is the network's own"):
        create_network("segmenter_ti", num_classes=3, backbone_arguments={name: 0})
