"""RTFormer: the names of the authors' code in PaddleSeg, and of ports that have kept them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segtrain.weights.keys import ENCODER, KeyTable

# Their parameters and statistics, where ours have other names.
_PARAMETERS = {"k": "key", "v": "value", "_mean": "running_mean", "_variance": "running_var"}
# The arguments that weights tell, as either network has them.
_COMMON = {"context_channels": 128, "auxiliary_head": True, "head": "segmentation"}
_PUBLISHED: dict[str, dict[str, Any]] = {
    "rtformer_slim": {"base_channels": 32, "head_channels": 64, "injection": (True, True)},
    "rtformer_base": {"base_channels": 64, "head_channels": 128, "injection": (True, False)},
}
# PaddleSeg's recipes whose weights differ in shape -> cross_size.
_CROSS_SIZES = {"Slim on Cityscapes": 12, "Slim on ADE20K": 8, "Base": 12}


def _rename_parameters(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    renamed = {}
    for name, value in weights.items():
        module, _, parameter = name.rpartition(".")
        renamed[f"{module}.{_PARAMETERS.get(parameter, parameter)}"] = value
    return renamed


def _read_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``create_network`` takes for weights by our names; empty if parts are missing."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        # Other kinds of attention have no key of four dimensions.
        low_channels, _, _, _ = shapes["encoder.block4.low_attention.key"]
        found: dict[str, Any] = {
            "base_channels": low_channels // 8,
            "injection": tuple(f"encoder.block{i}.injection.2.weight" in shapes for i in (4, 5)),
        }
        if "decoder.classifier.weight" in shapes:
            found |= {
                "num_classes": shapes["decoder.classifier.weight"][0],
                "head": "classification",
            }
        elif any(not name.startswith(ENCODER) for name in shapes):
            found |= {
                "num_classes": shapes["decoder.head.classifier.weight"][0],
                "context_channels": shapes["decoder.context.branches.0.2.weight"][0],
                "head_channels": shapes["decoder.head.conv1.weight"][0] // 2,
                "auxiliary_head": "decoder.auxiliary_head.conv1.weight" in shapes,
            }
    # Parts are missing, or not what their names say.
    except (LookupError, ValueError):
        return {}
    base = found["base_channels"] == _PUBLISHED["rtformer_base"]["base_channels"]
    name = "rtformer_base" if base else "rtformer_slim"
    published = _COMMON | _PUBLISHED[name]
    others = {key: value for key, value in found.items() if published.get(key) != value}
    return {"name": name, **others}


def _recipe(weights: Mapping[str, Tensor]) -> str:
    """Which of PaddleSeg's recipes weights by our names fit; empty if none."""
    arguments = _read_arguments(weights)
    num_classes = arguments.pop("num_classes", None)
    arguments.pop("auxiliary_head", None)
    if arguments == {"name": "rtformer_slim"}:
        return "Slim on Cityscapes"
    ade20k = {"name": "rtformer_slim", "injection": (True, False)}
    if arguments == ade20k and num_classes == 150:
        return "Slim on ADE20K"
    return "Base" if arguments == {"name": "rtformer_base"} else ""


def _traceless(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    recipe = _recipe(weights)
    return {"cross_size": _CROSS_SIZES.get(recipe, ...), "num_heads": 8 if recipe else ...}


PADDLESEG = KeyTable(
    origin="PaddleSeg's RTFormer",
    network="rtformer",
    modules={
        "conv1.*": "encoder.stem.*",
        "compression3.*": "encoder.compression.*",
        "layer2.0.downsample.*": "encoder.stage2.0.shortcut.*",
        "layer3.0.downsample.*": "encoder.stage3.0.shortcut.*",
        "layer4.attn_shortcut_l.*": "encoder.block4.low_shortcut.*",
    }
    | {
        f"{stage}.*.{theirs}": f"encoder.{our_stage}.*.{ours}"
        for stage, our_stage in {
            "layer1": "stage1",
            "layer2": "stage2",
            "layer3": "stage3",
            "layer3_": "high",
        }.items()
        for theirs, ours in {
            "conv1": "conv1",
            "bn1": "norm1",
            "conv2": "conv2",
            "bn2": "norm2",
        }.items()
    }
    | {
        f"layer{number}.{theirs}": f"encoder.block{number}.{ours}"
        for number in (4, 5)
        for theirs, ours in {
            "attn_l": "low_attention",
            "attn_l.norm": "low_attention.norm",
            "mlp_l.norm": "low_mlp.norm",
            "mlp_l.conv1": "low_mlp.conv1",
            "mlp_l.conv2": "low_mlp.conv2",
            "compression.*": "compression.*",
            "attn_h.norm": "high_attention.norm",
            "cross_kv.0": "high_attention.low_norm",
            "cross_kv.2": "high_attention.key_value",
            "mlp_h.norm": "high_mlp.norm",
            "mlp_h.conv1": "high_mlp.conv1",
            "mlp_h.conv2": "high_mlp.conv2",
            "down.*": "injection.*",
        }.items()
    }
    | {
        # The average pools count as layers there.
        f"spp.scale{scale}.{layer + (scale > 0)}": f"decoder.context.branches.{scale}.{layer}"
        for scale in range(5)
        for layer in (0, 2)
    }
    | {
        f"spp.process{number}.*": f"decoder.context.processes.{number - 1}.*"
        for number in (1, 2, 3, 4)
    }
    | {
        "spp.compression.*": "decoder.context.compression.*",
        "spp.shortcut.*": "decoder.context.shortcut.*",
    }
    | {
        f"{head}.{theirs}": f"decoder.{our_head}.{ours}"
        for head, our_head in {"seghead": "head", "seghead_extra": "auxiliary_head"}.items()
        for theirs, ours in {
            "bn1": "norm1",
            "conv1": "conv1",
            "bn2": "norm2",
            "conv2": "classifier",
        }.items()
    },
    convert=_rename_parameters,
    read_arguments=_read_arguments,
    traceless=_traceless,
    recipe=_recipe,
    # The ImageNet file of a size is one, and the recipes' injections are several.
    optional=("encoder.block4.injection.", "encoder.block5.injection."),
)
