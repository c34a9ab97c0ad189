"""The names of plain vision transformers: OpenMMLab's, and timm's, which the authors' codes keep.

Tables of the networks over a `PlainViT` are made of these.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from segtrain.weights.keys import KeyTable, no_arguments

#: Width of an encoder -> what its size is called.
SIZES = {192: "ti", 384: "s", 768: "b", 1024: "l"}
#: Networks differ in whether they keep a ViT's final norm, which its own file has.
OPTIONAL = ("encoder.vit.norm.",)

_TIMM = (
    "patch_embed.proj",
    "norm_pre",
    "norm",
    *(
        f"blocks.*.{name}"
        for name in (
            "norm1",
            "attn.qkv",
            "attn.proj",
            "ls1",
            "norm2",
            "mlp.fc1",
            "mlp.fc2",
            "ls2",
            # Eva's.
            "attn.q_proj",
            "attn.k_proj",
            "attn.v_proj",
            "mlp.fc1_g",
            "mlp.fc1_x",
            "mlp.norm",
        )
    ),
    # Of parameters that are not in a layer.
    "blocks.*.attn",
    "blocks.*",
)


def timm_vit(prefix: str) -> dict[str, str]:
    """Patterns of timm's modules behind a prefix ("backbone." or "") -> ours."""
    tokens = {prefix.removesuffix("."): "encoder.vit"}  # the class token and positions
    return tokens | {f"{prefix}{name}": f"encoder.vit.{name}" for name in _TIMM}


def timm_table(
    network: str,
    read_arguments: Callable[[Mapping[str, Tensor]], dict[str, Any]] = no_arguments,
) -> KeyTable:
    """timm's own files, for the encoder of the networks of a module of ``segtrain.networks``."""
    return KeyTable(
        origin="timm's vision transformer",
        network=network,
        modules=timm_vit(""),
        unused=("fc_norm", "head", "head_dist"),
        read_arguments=read_arguments,
        optional=OPTIONAL,
    )


def openmmlab_blocks(theirs: str, ours: str) -> dict[str, str]:
    """Patterns of the modules of OpenMMLab's transformer layers -> ours."""
    names = {
        "ln1": "norm1",
        # Named so by `name_packed_projections`.
        "attn.attn.qkv": "attn.qkv",
        "attn.attn.out_proj": "attn.proj",
        "ln2": "norm2",
        "ffn.layers.0.0": "mlp.fc1",
        "ffn.layers.1": "mlp.fc2",
    }
    return {f"{theirs}.{name}": f"{ours}.{our_name}" for name, our_name in names.items()}


def name_packed_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenMMLab's ``attn.attn.in_proj_weight`` as ``attn.attn.qkv.weight``; likewise the bias."""
    return {name.replace(".in_proj_", ".qkv."): value for name, value in weights.items()}


OPENMMLAB_VIT = {
    "backbone": "encoder.vit",
    "backbone.patch_embed.projection": "encoder.vit.patch_embed.proj",
    "backbone.ln1": "encoder.vit.norm",
    **openmmlab_blocks("backbone.layers.*", "encoder.vit.blocks.*"),
}


def openmmlab_mask_transformer(ours: str) -> dict[str, str]:
    """Patterns of the modules of OpenMMLab's decoder of Segmenter -> ours, under a module of ours.

    `name_class_tokens` belongs to it.
    """
    names = {
        "dec_proj": "projection",
        "decoder_norm": "norm",
        "patch_proj": "patch_projection",
        "classes_proj": "class_projection",
        "mask_norm": "score_norm",
    }
    return (
        {"decode_head": ours}
        | {f"decode_head.{theirs}": f"{ours}.{name}" for theirs, name in names.items()}
        | openmmlab_blocks("decode_head.layers.*", f"{ours}.blocks.*")
    )


def name_class_tokens(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The parameter ``cls_emb`` of Segmenter's decoder as ``class_tokens``."""
    return {
        f"{name.removesuffix('cls_emb')}class_tokens" if name.endswith(".cls_emb") else name: value
        for name, value in weights.items()
    }


def openmmlab_up_head(theirs: str, ours: str) -> dict[str, str]:
    """Patterns of the modules of OpenMMLab's SETRUPHead -> ours."""
    names = {
        "norm": "norm",
        "up_convs.*.0.conv": "convolutions.*.0",
        "up_convs.*.0.bn": "convolutions.*.1",
        "conv_seg": "classifier",
    }
    return {f"{theirs}.{name}": f"{ours}.{our_name}" for name, our_name in names.items()}
