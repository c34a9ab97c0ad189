"""Mask2Former and PRO-SCALE: the names of the authors' codes, of Hugging Face, and of backbones.

The authors of both, and of ECO-M2F, have built on detectron2 and share their names.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segtrain.errors import UserError
from segtrain.networks.mask2former import Mask2Former
from segtrain.networks.proscale import PUBLISHED
from segtrain.weights.keys import ENCODER, KeyTable
from segtrain.weights.pyramid import (
    STAGE_NORMS,
    authors_swin,
    detectron2_resnet,
    drop_window_tables,
    hugging_face_resnet,
    hugging_face_swin,
    join_projections,
    read_backbone,
    timm_resnet,
    timm_swin,
)

_GATE = "decoder.pixels.recalibration.gate.weight"
_EXITS = "decoder.pixels.gate.head.weight"
_ECO_EXITS = (2, 3, 4, 5, 6)  # of six layers
_NUM_POINTS = 4  # that a head samples in each level
_DEFAULTS = {
    name: parameter.default for name, parameter in inspect.signature(Mask2Former).parameters.items()
}


def _read_arguments(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    """What ``create_network`` takes for weights by our names; empty if parts are missing."""
    shapes = {name: tuple(value.shape) for name, value in weights.items()}
    try:
        size, backbone = read_backbone(shapes)
        found: dict[str, Any] = {"backbone_arguments": backbone} if backbone else {}
        if all(name.startswith(ENCODER) for name in shapes):
            return {"name": f"mask2former_{size}", **found}
        decoder = _decoder_arguments(shapes)
        num_classes = shapes["decoder.queries.classifier.weight"][0] - 1
    # Parts are missing, or not what their names say.
    except (LookupError, ValueError):
        return {}
    family, published = "mask2former", _DEFAULTS
    if any(decoder["encoder_layers"][:2]):
        family, published = "proscale", {**_DEFAULTS, **PUBLISHED}
    others = {name: value for name, value in decoder.items() if value != published[name]}
    return {"name": f"{family}_{size}", "num_classes": num_classes, **others, **found}


def _decoder_arguments(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    def count_layers(part: str) -> int:
        starts = {name.split(".")[3] for name in shapes if name.startswith(f"{part}.layers.")}
        return len(starts)

    pixels, queries = "decoder.pixels", "decoder.queries"
    num_queries, width = shapes[f"{queries}.query_features.weight"]
    weights = [
        shapes[f"{pixels}.layers.{i}.attention.attention_weights.weight"][0]
        for i in range(count_layers(pixels))
    ]
    num_heads, encoder_layers = _stages([count // _NUM_POINTS for count in weights])
    found: dict[str, Any] = {
        "num_queries": num_queries,
        "encoder_layers": encoder_layers,
        "decoder_layers": count_layers(queries),
        "width": width,
        "num_heads": num_heads,
        "recalibration": None,
        "pixel_embedding": ("convolution" if f"{pixels}.output.0.weight" in shapes else "max_pool"),
    }
    if encoder_layers != (0, 0, 0):
        found["encoder_mlp_width"] = shapes[f"{pixels}.layers.0.linear1.weight"][0]
    if found["decoder_layers"]:
        found["decoder_mlp_width"] = shapes[f"{queries}.layers.0.linear1.weight"][0]
    if _GATE in shapes:
        found["recalibration"] = "linear" if len(shapes[_GATE]) == 2 else "convolution"
    if _EXITS in shapes:
        found["exits"] = ...
    return found


def _stages(looks: list[int]) -> tuple[Any, tuple[int, ...]]:
    """Heads, and layers of each stage, from the heads times levels of every layer.

    The heads are the published 8 if that can be.
    """
    if not looks:
        return ..., (0, 0, 0)
    most = max(looks)
    for num_heads in (8, most // 3, most // 2, most):
        if num_heads and all(look in (num_heads, 2 * num_heads, 3 * num_heads) for look in looks):
            return num_heads, tuple(looks.count(levels * num_heads) for levels in (1, 2, 3))
    raise ValueError("no number of heads")


def _recipe(weights: Mapping[str, Tensor]) -> str:
    """Whose published configurations weights by our names fit; empty if none."""
    arguments = _read_arguments(weights)
    if _is_staged(arguments):
        return "" if arguments.keys() & {"recalibration", "pixel_embedding"} else "PRO-SCALE"
    layers = arguments.get("encoder_layers", _DEFAULTS["encoder_layers"])
    if _EXITS in weights and layers == (0, 0, 6) and len(weights[_EXITS]) == len(_ECO_EXITS):
        return "ECO-M2F"
    return ""


def _traceless(weights: Mapping[str, Tensor]) -> dict[str, Any]:
    recipe = _recipe(weights)
    values: dict[str, Any] = {}
    if _GATE in weights:
        values["temperature"] = 0.1 if recipe == "PRO-SCALE" else ...
    if _is_staged(_read_arguments(weights)):
        values["residual"] = False if recipe == "PRO-SCALE" else ...
    if _EXITS in weights:
        values["exits"] = _ECO_EXITS if recipe == "ECO-M2F" else ...
    return values


def _is_staged(arguments: Mapping[str, Any]) -> bool:
    return str(arguments.get("name")).startswith("proscale")


def _split_packed(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``in_proj_weight`` (3d, d), rows query | key | value, and ``in_proj_bias``, in three."""
    split = {}
    for name, value in weights.items():
        module, _, parameter = name.rpartition(".in_proj_")
        if module and value.ndim:
            width = len(value) // 3
            for index, part in enumerate(("query", "key", "value")):
                split[f"{module}.{part}.{parameter}"] = value[index * width : (index + 1) * width]
        else:
            split[name] = value
    return split


def _name_level_embedding(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The pixel decoder's parameter ``level_embed`` as ``level_embedding``."""
    return {
        f"{name}ding" if name.endswith(".level_embed") else name: value
        for name, value in weights.items()
    }


def _convert_authors(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Also of versions before the second, which name no ``pixel_decoder``."""
    head = "sem_seg_head."
    named = {}
    for name, value in weights.items():
        if name.startswith(head) and not name.startswith((f"{head}pixel_d", f"{head}predictor.")):
            name = f"{head}pixel_decoder.{name.removeprefix(head)}"
        named[name] = value
    return _name_level_embedding(_split_packed(drop_window_tables(named)))


def _convert_hugging_face(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return _name_level_embedding(_split_packed(join_projections(drop_window_tables(weights))))


def _read_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """What Hugging Face's ``config.json`` tells and the weights do not."""
    backbone = config.get("backbone_config")
    kind = backbone.get("model_type") if isinstance(backbone, dict) else None
    stages: list[Any] = [f"stage{number}" for number in (1, 2, 3, 4)]
    demands: dict[str, dict[str, Any]] = {
        "swin": {"hidden_act": "gelu", "layer_norm_eps": 1e-5, "out_features": stages},
        "resnet": {
            "hidden_act": "relu",
            "downsample_in_first_stage": False,
            "downsample_in_bottleneck": False,
            "out_features": stages,
        },
    }
    if not isinstance(backbone, dict) or kind not in demands:
        raise UserError(
            f"config.json has a backbone_config of model_type {kind!r}, "
            f"segtrain's Mask2Former {' or '.join(map(repr, demands))}"
        )
    own = {
        "activation_function": "relu",
        "pre_norm": False,
        "common_stride": 4,
        "feature_strides": [4, 8, 16, 32],
    }
    for part, demanded in ((config, own), (backbone, demands[kind])):
        for key, ours in demanded.items():
            # Absent, or None, is the default.
            if part.get(key) not in (None, ours):
                raise UserError(
                    f"config.json has {key} {part[key]!r}, segtrain's Mask2Former {ours!r}"
                )
    return {"num_heads": config.get("num_attention_heads", 8)}


_table = functools.partial(
    KeyTable,
    network="mask2former",
    read_arguments=_read_arguments,
    optional=(STAGE_NORMS,),
    exact=(_GATE,),
)

AUTHORS = _table(
    origin="Mask2Former's and PRO-SCALE's authors",
    modules=authors_swin("backbone.")
    | detectron2_resnet("backbone.")
    | {"backbone.norm*": f"{STAGE_NORMS}*"}
    # Files of a backbone alone.
    | authors_swin("")
    | detectron2_resnet("")
    | {
        f"sem_seg_head.pixel_decoder.{theirs}": f"decoder.pixels.{ours}"
        for theirs, ours in {
            "input_proj.*.*": "input_projections.*.*",
            "transformer.encoder.layers.*.self_attn.sampling_offsets": (
                "layers.*.attention.sampling_offsets"
            ),
            "transformer.encoder.layers.*.self_attn.attention_weights": (
                "layers.*.attention.attention_weights"
            ),
            "transformer.encoder.layers.*.self_attn.value_proj": (
                "layers.*.attention.value_projection"
            ),
            "transformer.encoder.layers.*.self_attn.output_proj": (
                "layers.*.attention.output_projection"
            ),
            "transformer.encoder.layers.*.norm1": "layers.*.norm1",
            "transformer.encoder.layers.*.linear1": "layers.*.linear1",
            "transformer.encoder.layers.*.linear2": "layers.*.linear2",
            "transformer.encoder.layers.*.norm2": "layers.*.norm2",
            "transformer.encoder.token_excite.ops": "recalibration.gate",
            "transformer.encoder.gt.head": "gate.head",
            "adapter_1": "lateral.0",
            "adapter_1.norm": "lateral.1",
            "layer_1": "output.0",
            "layer_1.norm": "output.1",
            "mask_features": "mask_projection",
        }.items()
    }
    | {"sem_seg_head.pixel_decoder.transformer": "decoder.pixels"}  # the level embedding
    | {
        f"sem_seg_head.predictor.{theirs}": f"decoder.queries.{ours}"
        for theirs, ours in {
            # Query, key and value are named so by `_split_packed`.
            **{
                f"transformer_{kind}_attention_layers.*.{module}.{name}": (
                    f"layers.*.{kind}_attention.{own}"
                )
                for kind, module in (("cross", "multihead_attn"), ("self", "self_attn"))
                for name, own in {
                    "query": "query",
                    "key": "key",
                    "value": "value",
                    "out_proj": "projection",
                }.items()
            },
            "transformer_cross_attention_layers.*.norm": "layers.*.cross_norm",
            "transformer_self_attention_layers.*.norm": "layers.*.self_norm",
            "transformer_ffn_layers.*.linear1": "layers.*.linear1",
            "transformer_ffn_layers.*.linear2": "layers.*.linear2",
            "transformer_ffn_layers.*.norm": "layers.*.mlp_norm",
            "decoder_norm": "norm",
            "query_feat": "query_features",
            "static_query": "query_features",  # in versions before the second
            "query_embed": "query_positions",
            "level_embed": "level_embedding",
            "class_embed": "classifier",
            "mask_embed.layers.0": "mask_embedding.0",
            "mask_embed.layers.1": "mask_embedding.2",
            "mask_embed.layers.2": "mask_embedding.4",
        }.items()
    },
    # Of the loss; and what classifies images in files of a backbone alone.
    unused=("criterion", "norm", "head", "stem.fc"),
    convert=_convert_authors,
    traceless=_traceless,
    recipe=_recipe,
)

HUGGING_FACE = _table(
    origin="Hugging Face's Mask2Former",
    modules=hugging_face_swin("model.pixel_level_module.encoder.")
    | hugging_face_resnet("model.pixel_level_module.encoder.")
    | {
        f"model.pixel_level_module.decoder.{theirs}": f"decoder.pixels.{ours}"
        for theirs, ours in {
            "input_projections.*.*": "input_projections.*.*",
            "encoder.layers.*.self_attn.sampling_offsets": "layers.*.attention.sampling_offsets",
            "encoder.layers.*.self_attn.attention_weights": "layers.*.attention.attention_weights",
            "encoder.layers.*.self_attn.value_proj": "layers.*.attention.value_projection",
            "encoder.layers.*.self_attn.output_proj": "layers.*.attention.output_projection",
            "encoder.layers.*.self_attn_layer_norm": "layers.*.norm1",
            "encoder.layers.*.fc1": "layers.*.linear1",
            "encoder.layers.*.fc2": "layers.*.linear2",
            "encoder.layers.*.final_layer_norm": "layers.*.norm2",
            "adapter_1.*": "lateral.*",
            "layer_1.*": "output.*",
            "mask_projection": "mask_projection",
        }.items()
    }
    | {"model.pixel_level_module.decoder": "decoder.pixels"}  # the level embedding
    | {
        f"model.transformer_module.{theirs}": f"decoder.queries.{ours}"
        for theirs, ours in {
            "decoder.layers.*.cross_attn.query": "layers.*.cross_attention.query",
            "decoder.layers.*.cross_attn.key": "layers.*.cross_attention.key",
            "decoder.layers.*.cross_attn.value": "layers.*.cross_attention.value",
            "decoder.layers.*.cross_attn.out_proj": "layers.*.cross_attention.projection",
            "decoder.layers.*.cross_attn_layer_norm": "layers.*.cross_norm",
            "decoder.layers.*.self_attn.q_proj": "layers.*.self_attention.query",
            "decoder.layers.*.self_attn.k_proj": "layers.*.self_attention.key",
            "decoder.layers.*.self_attn.v_proj": "layers.*.self_attention.value",
            "decoder.layers.*.self_attn.out_proj": "layers.*.self_attention.projection",
            "decoder.layers.*.self_attn_layer_norm": "layers.*.self_norm",
            "decoder.layers.*.fc1": "layers.*.linear1",
            "decoder.layers.*.fc2": "layers.*.linear2",
            "decoder.layers.*.final_layer_norm": "layers.*.mlp_norm",
            "decoder.layernorm": "norm",
            "decoder.mask_predictor.mask_embedder.0.0": "mask_embedding.0",
            "decoder.mask_predictor.mask_embedder.1.0": "mask_embedding.2",
            "decoder.mask_predictor.mask_embedder.2.0": "mask_embedding.4",
            "queries_features": "query_features",
            "queries_embedder": "query_positions",
            "level_embed": "level_embedding",
        }.items()
    }
    | {"class_predictor": "decoder.queries.classifier"},
    # Of the loss; and a norm behind the last stage, which has one of its own.
    unused=(
        "criterion",
        "model.pixel_level_module.encoder.layernorm",
        "model.pixel_level_module.encoder.swin.layernorm",
    ),
    convert=_convert_hugging_face,
    model_type="mask2former",
    read_config=_read_config,
)

TIMM_SWIN = _table(
    origin="timm's Swin transformer",
    modules=timm_swin(),
    unused=("norm", "head", "head.fc"),
    convert=drop_window_tables,
)

TIMM_RESNET = _table(origin="timm's ResNet", modules=timm_resnet(), unused=("fc",))
