"""DToP: the names of the authors' code, which are OpenMMLab's around its heads, and timm's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segtrain.weights.keys import KeyTable
from segtrain.weights.segvit import attention_to_mask
from segtrain.weights.vit import (
    OPENMMLAB_VIT,
    OPTIONAL,
    SIZES,
    name_packed_projections,
    timm_table,
)

_HEADS = {"auxiliary_head.*": "decoder.auxiliary_heads.*", "decode_head": "decoder.head"}


def _read_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``create_network`` takes for weights by our names; empty if parts are missing."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        size = SIZES[shapes["encoder.vit.cls_token"][-1]]
        classes = shapes["decoder.head.queries.weight"][0]
    # Parts are missing.
    except LookupError:
        return {}
    return {"name": f"dtop_{size}", "num_classes": classes} if size in ("b", "l") else {}


def _traceless(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    arguments = _read_arguments(weights)
    if arguments.get("name") == "dtop_b":
        return {"num_heads": 6, "normalisation": "imagenet"}
    if arguments.get("name") == "dtop_l":
        # 150 are ADE20K's.
        return {"num_heads": 8 if arguments["num_classes"] == 150 else 16, "normalisation": "half"}
    return {}


TIMM = timm_table("dtop", _read_arguments)

OFFICIAL = KeyTable(
    origin="DToP's authors",
    network="dtop",
    encoder_prefix="backbone.",
    modules=OPENMMLAB_VIT
    | {
        pattern: name
        for theirs, ours in _HEADS.items()
        for pattern, name in {
            f"{theirs}.q": f"{ours}.queries",
            f"{theirs}.input_proj": f"{ours}.attention.projection",
            f"{theirs}.proj_norm": f"{ours}.attention.norm",
            f"{theirs}.class_embed": f"{ours}.classifier",
            **attention_to_mask(f"{theirs}.decoder", f"{ours}.attention"),
        }.items()
    },
    unused=tuple(
        f"{head}.loss_decode.criterion"
        for head in ("auxiliary_head.0", "auxiliary_head.1", "decode_head")
    ),
    convert=name_packed_projections,
    read_arguments=_read_arguments,
    traceless=_traceless,
    optional=OPTIONAL,
)
