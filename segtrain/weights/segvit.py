"""SegViT: the names of the authors' code, which are OpenMMLab's around its head, and timm's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segtrain.weights.keys import KeyTable
from segtrain.weights.vit import (
    OPENMMLAB_VIT,
    OPTIONAL,
    SIZES,
    name_packed_projections,
    timm_table,
)


def attention_to_mask(theirs: str, ours: str) -> dict[str, str]:
    """Patterns of the modules of the authors' decoder layers -> ours."""
    names = {
        # Named so by `name_packed_projections`.
        "self_attn.qkv": "self_attention.qkv",
        "self_attn.out_proj": "self_attention.proj",
        "multihead_attn.q": "cross_attention.query",
        "multihead_attn.k": "cross_attention.key",
        "multihead_attn.v": "cross_attention.value",
        "multihead_attn.proj": "cross_attention.projection",
        "linear1": "mlp.fc1",
        "linear2": "mlp.fc2",
        "norm1": "norm1",
        "norm2": "norm2",
        "norm3": "norm3",
    }
    return {f"{theirs}.layers.*.{name}": f"{ours}.layers.*.{own}" for name, own in names.items()}


def _read_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``create_network`` takes for weights by our names; empty if parts are missing."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        size = SIZES[shapes["encoder.vit.cls_token"][-1]]
        classes = shapes["decoder.queries.weight"][0]
    # Parts are missing.
    except LookupError:
        return {}
    shrunk = "decoder.tokens.weight" in shapes
    name = {("b", False): "segvit_b", ("l", False): "segvit_l", ("l", True): "segvit_shrunk_l"}
    return {"name": name[size, shrunk], "num_classes": classes} if (size, shrunk) in name else {}


def _traceless(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    num_heads = {"segvit_b": 12, "segvit_l": 16}.get(_read_arguments(weights).get("name", ""))
    return {} if num_heads is None else {"num_heads": num_heads, "normalisation": "half"}


TIMM = timm_table("segvit", _read_arguments)

OFFICIAL = KeyTable(
    origin="SegViT's authors",
    network="segvit",
    encoder_prefix="backbone.",
    modules=OPENMMLAB_VIT
    | {"decode_head.q": "decoder.queries", "decode_head.class_embed": "decoder.classifier"}
    | {
        theirs: ours
        for level in range(3)
        for theirs, ours in {
            f"decode_head.input_proj_{level + 1}": f"decoder.levels.{level}.projection",
            f"decode_head.proj_norm_{level + 1}": f"decoder.levels.{level}.norm",
            **attention_to_mask(f"decode_head.decoder_{level + 1}", f"decoder.levels.{level}"),
        }.items()
    },
    unused=("decode_head.loss_decode.criterion",),
    convert=name_packed_projections,
    read_arguments=_read_arguments,
    traceless=_traceless,
    optional=OPTIONAL,
)
