"""SegFormer: the names of OpenMMLab (also SegFormer++), of the authors and of Hugging Face."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segtrain.errors import UserError
from segtrain.networks.segformer import NUM_HEADS, VARIANTS, published_head_width
from segtrain.weights.keys import ENCODER, KeyTable


def _split_packed_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenMMLab's ``in_proj_weight`` (3C, C), rows query | key | value, and ``in_proj_bias``."""
    split = {}
    for name, value in weights.items():
        module, _, parameter = name.rpartition(".in_proj_")
        if module and value.ndim:
            width = len(value) // 3
            split[f"{module}.query.{parameter}"] = value[:width]
            split[f"{module}.key_value.{parameter}"] = value[width:]
        else:
            split[name] = value
    return split


def _join_keys_and_values(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's separate key and value projections, of either naming, as ``key_value``."""
    joined = dict(weights)
    for name, key in weights.items():
        value_name = name.replace(".key.", ".value.").replace(".k_proj.", ".v_proj.")
        value = weights.get(value_name)
        if value_name != name and value is not None and key.ndim and key.shape == value.shape:
            for separate in (name, value_name):
                joined.pop(separate, None)
            both = name.replace(".key.", ".key_value.").replace(".k_proj.", ".key_value.")
            joined[both] = torch.cat([key, value])
    return joined


def _read_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``create_network`` takes for weights by our names; empty if parts are missing."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        arguments = _encoder_arguments(shapes)
        if any(not name.startswith(ENCODER) for name in shapes):
            arguments |= _decoder_arguments(shapes, arguments["name"])
    # Parts are missing, or not what their names say.
    except (LookupError, ValueError, ZeroDivisionError):
        return {}
    return arguments


def _encoder_arguments(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    stages = [f"{ENCODER}stages.{i}" for i in range(4)]
    widths = tuple(shapes[f"{stage}.blocks.0.attention.query.weight"][0] for stage in stages)
    blocks = [{n.split(".")[4] for n in shapes if n.startswith(f"{s}.blocks.")} for s in stages]
    depths = tuple(map(len, blocks))
    reductions = [shapes.get(f"{s}.blocks.0.attention.reduction.weight", (1,)) for s in stages]
    hidden = tuple(shapes[f"{stage}.blocks.0.mlp.expand.weight"][0] for stage in stages)
    (mlp_ratio,) = {h / width for h, width in zip(hidden, widths, strict=True)}

    published = {
        name: (tuple(width * heads for heads in NUM_HEADS), depths)
        for name, (width, depths) in VARIANTS.items()
    }
    of_these_widths = [name for name in published if published[name][0] == widths]
    exact = [name for name in of_these_widths if published[name][1] == depths]
    name = (exact or of_these_widths or list(published))[0]
    arguments: dict[str, Any] = {"name": name}
    if not of_these_widths:
        arguments |= {"widths": widths, "num_heads": ...}
    if depths != published[name][1]:
        arguments["depths"] = depths
    if (sr_ratios := tuple(shape[-1] for shape in reductions)) != (8, 4, 2, 1):
        arguments["sr_ratios"] = sr_ratios
    if mlp_ratio != 4:
        arguments["mlp_ratio"] = mlp_ratio
    return arguments


def _decoder_arguments(shapes: Mapping[str, tuple[int, ...]], name: str) -> dict[str, Any]:
    arguments: dict[str, Any] = {"num_classes": shapes["decoder.classifier.weight"][0]}
    head = "nvlabs" if "decoder.levels.0.projection.bias" in shapes else "mmseg"
    if head != "mmseg":
        arguments["head"] = head
    head_width = shapes["decoder.levels.0.projection.weight"][0]
    if head_width != published_head_width(name, head):
        arguments["head_width"] = head_width
    return arguments


def _read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Hugging Face's ``config.json`` tells and the weights do not."""
    for key, ours in (("strides", [4, 2, 2, 2]), ("hidden_act", "gelu")):
        if config.get(key, ours) != ours:
            raise UserError(f"config.json has {key} {config[key]!r}, segtrain's SegFormer {ours!r}")
    heads = config.get("num_attention_heads", list(NUM_HEADS))
    return {"num_heads": tuple(heads) if isinstance(heads, list) else heads}


_table = functools.partial(KeyTable, network="segformer", read_arguments=_read_arguments)

OPENMMLAB = _table(
    origin="OpenMMLab's SegFormer",
    encoder_prefix="backbone.",
    modules={
        f"backbone.layers.*.{theirs}": f"encoder.stages.*.{ours}"
        for theirs, ours in {
            "0.projection": "embedding.projection",
            "0.norm": "embedding.norm",
            "1.*.norm1": "blocks.*.norm1",
            "1.*.attn.attn.query": "blocks.*.attention.query",
            "1.*.attn.attn.key_value": "blocks.*.attention.key_value",
            "1.*.attn.attn.out_proj": "blocks.*.attention.projection",
            "1.*.attn.sr": "blocks.*.attention.reduction",
            "1.*.attn.norm": "blocks.*.attention.norm",
            "1.*.norm2": "blocks.*.norm2",
            "1.*.ffn.layers.0": "blocks.*.mlp.expand",
            "1.*.ffn.layers.1": "blocks.*.mlp.depthwise",
            "1.*.ffn.layers.4": "blocks.*.mlp.contract",
            "2": "norm",
        }.items()
    }
    | {
        "decode_head.convs.*.conv": "decoder.levels.*.projection",
        "decode_head.convs.*.bn": "decoder.levels.*.norm",
        "decode_head.fusion_conv.conv": "decoder.fuse",
        "decode_head.fusion_conv.bn": "decoder.fuse_norm",
        "decode_head.conv_seg": "decoder.classifier",
    },
    convert=_split_packed_projections,
    traceless=lambda _: {"ln_eps": 1e-6},
)

NVLABS = _table(
    origin="NVlabs' SegFormer",
    encoder_prefix="backbone.",
    modules={
        f"backbone.{theirs}": f"encoder.stages.{stage - 1}.{ours}"
        for stage in (1, 2, 3, 4)
        for theirs, ours in {
            f"patch_embed{stage}.proj": "embedding.projection",
            f"patch_embed{stage}.norm": "embedding.norm",
            f"block{stage}.*.norm1": "blocks.*.norm1",
            f"block{stage}.*.attn.q": "blocks.*.attention.query",
            f"block{stage}.*.attn.kv": "blocks.*.attention.key_value",
            f"block{stage}.*.attn.proj": "blocks.*.attention.projection",
            f"block{stage}.*.attn.sr": "blocks.*.attention.reduction",
            f"block{stage}.*.attn.norm": "blocks.*.attention.norm",
            f"block{stage}.*.norm2": "blocks.*.norm2",
            f"block{stage}.*.mlp.fc1": "blocks.*.mlp.expand",
            f"block{stage}.*.mlp.dwconv.dwconv": "blocks.*.mlp.depthwise",
            f"block{stage}.*.mlp.fc2": "blocks.*.mlp.contract",
            f"norm{stage}": "norm",
        }.items()
    }
    | {
        f"decode_head.linear_c{level + 1}.proj": f"decoder.levels.{level}.projection"
        for level in (0, 1, 2, 3)
    }
    | {
        "decode_head.linear_fuse.conv": "decoder.fuse",
        "decode_head.linear_fuse.bn": "decoder.fuse_norm",
        "decode_head.linear_pred": "decoder.classifier",
    },
    # A classifier that the head's base class builds and the network never calls.
    unused=("decode_head.conv_seg",),
    traceless=lambda _: {"ln_eps": "mixed"},
)

HUGGING_FACE = _table(
    origin="Hugging Face's SegFormer",
    encoder_prefix="segformer.",
    modules={
        # As files have it.
        f"segformer.encoder.{theirs}": f"encoder.stages.*.{ours}"
        for theirs, ours in {
            "patch_embeddings.*.proj": "embedding.projection",
            "patch_embeddings.*.layer_norm": "embedding.norm",
            "block.*.*.layer_norm_1": "blocks.*.norm1",
            "block.*.*.attention.self.query": "blocks.*.attention.query",
            "block.*.*.attention.self.key_value": "blocks.*.attention.key_value",
            "block.*.*.attention.output.dense": "blocks.*.attention.projection",
            "block.*.*.attention.self.sr": "blocks.*.attention.reduction",
            "block.*.*.attention.self.layer_norm": "blocks.*.attention.norm",
            "block.*.*.layer_norm_2": "blocks.*.norm2",
            "block.*.*.mlp.dense1": "blocks.*.mlp.expand",
            "block.*.*.mlp.dwconv.dwconv": "blocks.*.mlp.depthwise",
            "block.*.*.mlp.dense2": "blocks.*.mlp.contract",
            "layer_norm.*": "norm",
        }.items()
    }
    | {
        # As transformers 5 has it in memory, and so in a state dict that it did not save itself.
        f"segformer.stages.*.{theirs}": f"encoder.stages.*.{ours}"
        for theirs, ours in {
            "patch_embeddings.proj": "embedding.projection",
            "patch_embeddings.layer_norm": "embedding.norm",
            "blocks.*.layernorm_before": "blocks.*.norm1",
            "blocks.*.attention.q_proj": "blocks.*.attention.query",
            "blocks.*.attention.key_value": "blocks.*.attention.key_value",
            "blocks.*.attention.o_proj": "blocks.*.attention.projection",
            "blocks.*.attention.sequence_reduction.sequence_reduction": (
                "blocks.*.attention.reduction"
            ),
            "blocks.*.attention.sequence_reduction.layer_norm": "blocks.*.attention.norm",
            "blocks.*.layernorm_after": "blocks.*.norm2",
            "blocks.*.mlp.fc1": "blocks.*.mlp.expand",
            "blocks.*.mlp.dwconv.dwconv": "blocks.*.mlp.depthwise",
            "blocks.*.mlp.fc2": "blocks.*.mlp.contract",
            "layer_norm": "norm",
        }.items()
    }
    | {
        "decode_head.linear_c.*.proj": "decoder.levels.*.projection",
        "decode_head.linear_projections.*.proj": "decoder.levels.*.projection",
        "decode_head.linear_fuse": "decoder.fuse",
        "decode_head.batch_norm": "decoder.fuse_norm",
        "decode_head.classifier": "decoder.classifier",
    },
    convert=_join_keys_and_values,
    traceless=lambda _: {"ln_eps": 1e-5},
    model_type="segformer",
    read_config=_read_config,
)
