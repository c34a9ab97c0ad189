"""EDAFormer: embedding-free attention with inference spatial reduction (ECCV 2024, 2407.17261)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.errors import UserError
from segtrain.networks.blocks import (
    DepthwiseMLP,
    Grid,
    grid_from_tokens,
    merge_heads,
    resize,
    split_heads,
    tokens_from_grid,
)
from segtrain.networks.hierarchy import Block, HierarchicalEncoder, initialise
from segtrain.networks.network import Network
from segtrain.networks.registry import register_network
from segtrain.reduction import Setting, pool_grid

#: A pool that is clamped to the whole grid.
BEYOND_ANY_GRID = 2**16


@dataclasses.dataclass(frozen=True)
class InferenceSpatialReduction(Setting):
    """Effective pool sizes of the keys and values (paper section 3.3), in the paper's order.

    Attributes:
        encoder: stages 1 to 4.
        decoder: attention at 1/32, 1/16, 1/8. The authors' code lists the decoder the other way
            round, and multipliers of the training pools instead of pools.
    """

    encoder: tuple[int, ...]
    decoder: tuple[int, ...]

    def __post_init__(self) -> None:
        for field, pools in (("encoder", self.encoder), ("decoder", self.decoder)):
            if not isinstance(pools, tuple) or not all(type(p) is int and p > 0 for p in pools):
                raise UserError(
                    f"pool sizes '{field}' of a setting are positive whole numbers, not {pools}"
                )

    def describe(self) -> str:
        encoder, decoder = (".".join(map(str, pools)) for pools in (self.encoder, self.decoder))
        return f"pools_{encoder}_{decoder}"


class EmbeddingFreeAttention(nn.Module):
    """Attention whose query is its input: no query, key or value projection (paper section 3.1).

    Keys and values are one tensor, the pooled input behind a 1x1 convolution; in the decoder
    LayerNorm and GELU follow (``normalise_keys``).
    """

    def __init__(self, width: int, num_heads: int, normalise_keys: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.reduction = nn.Conv2d(width, width, 1)
        self.norm = nn.LayerNorm(width) if normalise_keys else None
        self.projection = nn.Linear(width, width)

    def forward(self, tokens: Tensor, grid: Grid, pool: int) -> Tensor:
        """(B, h*w, C) -> (B, h*w, C)."""
        pooled = pool_grid(grid_from_tokens(tokens, grid), pool)
        pooled = tokens_from_grid(self.reduction(pooled))
        if self.norm is not None:
            pooled = F.gelu(self.norm(pooled))
        keys = split_heads(pooled, self.num_heads)
        attended = F.scaled_dot_product_attention(split_heads(tokens, self.num_heads), keys, keys)
        return self.projection(merge_heads(attended))


def make_block(
    width: int, num_heads: int, mlp_ratio: float, drop_path: float, *, decoder: bool = False
) -> Block:
    """A block of the encoder or of the decoder, which differ in details."""
    return Block(
        width,
        EmbeddingFreeAttention(width, num_heads, normalise_keys=decoder),
        DepthwiseMLP(width, int(width * mlp_ratio), activate_before=not decoder),
        drop_path,
        eps=1e-5 if decoder else 1e-6,
    )


class Decoder(nn.Module):
    """All-attention decoder over strides 32, 16 and 8 (paper section 3.2).

    Deeper maps get more blocks: 3 at 1/32, 2 at 1/16, 1 at 1/8. The three are resized to 1/8,
    concatenated in that order, fused and classified.
    """

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int],
        num_heads: Sequence[int],
        mlp_ratio: float,
        fuse_width: int,
        drop_path: float,
        dropout: float,
    ) -> None:
        super().__init__()
        self.levels = nn.ModuleList(
            nn.ModuleList(
                make_block(width, heads, mlp_ratio, drop_path, decoder=True) for _ in range(depth)
            )
            for width, heads, depth in zip(widths, num_heads, (3, 2, 1), strict=True)
        )
        self.fuse = nn.Conv2d(sum(widths), fuse_width, 1, bias=False)
        self.fuse_norm = nn.BatchNorm2d(fuse_width)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(fuse_width, num_classes, 1)

    def forward(self, features: Sequence[Tensor], pools: Sequence[int]) -> Tensor:
        """Maps at 1/32, 1/16 and 1/8 -> scores at 1/8."""
        size: Grid = (features[-1].shape[2], features[-1].shape[3])
        refined = []
        for blocks, feature, pool in zip(self.levels, features, pools, strict=True):
            grid: Grid = (feature.shape[2], feature.shape[3])
            tokens = tokens_from_grid(feature)
            for block in blocks:  # type: ignore[attr-defined]
                tokens = block(tokens, grid, pool)
            feature = grid_from_tokens(tokens, grid)
            refined.append(feature if grid == size else resize(feature, size))
        fused = F.relu(self.fuse_norm(self.fuse(torch.cat(refined, dim=1))))
        return self.classifier(self.dropout(fused))


class EDAFormer(Network):
    """(B, 3, H, W) -> scores (B, K, ceil(H/8), ceil(W/8)), in training and evaluation alike.

    The defaults are the published EDAFormer-T.

    Args:
        num_classes: K.
        widths: channels of encoder stages 1 to 4 (strides 4, 8, 16, 32).
        depths: blocks of each stage.
        num_heads: heads of each stage; the decoder's level at a stride has the stage's heads.
        mlp_ratio: hidden width of the encoder's MLPs over their width, rounded down.
        encoder_pools: pool sizes under which stages 1 to 4 are trained.
        decoder_pools: pool sizes under which 1/32, 1/16 and 1/8 are trained (paper's order).
        decoder_mlp_ratio: as ``mlp_ratio``, for the decoder.
        fuse_width: channels of the fused map.
        drop_path: rate of the encoder's last block; the rates rise linearly from 0.
        decoder_drop_path: rate of every decoder block.
        dropout: rate of channel dropout before the classifier.
    """

    setting_type = InferenceSpatialReduction
    setting: InferenceSpatialReduction
    block_types = (Block,)

    def __init__(
        self,
        num_classes: int,
        widths: Sequence[int] = (32, 64, 128, 256),
        depths: Sequence[int] = (2, 2, 10, 2),
        num_heads: Sequence[int] = (1, 2, 4, 8),
        mlp_ratio: float = 3.8,
        encoder_pools: Sequence[int] = (8, 4, 2, 1),
        decoder_pools: Sequence[int] = (1, 2, 4),
        decoder_mlp_ratio: float = 2,
        fuse_width: int = 128,
        drop_path: float = 0.2,
        decoder_drop_path: float = 0.1,
        dropout: float = 0.1,
    ) -> None:
        super().__init__(num_classes, 8, published_settings(encoder_pools, decoder_pools))
        self.encoder = HierarchicalEncoder(  # the embedding-free transformer (EFT)
            widths,
            depths,
            drop_path,
            lambda stage, rate: make_block(widths[stage], num_heads[stage], mlp_ratio, rate),
            embedding_eps=1e-5,
            eps=1e-6,
        )
        self.decoder = Decoder(
            num_classes,
            widths[:0:-1],
            num_heads[:0:-1],
            decoder_mlp_ratio,
            fuse_width,
            decoder_drop_path,
            dropout,
        )
        self.apply(initialise)
        nn.init.kaiming_normal_(self.decoder.fuse.weight, mode="fan_out", nonlinearity="relu")
        self.decoder.classifier.reset_parameters()

    def check_setting(self, setting: Setting) -> None:
        assert isinstance(setting, InferenceSpatialReduction)
        counts = len(setting.encoder), len(setting.decoder)
        if counts != (4, 3):
            raise UserError(
                f"setting '{setting.name}' has {counts[0]} encoder and {counts[1]} decoder pools: "
                "EDAFormer takes 4 (stages 1 to 4) and 3 (1/32, 1/16, 1/8)"
            )

    def forward(self, images: Tensor) -> Tensor:
        features = self.encoder(images, self.setting.encoder)
        return self.decoder(features[:0:-1], self.setting.decoder)


def published_settings(
    encoder_pools: Sequence[int], decoder_pools: Sequence[int]
) -> list[InferenceSpatialReduction]:
    """The training pools and their multiples, named by the multipliers (paper table 3).

    The digits stand for encoder stages 1 to 4, then the decoder at 1/32, 1/16, 1/8.
    Ours are ``isr_4444_444`` and, at the end of the scale, ``isr_global``: one key for each
    attention, the mean, so that what remains is the network without attention.
    """

    def scaled(name: str, digits: str) -> InferenceSpatialReduction:
        encoder, decoder = ([int(d) for d in part] for part in digits.split("_"))
        return InferenceSpatialReduction(
            name,
            tuple(p * m for p, m in zip(encoder_pools, encoder, strict=True)),
            tuple(p * m for p, m in zip(decoder_pools, decoder, strict=True)),
        )

    reduced = ("1111_222", "2211_222", "2222_222", "4444_444")
    return [
        scaled("full", "1111_111"),
        *(scaled(f"isr_{digits}", digits) for digits in reduced),
        InferenceSpatialReduction("isr_global", (BEYOND_ANY_GRID,) * 4, (BEYOND_ANY_GRID,) * 3),
    ]


@register_network
def edaformer_nano(num_classes: int, **arguments: Any) -> EDAFormer:
    """Ours, for images of a few hundred pixels: narrower, shallower, with finer keys."""
    published: dict[str, Any] = {
        "widths": (24, 48, 64, 96),
        "depths": (1, 1, 2, 1),
        "mlp_ratio": 2,
        "encoder_pools": (2, 1, 1, 1),
        "decoder_pools": (1, 1, 1),
        "fuse_width": 64,
        "drop_path": 0.0,
        "decoder_drop_path": 0.0,
    }
    return EDAFormer(num_classes, **(published | arguments))


@register_network
def edaformer_tiny(num_classes: int, **arguments: Any) -> EDAFormer:
    """EDAFormer-T: 4.9 M parameters, 42.3 mIoU on ADE20K."""
    return EDAFormer(num_classes, **arguments)


@register_network
def edaformer_base(num_classes: int, **arguments: Any) -> EDAFormer:
    """EDAFormer-B: 29.4 M parameters, 49.0 mIoU on ADE20K."""
    published: dict[str, Any] = {
        "widths": (64, 128, 256, 512),
        "depths": (3, 3, 22, 3),
        "mlp_ratio": 4,
        "decoder_mlp_ratio": 1,
        "fuse_width": 768,
    }
    return EDAFormer(num_classes, **(published | arguments))
