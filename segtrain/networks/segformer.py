"""SegFormer (NeurIPS 2021, 2105.15203) with the token merging of SegFormer++ (2405.14467)."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.errors import UserError, did_you_mean
from segtrain.networks.blocks import (
    DepthwiseMLP,
    Grid,
    grid_from_tokens,
    merge_heads,
    resize,
    split_heads,
    tokens_from_grid,
)
from segtrain.networks.hierarchy import EMBEDDINGS, Block, HierarchicalEncoder, initialise
from segtrain.networks.network import Network
from segtrain.networks.registry import register_network
from segtrain.reduction import MERGING, StagedReduction, StageMerging, pool_grid
from segtrain.reduction.merging import NO_MERGING

#: name -> width of the first stage, depths (table 6 of the paper).
VARIANTS = {
    "segformer_b0": (32, (2, 2, 2, 2)),
    "segformer_b1": (64, (2, 2, 2, 2)),
    "segformer_b2": (64, (3, 4, 6, 3)),
    "segformer_b3": (64, (3, 4, 18, 3)),
    "segformer_b4": (64, (3, 8, 27, 3)),
    "segformer_b5": (64, (3, 6, 40, 3)),
}
NUM_HEADS = (1, 2, 5, 8)

Head = Literal["mmseg", "nvlabs"]


def published_settings() -> list[StagedReduction]:
    """Those of SegFormer++, and ours: ``isr_2211``, EDAFormer's choice for its encoder."""
    return [
        StagedReduction("full"),
        StagedReduction("isr_2211", isr=(2, 2, 1, 1)),
        *(StagedReduction.from_values({"name": name, "merge": name}) for name in MERGING),
        StagedReduction("downsample", downsample=True),
    ]


class EfficientAttention(nn.Module):
    """Attention to spatially reduced keys and values (paper section 3.1), with merging around it.

    Keys and values come from the tokens behind a strided convolution and a norm, where the ratio
    is above 1.
    """

    def __init__(self, width: int, num_heads: int, sr_ratio: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.projection = nn.Linear(width, width)
        self.reduction: nn.Conv2d | None = None
        if sr_ratio > 1:
            self.reduction = nn.Conv2d(width, width, sr_ratio, sr_ratio)
            self.norm = nn.LayerNorm(width, eps=eps)

    def forward(self, tokens: Tensor, grid: Grid, reduction: tuple[StageMerging, int]) -> Tensor:
        """(B, h*w, C) -> (B, h*w, C)."""
        merging, pool = reduction
        sources, key_grid = self.reduce(tokens, grid, pool)
        if merging.kv is not None:
            merge, _ = merging.kv.match(sources, key_grid)
            sources = merge(sources)
        merge, unmerge = NO_MERGING if merging.q is None else merging.q.match(tokens, grid)
        queries = split_heads(self.query(merge(tokens)), self.num_heads)
        keys, values = self.key_value(sources).chunk(2, dim=2)
        attended = F.scaled_dot_product_attention(
            queries, split_heads(keys, self.num_heads), split_heads(values, self.num_heads)
        )
        return unmerge(self.projection(merge_heads(attended)))

    def reduce(self, tokens: Tensor, grid: Grid, pool: int) -> tuple[Tensor, Grid]:
        """What keys and values are made of: (B, h*w, C) -> (B, h'*w', C) and its grid (h', w')."""
        if self.reduction is not None:
            features = self.reduction(grid_from_tokens(tokens, grid))
            grid = (features.shape[2], features.shape[3])
            tokens = self.norm(tokens_from_grid(features))
        if pool > 1:
            features = pool_grid(grid_from_tokens(tokens, grid), pool)
            grid = (features.shape[2], features.shape[3])
            tokens = tokens_from_grid(features)
        return tokens, grid


class ActivatedLevel(nn.Module):
    """A stage's features at the decoder's width, OpenMMLab's way: batch norm and ReLU follow."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Conv2d(in_channels, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_i, h, w) -> (B, C, h, w)."""
        return F.relu(self.norm(self.projection(features)))

    def fuse(self, features: Tensor, weight: Tensor) -> Tensor:
        """``weight`` (D, C) on top of ``forward``: (B, C_i, h, w) -> (B, D, h, w)."""
        return F.conv2d(self(features), weight[:, :, None, None])


class LinearLevel(nn.Module):
    """A stage's features at the decoder's width, the authors' way: a linear layer alone."""

    def __init__(self, in_channels: int, width: int) -> None:
        super().__init__()
        self.projection = nn.Linear(in_channels, width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, C_i, h, w) -> (B, C, h, w)."""
        grid = (features.shape[2], features.shape[3])
        return grid_from_tokens(self.projection(tokens_from_grid(features)), grid)

    def fuse(self, features: Tensor, weight: Tensor) -> Tensor:
        """``weight`` (D, C) on top of ``forward``: (B, C_i, h, w) -> (B, D, h, w).

        Two linear maps in a row are one, of far fewer multiplications for each pixel.
        """
        combined = weight @ self.projection.weight
        return F.conv2d(features, combined[:, :, None, None], weight @ self.projection.bias)


class Decoder(nn.Module):
    """All-MLP decoder (paper section 3.2): the stages' features side by side, fused, classified.

    A 1x1 convolution after a bilinear resize is the resize after the convolution: each level's
    share of the fusing convolution is applied at the level's own resolution, and the sum takes the
    place of the concatenation.

    Args:
        num_classes: K.
        widths: C_i of the features.
        head: ``mmseg`` or ``nvlabs``; the two differ in the levels and in their order.
        width: C of the levels and of the fused map.
        dropout: rate of channel dropout before the classifier.
    """

    def __init__(
        self, num_classes: int, widths: Sequence[int], head: Head, width: int, dropout: float
    ) -> None:
        super().__init__()
        level = ActivatedLevel if head == "mmseg" else LinearLevel
        self.levels = nn.ModuleList(level(before, width) for before in widths)
        self.fuse = nn.Conv2d(len(widths) * width, width, 1, bias=False)
        self.fuse_norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)
        #: Levels in the order in which the fusing convolution takes them.
        self.order = range(len(widths)) if head == "mmseg" else range(len(widths) - 1, -1, -1)

    def forward(self, features: Sequence[Tensor], as_published: bool = False) -> Tensor:
        """Maps at strides 4, 8, 16, 32 -> scores (B, K, h, w) at stride 4.

        ``as_published`` resizes and concatenates before fusing, which gives the same scores.
        """
        fused = self._fuse_concatenated(features) if as_published else self._fuse(features)
        return self.classifier(self.dropout(F.relu(self.fuse_norm(fused))))

    def _fuse(self, features: Sequence[Tensor]) -> Tensor:
        weights = self.fuse.weight.flatten(1).chunk(len(self.levels), dim=1)
        maps = [
            self.levels[i].fuse(features[i], weight)  # type: ignore[operator]
            for i, weight in zip(self.order, weights, strict=True)
        ]
        size = (features[0].shape[2], features[0].shape[3])
        resized = [map if map.shape[2:] == size else resize(map, size) for map in maps]
        return functools.reduce(torch.add, resized)

    def _fuse_concatenated(self, features: Sequence[Tensor]) -> Tensor:
        size = (features[0].shape[2], features[0].shape[3])
        maps = [resize(self.levels[i](features[i]), size) for i in self.order]
        return self.fuse(torch.cat(maps, dim=1))


class SegFormer(Network):
    """(B, 3, H, W) -> scores (B, K, ceil(H/4), ceil(W/4)), in training and evaluation alike.

    Both sides are at least 29 pixels. Under the setting ``downsample`` the scores are those of the
    halved image, and the sides at least 58 pixels. The defaults are the published B0.

    Args:
        num_classes: K.
        widths: channels of stages 1 to 4 (strides 4, 8, 16, 32).
        depths: blocks of each stage.
        num_heads: attention heads of each stage.
        sr_ratios: spatial reduction of each stage's keys and values.
        mlp_ratio: hidden width of the MLPs over their width.
        head: ``mmseg`` (OpenMMLab, SegFormer++: batch norm and ReLU on each level) or ``nvlabs``
            (the authors and Hugging Face: neither).
        head_width: channels of the decoder.
        ln_eps: of the layer norms: 1e-6 (OpenMMLab), 1e-5 (Hugging Face), or ``mixed`` (the
            authors: 1e-6, but 1e-5 after patch embeddings and spatial reductions).
        drop_path: rate of the last block; the rates rise linearly from 0.
        dropout: rate of channel dropout before the classifier.
    """

    setting_type = StagedReduction
    setting: StagedReduction
    block_types = (Block,)

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (32, 64, 160, 256),
        depths: Sequence[int] = (2, 2, 2, 2),
        num_heads: Sequence[int] = NUM_HEADS,
        sr_ratios: Sequence[int] = (8, 4, 2, 1),
        mlp_ratio: float = 4,
        head: Head = "mmseg",
        head_width: int = 256,
        ln_eps: float | Literal["mixed"] = 1e-6,
        drop_path: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(num_classes, 4, published_settings())
        if head not in ("mmseg", "nvlabs"):
            raise UserError(f"there is no head '{head}': {did_you_mean(head, ('mmseg', 'nvlabs'))}")
        if not (ln_eps == "mixed" or (isinstance(ln_eps, float) and ln_eps > 0)):
            raise UserError(f"'ln_eps' is a number above 0 or 'mixed', not {ln_eps!r}")
        self.widths, self.depths = tuple(widths), tuple(depths)
        self.num_heads, self.sr_ratios = tuple(num_heads), tuple(sr_ratios)
        self.head: Head = head
        self.head_width, self.ln_eps = head_width, ln_eps
        strides = itertools.accumulate((stride for _, stride in EMBEDDINGS), lambda a, b: a * b)
        #: The shortest side whose stages have a key.
        self.least_side = max(
            (ratio - 1) * stride + 1 for ratio, stride in zip(sr_ratios, strides, strict=True)
        )
        eps, embedding_eps = (1e-6, 1e-5) if ln_eps == "mixed" else (float(ln_eps), float(ln_eps))

        def make_block(stage: int, rate: float) -> Block:
            width = widths[stage]
            return Block(
                width,
                EfficientAttention(width, num_heads[stage], sr_ratios[stage], embedding_eps),
                DepthwiseMLP(width, int(width * mlp_ratio)),
                rate,
                eps,
            )

        self.encoder = HierarchicalEncoder(
            widths, depths, drop_path, make_block, embedding_eps, eps
        )
        self.decoder = Decoder(num_classes, widths, head, head_width, dropout)
        self.apply(initialise_as_openmmlab)
        for name, module in self.decoder.named_modules():
            if name == "fuse" or name.endswith("projection"):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.decoder.classifier.weight, std=0.01)

    def forward(self, images: Tensor) -> Tensor:
        if self.setting.downsample:
            images = F.interpolate(images, scale_factor=0.5, mode="nearest")
        if min(images.shape[2:]) < self.least_side:
            least = self.least_side * (1 + self.setting.downsample)
            raise UserError(
                f"SegFormer under '{self.setting.name}' takes images of at least {least} x {least}"
            )
        reductions = list(zip(self.setting.stages, self.setting.isr, strict=True))
        return self.decoder(self.encoder(images, reductions), self.as_published)


def initialise_as_openmmlab(module: nn.Module) -> None:
    """Initial weights, as OpenMMLab's code draws them: the MLPs are 1x1 convolutions there."""
    initialise(module)
    if isinstance(module, DepthwiseMLP):
        for linear in (module.expand, module.contract):
            nn.init.normal_(linear.weight, std=math.sqrt(2 / linear.out_features))


def published_head_width(name: str, head: str) -> int:
    """Channels of the decoder of a variant."""
    return 768 if head == "nvlabs" and name not in ("segformer_b0", "segformer_b1") else 256


def _variant(name: str, num_classes: int, arguments: dict[str, Any]) -> SegFormer:
    width, depths = VARIANTS[name]
    published: dict[str, Any] = {
        "widths": tuple(width * heads for heads in NUM_HEADS),
        "depths": depths,
        "head_width": published_head_width(name, arguments.get("head", "mmseg")),
    }
    return SegFormer(num_classes, **(published | arguments))


@register_network
def segformer_b0(num_classes: int, **arguments: Any) -> SegFormer:
    """3.7 M parameters."""
    return _variant("segformer_b0", num_classes, arguments)


@register_network
def segformer_b1(num_classes: int, **arguments: Any) -> SegFormer:
    """13.7 M parameters."""
    return _variant("segformer_b1", num_classes, arguments)


@register_network
def segformer_b2(num_classes: int, **arguments: Any) -> SegFormer:
    """24.7 M parameters with the head ``mmseg``, 27.4 M with ``nvlabs``."""
    return _variant("segformer_b2", num_classes, arguments)


@register_network
def segformer_b3(num_classes: int, **arguments: Any) -> SegFormer:
    """44.6 M parameters with the head ``mmseg``, 47.3 M with ``nvlabs``."""
    return _variant("segformer_b3", num_classes, arguments)


@register_network
def segformer_b4(num_classes: int, **arguments: Any) -> SegFormer:
    """61.4 M parameters with the head ``mmseg``, 64.1 M with ``nvlabs``."""
    return _variant("segformer_b4", num_classes, arguments)


@register_network
def segformer_b5(num_classes: int, **arguments: Any) -> SegFormer:
    """82.0 M parameters with the head ``mmseg``, 84.7 M with ``nvlabs``."""
    return _variant("segformer_b5", num_classes, arguments)
