"""DoViT: the names of the authors' code over OpenMMLab's, those of OpenMMLab's ViT, and timm's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segtrain.networks.dovit import VARIANTS
from segtrain.weights.keys import KeyTable
from segtrain.weights.vit import (
    OPENMMLAB_VIT,
    OPTIONAL,
    SIZES,
    name_class_tokens,
    name_packed_projections,
    openmmlab_mask_transformer,
    openmmlab_up_head,
    timm_table,
)


def _read_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``create_network`` takes for weights by our names; empty if parts are missing."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    head = "decoder.auxiliary_heads.0"
    try:
        size = SIZES[shapes["encoder.vit.cls_token"][-1]]
        classes = shapes[f"{head}.classifier.weight"][0]
    # Parts are missing, or not what their names say.
    except LookupError:
        return {}
    if size not in VARIANTS:
        return {}
    decoder = "segmenter" if "decoder.head.class_tokens" in shapes else "setr"
    found: dict[str, Any] = {"name": f"dovit_{decoder}_{size}", "num_classes": classes}
    if "encoder.vit.norm.weight" not in shapes:
        found["final_norm"] = False
    if f"{head}.convolutions.1.0.weight" in shapes:
        found["auxiliary_convolutions"] = 2
    return found


TIMM = timm_table("dovit", _read_arguments)

_AUXILIARY_HEAD = ("backbone.auxiliary_head.*", "decoder.auxiliary_heads.*")


def _rename_parameters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return name_class_tokens(name_packed_projections(weights))


AUTHORS = KeyTable(
    origin="DoViT's authors",
    network="dovit",
    encoder_prefix="backbone.",
    modules=OPENMMLAB_VIT
    | {
        f"backbone.layers.*.attn.{layer}": f"encoder.vit.blocks.*.attn.{layer}"
        for layer in ("qkv", "proj")
    }
    | openmmlab_up_head(*_AUXILIARY_HEAD)
    | {
        f"{_AUXILIARY_HEAD[0]}.convs.*.{theirs}": f"{_AUXILIARY_HEAD[1]}.convolutions.*.{ours}"
        for theirs, ours in {"conv": 0, "bn": 1}.items()
    }
    | openmmlab_up_head("decode_head", "decoder.head")
    | openmmlab_mask_transformer("decoder.head"),
    convert=_rename_parameters,
    read_arguments=_read_arguments,
    optional=OPTIONAL,
)
