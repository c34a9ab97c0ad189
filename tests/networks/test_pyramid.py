"""Pyramids against timm, transformers and the authors' window attention written out plainly."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F
from graphs import assert_baked_into_export, assert_one_graph_each
from timm.layers import DropPath
from torch import nn

from segtrain import UserError
from segtrain.cost import measure_cost
from segtrain.networks import Network
from segtrain.networks.pyramid import BLOCK_TYPES, FrozenBatchNorm, create_pyramid
from segtrain.training.recomputation import recompute_blocks

SWIN = "swin_tiny_patch4_window7_224"
MICRO = {"embed_dim": 16, "depths": (2, 2, 2, 2), "num_heads": (1, 2, 2, 4)}
MICRO_RESNET = {"layers": (1, 1, 1, 1), "channels": (8, 8, 8, 8)}


class Maps(Network):
    """A pyramid as the whole of a network."""

    block_types = BLOCK_TYPES

    def __init__(self, backbone=SWIN, **arguments):
        super().__init__(1, 4)
        self.encoder = create_pyramid(backbone, **arguments)

    def forward(self, images):
        return self.encoder(images)


def randomise(module):
    torch.manual_seed(0)
    for name, value in (*module.named_parameters(), *module.named_buffers()):
        if name.endswith("running_var"):
            nn.init.uniform_(value, 0.5, 2)
        elif name.endswith("relative_position_bias_table"):
            nn.init.normal_(value)
        elif value.is_floating_point():
            nn.init.normal_(value, std=0.1 if value.ndim > 1 else 0.5)
    return module


def micro_swin(**arguments):
    return randomise(create_pyramid(SWIN, backbone_arguments=MICRO | arguments)).eval()


def micro_resnet(**arguments):
    return randomise(create_pyramid("resnet50", backbone_arguments=MICRO_RESNET, **arguments))


def close(found, expected, tolerance=1e-5):
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


def attention_of_the_authors(block, maps, window, shift):
    """Of all positions of the padded map with all, where they see each other."""
    height, width = maps.shape[1:3]
    maps = F.pad(maps, (0, 0, 0, -width % window, 0, -height % window))
    seen, offsets = [], []
    for axis in (1, 2):
        place = torch.arange(maps.shape[axis])
        rolled = (place - shift) % len(place)
        wrapped = place < shift
        alike = (rolled // window)[:, None] == (rolled // window)[None]
        seen.append(alike & (wrapped[:, None] == wrapped[None]))
        offsets.append((rolled % window)[:, None] - (rolled % window)[None] + window - 1)
    rows, columns = maps.shape[1:3]
    seen = (seen[0][:, None, :, None] & seen[1][None, :, None, :]).reshape(rows * columns, -1)
    index = offsets[0][:, None, :, None] * (2 * window - 1) + offsets[1][None, :, None, :]
    bias = block.attn.relative_position_bias_table[index.reshape(rows * columns, -1)]
    query, key, value = (
        tensor.unflatten(2, (block.attn.num_heads, -1)).transpose(1, 2)
        for tensor in block.attn.qkv(maps.flatten(1, 2)).chunk(3, dim=2)
    )
    logits = query @ key.mT * query.shape[-1] ** -0.5 + bias.permute(2, 0, 1)
    attended = logits.masked_fill(~seen, -torch.inf).softmax(dim=-1) @ value
    attended = block.attn.proj(attended.transpose(1, 2).flatten(2))
    return attended.unflatten(1, (rows, columns))[:, :height, :width]


def swin_of_the_authors(pyramid, images, window):
    maps = pyramid.backbone.patch_embed.proj(images).permute(0, 2, 3, 1)
    maps = pyramid.backbone.patch_embed.norm(maps)
    outputs = []
    for index, stage in enumerate(pyramid.backbone.layers):
        if index > 0:
            maps = F.pad(maps, (0, 0, 0, maps.shape[2] % 2, 0, maps.shape[1] % 2))
            corners = [maps[:, y::2, x::2] for x in (0, 1) for y in (0, 1)]
            merging = stage.downsample
            maps = merging.reduction(merging.norm(torch.cat(corners, dim=3)))
        for depth, block in enumerate(stage.blocks):
            shift = depth % 2 * (window // 2)
            maps = maps + attention_of_the_authors(block, block.norm1(maps), window, shift)
            maps = maps + block.mlp(block.norm2(maps))
        outputs.append(pyramid.norms[index](maps).permute(0, 3, 1, 2))
    return outputs


@pytest.mark.parametrize("size", [(64, 96), (160, 96), (36, 60)])
@torch.inference_mode()
def test_swin_pads_before_it_rolls(size):
    pyramid = micro_swin()
    images = torch.randn(1, 3, *size)
    for found, expected in zip(
        pyramid(images), swin_of_the_authors(pyramid, images, 7), strict=True
    ):
        close(found, expected)


#: transformers' part of a name -> ours.
FROM_TRANSFORMERS = {
    r"^swin\.embeddings\.patch_embeddings\.projection": "backbone.patch_embed.proj",
    r"^swin\.embeddings\.norm": "backbone.patch_embed.norm",
    r"^swin\.encoder": "backbone",
    r"layernorm_before": "norm1",
    r"layernorm_after": "norm2",
    r"attention\.o_proj": "attn.proj",
    r"attention\.relative_position_bias\.": "attn.",
    r"^hidden_states_norms\.stage1": "norms.0",
    r"^hidden_states_norms\.stage2": "norms.1",
    r"^hidden_states_norms\.stage3": "norms.2",
    r"^hidden_states_norms\.stage4": "norms.3",
}


def weights_of_transformers(reference):
    weights = {}
    for name, value in reference.state_dict().items():
        for theirs, ours in FROM_TRANSFORMERS.items():
            name = re.sub(theirs, ours, name)
        weights[re.sub(r"(\d)\.down", lambda stage: f"{int(stage[1]) + 1}.down", name)] = value
    for name in [name for name in weights if "q_proj" in name]:
        parts = [weights.pop(name.replace("q_proj", f"{part}_proj")) for part in "qkv"]
        weights[name.replace("attention.q_proj", "attn.qkv")] = torch.cat(parts)
    return {name: value for name, value in weights.items() if not name.startswith("swin.layernorm")}


@pytest.mark.parametrize("window", [4, 7])
@torch.inference_mode()
def test_swin_is_that_of_transformers(window):
    from transformers import SwinBackbone, SwinConfig  # which takes long to import

    config = SwinConfig(
        embed_dim=MICRO["embed_dim"],
        depths=list(MICRO["depths"]),
        num_heads=list(MICRO["num_heads"]),
        window_size=window,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    reference = randomise(SwinBackbone(config)).eval()
    pyramid = micro_swin(window_size=window)
    pyramid.load_state_dict(weights_of_transformers(reference))
    for size in [(64, 96), (224, 320), (32, 32)]:
        images = torch.randn(2, 3, *size)
        for found, expected in zip(pyramid(images), reference(images).feature_maps, strict=True):
            close(found, expected)


@torch.inference_mode()
def test_swin_is_timms_on_maps_of_whole_windows():
    pyramid = micro_swin()
    reference = timm.create_model(SWIN, features_only=True, always_partition=True, **MICRO).eval()
    named = {
        name.replace("layers.", "layers_"): v for name, v in pyramid.backbone.state_dict().items()
    }
    reference.load_state_dict(named)
    images = torch.randn(1, 3, 224, 224)
    for found, expected, norm in zip(
        pyramid(images), reference(images), pyramid.norms, strict=True
    ):
        close(found, norm(expected).permute(0, 3, 1, 2))


def test_names_and_sizes_of_swin():
    pyramid = create_pyramid(SWIN)
    assert pyramid.widths == (96, 192, 384, 768)
    assert sum(parameter.numel() for parameter in pyramid.parameters()) == 27_520_698
    names = set(pyramid.state_dict())
    reference = timm.create_model(SWIN, num_classes=0).state_dict()
    stage_norms = {f"norms.{index}.{name}" for index in range(4) for name in ("weight", "bias")}
    assert names - stage_norms == {f"backbone.{n}" for n in reference if not n.startswith("norm.")}
    assert stage_norms < names
    windows = create_pyramid("swin_base_patch4_window12_384.ms_in22k", backbone_arguments=MICRO)
    assert {block.window for block in windows.modules() if isinstance(block, BLOCK_TYPES)} == {
        (12, 12)
    }


def test_drops_rise_linearly_over_all_blocks():
    for backbone, arguments, depth in [(SWIN, MICRO, 8), ("resnet50", MICRO_RESNET, 4)]:
        pyramid = create_pyramid(backbone, drop_path=0.3, backbone_arguments=arguments)
        blocks = [module for module in pyramid.modules() if isinstance(module, BLOCK_TYPES)]
        rates = [
            max((m.drop_prob for m in block.modules() if isinstance(m, DropPath)), default=0)
            for block in blocks
        ]
        assert rates == pytest.approx([0.3 * index / (depth - 1) for index in range(depth)])
    pyramid = create_pyramid("focalnet_tiny_srf")  # which drops by itself
    assert not any(m.drop_prob for m in pyramid.modules() if isinstance(m, DropPath))


@torch.inference_mode()
def test_resnet_is_timms():
    pyramid = create_pyramid("resnet50")
    assert pyramid.widths == (256, 512, 1024, 2048)
    assert sum(parameter.numel() for parameter in pyramid.parameters()) == 23_454_912
    reference = timm.create_model("resnet50", num_classes=0)
    expected = {f"backbone.{name}" for name in reference.state_dict() if "num_batches" not in name}
    assert set(pyramid.state_dict()) == expected
    reference = timm.create_model("resnet50", features_only=True, out_indices=(1, 2, 3, 4))
    randomise(reference).eval()
    images = torch.randn(1, 3, 64, 96)
    for batch_norm in ("frozen", "trained"):
        pyramid = create_pyramid("resnet50", batch_norm=batch_norm).eval()
        pyramid.backbone.load_state_dict(reference.state_dict(), strict=batch_norm == "trained")
        for found, expected in zip(pyramid(images), reference(images), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_frozen_batch_norms_learn_nothing_and_all_else_does():
    pyramid = micro_resnet().train()
    before = {name: value.clone() for name, value in pyramid.named_buffers()}
    images = torch.randn(2, 3, 64, 96)
    maps = pyramid(images)
    sum(each.square().mean() for each in maps).backward()
    assert all(parameter.grad.any() for parameter in pyramid.parameters())
    assert all(torch.equal(value, before[name]) for name, value in pyramid.named_buffers())
    with torch.inference_mode():
        for found, expected in zip(pyramid.eval()(images), maps, strict=True):
            close(found, expected)
    trained = create_pyramid("resnet18", batch_norm="trained").train()
    trained(images)
    assert trained.backbone.bn1.num_batches_tracked == 1


def test_a_frozen_batch_norm_is_one_in_evaluation():
    norm = randomise(nn.BatchNorm2d(5)).eval()
    frozen = FrozenBatchNorm(norm)
    features = torch.randn(2, 5, 3, 4)
    expected = norm(features)
    close(frozen(features), expected.detach(), 1e-6)
    mine, others = features.clone().requires_grad_(), features.clone().requires_grad_()
    norm(others).square().sum().backward()
    frozen(mine).square().sum().backward()
    close(mine.grad, others.grad)
    for half in (features.bfloat16(), mine.bfloat16()):
        assert frozen(half).dtype == torch.bfloat16
        close(frozen(half).float(), expected, 0.05)


def test_a_residual_branch_that_nobody_has_trained_is_not_frozen_at_zero():
    pyramid = create_pyramid("resnet50", backbone_arguments=MICRO_RESNET | {"zero_init_last": True})
    assert pyramid.backbone.layer1[0].bn3.weight.eq(1).all()


@pytest.mark.parametrize(
    "backbone",
    ["convnext_atto", "mambaout_femto", "regnety_002", "resnet18", "swin_s3_tiny_224"],
)
@torch.inference_mode()
def test_other_backbones_give_the_same_four_maps(backbone):
    pyramid = create_pyramid(backbone).eval()
    shapes = [tuple(each.shape) for each in pyramid(torch.randn(1, 3, 64, 96))]
    strides = (4, 8, 16, 32)
    assert shapes == [
        (1, width, 64 // stride, 96 // stride)
        for width, stride in zip(pyramid.widths, strides, strict=True)
    ]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in pyramid.modules())


@pytest.mark.parametrize(
    ("backbone", "arguments", "message"),
    [
        ("resnet5", {}, "timm has no network 'resnet5'; near are: resnet50"),
        ("resnet50.a9_in1k", {}, "Invalid pretrained tag"),
        ("vit_tiny_patch16_224", {}, "has maps at strides 16, 16, 16, 16, not 4, 8, 16, 32"),
        ("levit_128s", {}, "cannot build 'levit_128s' with maps at strides 4, 8, 16, 32"),
        (SWIN, {"backbone_arguments": {"depths": (1, 1)}}, "at strides 4, 8, not 4, 8, 16, 32"),
        (SWIN, {"backbone_arguments": {"depth": 2}}, "unexpected keyword argument 'depth'"),
        (SWIN, {"backbone_arguments": {"strict_img_size": True}}, "is the network's own"),
        ("resnet18", {"backbone_arguments": {"drop_path_rate": 0.1}}, "is the network's own"),
        ("resnet18", {"batch_norm": "froze"}, "did you mean 'frozen'"),
        ("densenet121", {"drop_path": 0.1}, "argument 'drop_path_rate'"),
    ],
)
def test_what_cannot_be_built_is_said_in_a_line(backbone, arguments, message):
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        create_pyramid(backbone, **arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("backbone", "arguments"),
    [(SWIN, MICRO | {"depths": (2, 1, 1, 1)}), ("resnet50", MICRO_RESNET)],
    ids=["swin", "resnet"],
)
def test_one_graph_and_an_export(backbone, arguments):
    network = randomise(Maps(backbone, backbone_arguments=arguments)).eval()
    images = torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        assert_one_graph_each(network, images, ["full"])
    assert_baked_into_export(network, images, "full")


@pytest.mark.parametrize(
    ("backbone", "arguments"), [(SWIN, MICRO), ("resnet50", MICRO_RESNET)], ids=["swin", "resnet"]
)
def test_training_with_blocks_recomputed_in_half_precision(backbone, arguments):
    images = torch.randn(2, 3, 64, 96).contiguous(memory_format=torch.channels_last)
    gradients = []
    for recomputed in (False, True):
        network = Maps(backbone, drop_path=0.3, backbone_arguments=arguments)
        randomise(network).train()
        if recomputed:
            recompute_blocks(network)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.bfloat16):
            maps = network(images)
        sum(each.float().square().mean() for each in maps).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    assert all(gradient.isfinite().all() for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


@pytest.mark.parametrize(("backbone", "gflops"), [(SWIN, 195.55), ("resnet50", 171.75)])
def test_gflops_of_a_cityscapes_image(backbone, gflops):
    cost = measure_cost(Maps(backbone), (1024, 2048), convention="fvcore", latency=False)
    assert round(cost.macs / 1e9, 2) == gflops
