"""Segmenter: the names of the authors and of OpenMMLab, and timm's for the encoder."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segtrain.networks.segmenter import BACKBONES
from segtrain.weights.keys import KeyTable
from segtrain.weights.vit import (
    OPENMMLAB_VIT,
    OPTIONAL,
    SIZES,
    name_class_tokens,
    name_packed_projections,
    openmmlab_mask_transformer,
    timm_table,
    timm_vit,
)

# Matrices by which tokens are multiplied -> linear layers, whose weights are transposed.
_MATRICES = {"proj_patch": "patch_projection", "proj_classes": "class_projection"}


def _make_layers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    layers = {}
    for name, value in name_class_tokens(weights).items():
        module, _, parameter = name.rpartition(".")
        if parameter in _MATRICES and value.ndim == 2:
            layers[f"{module}.{_MATRICES[parameter]}.weight"] = value.T
        else:
            layers[name] = value
    return layers


def _read_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``create_network`` takes for weights by our names; empty if parts are missing."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        size = SIZES[shapes["encoder.vit.cls_token"][-1]]
        if size not in BACKBONES:
            return {}
        if "decoder.weight" in shapes:
            classes = shapes["decoder.weight"][0]
            return {"name": f"segmenter_{size}", "num_classes": classes, "decoder": "linear"}
        return {"name": f"segmenter_{size}", "num_classes": shapes["decoder.class_tokens"][1]}
    # Parts are missing, or not what their names say.
    except LookupError:
        return {}


TIMM = timm_table("segmenter", _read_arguments)

_table = functools.partial(
    KeyTable, network="segmenter", read_arguments=_read_arguments, optional=OPTIONAL
)

OFFICIAL = _table(
    origin="Segmenter's authors",
    encoder_prefix="encoder.",
    modules=timm_vit("encoder.")
    | {
        "decoder": "decoder",
        "decoder.proj_dec": "decoder.projection",
        "decoder.decoder_norm": "decoder.norm",
        "decoder.patch_projection": "decoder.patch_projection",
        "decoder.class_projection": "decoder.class_projection",
        "decoder.mask_norm": "decoder.score_norm",
        # The linear decoder.
        "decoder.head": "decoder",
    }
    | {
        f"decoder.blocks.*.{name}": f"decoder.blocks.*.{name}"
        for name in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    },
    # ImageNet's classifier.
    unused=("encoder.head", "encoder.pre_logits"),
    convert=_make_layers,
    traceless=lambda _: {"head_style": "official"},
)

OPENMMLAB = _table(
    origin="OpenMMLab's Segmenter",
    encoder_prefix="backbone.",
    # The linear decoder is `conv_seg`.
    modules=OPENMMLAB_VIT
    | openmmlab_mask_transformer("decoder")
    | {"decode_head.conv_seg": "decoder"},
    convert=lambda weights: name_class_tokens(name_packed_projections(weights)),
    traceless=lambda _: {"head_style": "mmseg"},
)
