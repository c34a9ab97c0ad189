"""SETR: the names of OpenMMLab and of the authors, and timm's for the encoder."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segtrain.networks.setr import BACKBONES
from segtrain.weights.keys import KeyTable
from segtrain.weights.vit import (
    OPENMMLAB_VIT,
    OPTIONAL,
    SIZES,
    name_packed_projections,
    openmmlab_up_head,
    timm_table,
    timm_vit,
)

_LEVELS = range(4)


def _name_classifiers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The authors' last convolution of a head, ``conv_1`` or ``conv_4``, as ``classifier``."""
    last: dict[str, int] = {}
    for name in weights:
        if found := re.fullmatch(r"(.*head\S*)\.conv_(\d+)\.weight", name):
            last[found[1]] = max(last.get(found[1], 0), int(found[2]))
    named = {}
    for name, value in weights.items():
        head, _, layer = name.rpartition(".conv_")
        number, _, parameter = layer.partition(".")
        is_last = head in last and number == str(last[head])
        named[f"{head}.classifier.{parameter}" if is_last else name] = value
    return named


def _read_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``create_network`` takes for weights by our names; empty if parts are missing."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        size = SIZES[shapes["encoder.vit.cls_token"][-1]]
        classes, channels, *kernel = shapes["decoder.head.classifier.weight"]
        official = "decoder.head.convolutions.0.0.bias" in shapes
        head = "pup" if "decoder.head.convolutions.1.0.weight" in shapes else "naive"
        if "decoder.neck.norms.0.weight" in shapes:
            head, official = "mla", kernel == [3, 3]
            channels = shapes["decoder.neck.projections.0.0.weight"][0]
        if size not in BACKBONES:
            return {}
    # Parts are missing, or not what their names say.
    except (LookupError, ValueError):
        return {}
    arguments: dict[str, Any] = {"name": f"setr_{head}_{size}", "num_classes": classes}
    if official:
        arguments["head_style"] = "official"
    if channels != 256:
        arguments["channels"] = channels
    return arguments


TIMM = timm_table("setr", _read_arguments)

OPENMMLAB = KeyTable(
    origin="OpenMMLab's SETR",
    network="setr",
    encoder_prefix="backbone.",
    modules=OPENMMLAB_VIT
    | openmmlab_up_head("decode_head", "decoder.head")
    | openmmlab_up_head("auxiliary_head.*", "decoder.auxiliary_heads.*"),
    convert=name_packed_projections,
    read_arguments=_read_arguments,
    optional=OPTIONAL,
)

OPENMMLAB_MLA = KeyTable(
    origin="OpenMMLab's SETR-MLA",
    network="setr",
    encoder_prefix="backbone.",
    modules=OPENMMLAB_VIT
    | {
        "neck.norm.*": "decoder.neck.norms.*",
        "neck.mla.channel_proj.*.conv": "decoder.neck.projections.*.0",
        "neck.mla.channel_proj.*.bn": "decoder.neck.projections.*.1",
    }
    # The deepest level is their first.
    | {
        theirs.format(layer): ours.format(number)
        for level in _LEVELS
        for number, layer in enumerate(("conv", "bn"))
        for theirs, ours in {
            f"neck.mla.feat_extract.{level}.{{}}": f"decoder.neck.extractions.{3 - level}.{{}}",
            f"decode_head.up_convs.{level}.0.{{}}": f"decoder.head.branches.{3 - level}.0.{{}}",
            f"decode_head.up_convs.{level}.1.{{}}": f"decoder.head.branches.{3 - level}.1.{{}}",
        }.items()
    }
    | {
        "decode_head.conv_seg": "decoder.head.classifier",
        "auxiliary_head.*.conv_seg": "decoder.auxiliary_heads.*",
    },
    convert=name_packed_projections,
    read_arguments=_read_arguments,
    optional=OPTIONAL,
)

# Classifiers that the heads' base class builds and the network never calls.
_UNUSED = ("decode_head.conv_seg", *(f"auxiliary_head.{i}.conv_seg" for i in _LEVELS))

OFFICIAL = KeyTable(
    origin="SETR's authors",
    network="setr",
    encoder_prefix="backbone.",
    modules=timm_vit("backbone.")
    | {
        f"{head}.{theirs}": f"{our_head}.{ours}"
        for head, our_head in {
            "decode_head": "decoder.head",
            "auxiliary_head.*": "decoder.auxiliary_heads.*",
        }.items()
        for theirs, ours in {
            "norm": "norm",
            "conv_*": "convolutions.*.0",
            "syncbn_fc_*": "convolutions.*.1",
            "classifier": "classifier",
        }.items()
    },
    unused=_UNUSED,
    convert=_name_classifiers,
    read_arguments=_read_arguments,
    optional=OPTIONAL,
)

OFFICIAL_MLA = KeyTable(
    origin="SETR's authors",
    network="setr",
    encoder_prefix="backbone.",
    modules=timm_vit("backbone.")
    | {
        theirs: ours
        for level in _LEVELS
        for theirs, ours in {
            f"backbone.norm_{level}": f"decoder.neck.norms.{level}",
            f"backbone.mla.mla_p{level + 2}_1x1.*": f"decoder.neck.projections.{level}.*",
            f"backbone.mla.mla_p{level + 2}.*": f"decoder.neck.extractions.{level}.*",
            # The activation counts as a layer there.
            f"decode_head.mlahead.head{level + 2}.0": f"decoder.head.branches.{level}.0.0",
            f"decode_head.mlahead.head{level + 2}.1": f"decoder.head.branches.{level}.0.1",
            f"decode_head.mlahead.head{level + 2}.3": f"decoder.head.branches.{level}.1.0",
            f"decode_head.mlahead.head{level + 2}.4": f"decoder.head.branches.{level}.1.1",
        }.items()
    }
    | {
        "decode_head.cls": "decoder.head.classifier",
        "auxiliary_head.*.aux": "decoder.auxiliary_heads.*",
    },
    unused=_UNUSED,
    read_arguments=_read_arguments,
    optional=OPTIONAL,
)
