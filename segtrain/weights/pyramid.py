"""Names of Swin transformers and ResNets: the authors' and detectron2's, timm's, Hugging Face's.

Tables of the networks over `segtrain.networks.pyramid` are made of these.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from segtrain.weights.keys import ENCODER

_BACKBONE = f"{ENCODER}backbone."
#: What the names of the norms behind a Swin's stages, which ImageNet files lack, begin with.
STAGE_NORMS = f"{ENCODER}norms."
_STAGES = (1, 2, 3, 4)
_BLOCK = ("norm1", "attn", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
#: size -> what timm builds the backbone with.
_SIZES: dict[str, dict[str, Any]] = {
    "r50": {"layers": (3, 4, 6, 3), "channels": (64, 128, 256, 512)},
    "r101": {"layers": (3, 4, 23, 3), "channels": (64, 128, 256, 512)},
} | {
    f"swin_{letter}": {
        "embed_dim": width,
        "depths": (2, 2, depth, 2),
        "num_heads": tuple(width // 32 * 2**stage for stage in range(4)),
        "window_size": window,
    }
    for letter, width, depth, window in (
        ("t", 96, 6, 7),
        ("s", 96, 18, 7),
        ("b", 128, 18, 12),
        ("l", 192, 18, 12),
    )
}


def _swin_stages(theirs: str, block: Mapping[str, str], first_merge: int) -> dict[str, str]:
    """Patterns of the stages of a Swin -> ours.

    Args:
        theirs: a stage, with ``*`` for its index.
        block: their names of a block's modules, behind ``blocks.*.`` -> timm's.
        first_merge: index of the first stage that has a ``downsample``: 1 where it precedes the
            blocks, as in timm and ours, 0 where it follows those of the stage before.
    """
    ours = f"{_BACKBONE}layers"
    merges = {
        f"{theirs.replace('*', str(first_merge + i))}.downsample.{name}": (
            f"{ours}.{i + 1}.downsample.{name}"
        )
        for i in range(3)
        for name in ("norm", "reduction")
    }
    return merges | {
        f"{theirs}.blocks.*.{name}": f"{ours}.*.blocks.*.{own}" for name, own in block.items()
    }


def timm_swin() -> dict[str, str]:
    """Patterns of timm's modules, of a classifier or of ``features_only`` -> ours."""
    same = {name: name for name in _BLOCK}
    return (
        _swin_stages("layers.*", same, 1)
        | _swin_stages("layers_*", same, 1)
        | {f"patch_embed.{name}": f"{_BACKBONE}patch_embed.{name}" for name in ("proj", "norm")}
    )


def authors_swin(prefix: str) -> dict[str, str]:
    """Patterns of the authors' modules behind a prefix ("backbone." or "") -> ours."""
    return {
        f"{prefix}patch_embed.{name}": f"{_BACKBONE}patch_embed.{name}" for name in ("proj", "norm")
    } | _swin_stages(f"{prefix}layers.*", {name: name for name in _BLOCK}, 0)


def hugging_face_swin(prefix: str) -> dict[str, str]:
    """Patterns of Hugging Face's modules behind a prefix -> ours.

    `join_projections` belongs to it.
    """
    block = {
        "layernorm_before": "norm1",
        "attention.qkv": "attn.qkv",  # named so by `join_projections`
        "layernorm_after": "norm2",
        # As files have it.
        "attention.self": "attn",
        "attention.output.dense": "attn.proj",
        "intermediate.dense": "mlp.fc1",
        "output.dense": "mlp.fc2",
        # As transformers 5 has it in memory.
        "attention.relative_position_bias": "attn",
        "attention.o_proj": "attn.proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    }
    patterns = {f"{prefix}hidden_states_norms.stage{s}": f"{STAGE_NORMS}{s - 1}" for s in _STAGES}
    for module in (prefix, f"{prefix}swin."):  # in files and in memory
        embeddings = f"{module}embeddings"
        patterns |= _swin_stages(f"{module}encoder.layers.*", block, 0) | {
            f"{embeddings}.patch_embeddings.projection": f"{_BACKBONE}patch_embed.proj",
            f"{embeddings}.norm": f"{_BACKBONE}patch_embed.norm",
        }
    return patterns


def _resnet(
    stem: tuple[str, str],
    stages: tuple[str, ...],
    convolutions: tuple[tuple[str, str], ...],
    shortcut: tuple[str, str],
) -> dict[str, str]:
    """Patterns of a ResNet's modules, pairs of a convolution and its norm -> ours.

    Args:
        stages: the four, with ``*`` for the block.
        convolutions: of a block, which have three or two.
    """
    ours = {stem[0]: "conv1", stem[1]: "bn1"}
    for number, stage in zip(_STAGES, stages, strict=True):
        block = f"layer{number}.*"
        for index, (convolution, norm) in enumerate(convolutions, start=1):
            ours[f"{stage}.{convolution}"] = f"{block}.conv{index}"
            ours[f"{stage}.{norm}"] = f"{block}.bn{index}"
        for index, name in enumerate(shortcut):
            ours[f"{stage}.{name}"] = f"{block}.downsample.{index}"
    return {theirs: f"{_BACKBONE}{name}" for theirs, name in ours.items()}


def timm_resnet() -> dict[str, str]:
    """Patterns of timm's modules, which are torchvision's -> ours."""
    return _resnet(
        ("conv1", "bn1"),
        tuple(f"layer{number}.*" for number in _STAGES),
        tuple((f"conv{number}", f"bn{number}") for number in (1, 2, 3)),
        ("downsample.0", "downsample.1"),
    )


def detectron2_resnet(prefix: str) -> dict[str, str]:
    """Patterns of detectron2's modules behind a prefix ("backbone." or "") -> ours."""
    return _resnet(
        (f"{prefix}stem.conv1", f"{prefix}stem.conv1.norm"),
        tuple(f"{prefix}res{number + 1}.*" for number in _STAGES),
        tuple((f"conv{number}", f"conv{number}.norm") for number in (1, 2, 3)),
        ("shortcut", "shortcut.norm"),
    )


def hugging_face_resnet(prefix: str) -> dict[str, str]:
    """Patterns of Hugging Face's modules behind a prefix -> ours."""

    def pair(module: str) -> tuple[str, str]:
        return f"{module}.convolution", f"{module}.normalization"

    return _resnet(
        pair(f"{prefix}embedder.embedder"),
        tuple(f"{prefix}encoder.stages.{number - 1}.layers.*" for number in _STAGES),
        tuple(pair(f"layer.{index}") for index in range(3)),
        pair("shortcut"),
    )


def drop_window_tables(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without what a Swin of given windows makes itself: it was stored before, and is no more."""
    tables = (".relative_position_index", ".attn_mask")
    return {name: value for name, value in weights.items() if not name.endswith(tables)}


def join_projections(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's query, key and value projections, of either naming, as ``attention.qkv``."""
    joined = dict(weights)
    for name, query in weights.items():
        for projections in (
            (".attention.self.query.", ".attention.self.key.", ".attention.self.value."),
            (".attention.q_proj.", ".attention.k_proj.", ".attention.v_proj."),
        ):
            names = [name.replace(projections[0], other) for other in projections]
            parts = [weights[other] for other in names if other in weights]
            if (
                projections[0] in name
                and len(parts) == 3
                and query.ndim
                and all(part.shape == query.shape for part in parts)
            ):
                for separate in names:
                    joined.pop(separate, None)
                joined[name.replace(projections[0], ".attention.qkv.")] = torch.cat(parts)
    return joined


def read_backbone(shapes: Mapping[str, tuple[int, ...]]) -> tuple[str, dict[str, Any]]:
    """The published size nearest to an encoder's weights, and ``backbone_arguments`` beside it.

    Raises:
        LookupError, ValueError: it is neither a Swin nor a ResNet of bottlenecks, or parts are
            missing, or are not what their names say.
    """
    found = _read_swin(shapes) if f"{_BACKBONE}patch_embed.proj.weight" in shapes else None
    found = found or _read_resnet(shapes)
    kin = [size for size, published in _SIZES.items() if published.keys() == found.keys()]

    def others(size: str) -> dict[str, Any]:
        return {name: value for name, value in found.items() if value != _SIZES[size][name]}

    size = min(kin, key=lambda size: len(others(size)))
    return size, others(size)


def _read_swin(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    stages = [f"{_BACKBONE}layers.{i}.blocks." for i in range(4)]
    tables = [shapes[f"{stage}0.attn.relative_position_bias_table"] for stage in stages]
    (positions,) = {places for places, _ in tables}
    return {
        "embed_dim": shapes[f"{_BACKBONE}patch_embed.proj.weight"][0],
        "depths": tuple(_count_blocks(shapes, stage) for stage in stages),
        "num_heads": tuple(heads for _, heads in tables),
        "window_size": (math.isqrt(positions) + 1) // 2,
    }


def _read_resnet(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    stages = [f"{_BACKBONE}layer{number}." for number in _STAGES]
    channels = tuple(shapes[f"{stage}0.conv3.weight"][1] for stage in stages)
    return {
        "layers": tuple(_count_blocks(shapes, stage) for stage in stages),
        "channels": channels,
    }


def _count_blocks(shapes: Mapping[str, tuple[int, ...]], stage: str) -> int:
    return len(
        {name.removeprefix(stage).split(".")[0] for name in shapes if name.startswith(stage)}
    )
