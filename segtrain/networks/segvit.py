"""SegViT (NeurIPS 2022, 2210.05844): classes ask a plain vision transformer where they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from timm.layers import Attention
from torch import Tensor, nn

from segtrain.errors import UserError
from segtrain.networks.attention_to_mask import AttentionToMask
from segtrain.networks.blocks import Grid, grid_from_tokens, initialise_linear, resize
from segtrain.networks.mask_prediction import MaskPrediction, score_classes
from segtrain.networks.plain_vit import (
    Normalisation,
    PlainNetwork,
    PlainViT,
    Positions,
)
from segtrain.networks.registry import register_network
from segtrain.networks.shrinking import ShrinkingBlock, ShrunkDecoder, resize_tokens
from segtrain.reduction import Setting
from segtrain.reduction.plain import Level, published_settings


class Decoder(nn.Module):
    """Attention to mask at several levels, the deepest first, handing the queries on (section 3).

    Args:
        in_width: C of the tokens.
        num_classes: K.
        levels: how many there are.
        num_heads: of the attention, in width C / 2.
        num_layers: for each level.
    """

    def __init__(
        self, in_width: int, num_classes: int, levels: int, num_heads: int, num_layers: int
    ) -> None:
        super().__init__()
        width = in_width // 2
        self.queries = nn.Embedding(num_classes, width)
        self.levels = nn.ModuleList(
            AttentionToMask(in_width, width, num_heads, num_layers) for _ in range(levels)
        )
        self.classifier = nn.Linear(width, num_classes + 1)
        self.apply(initialise_linear)

    def forward(self, levels: Sequence[Level], grid: Grid) -> list[MaskPrediction]:
        """Levels, shallow to deep -> what is predicted behind each of them, the last one first.

        Its masks are the sum over all levels.
        """
        queries = self.queries.weight.expand(len(levels[0].tokens), -1, -1)
        masks: Tensor | None = None
        predictions: list[MaskPrediction] = []
        for level, attention in zip(reversed(levels), self.levels, strict=True):
            queries, found = attention(queries, level.tokens)[-1]
            found = grid_from_tokens(level.restore(found.transpose(1, 2)), grid)
            masks = found if masks is None else masks + found
            predictions.insert(0, MaskPrediction(self.classifier(queries), masks))
        return predictions


class SegViT(PlainNetwork):
    """(B, 3, H, W) -> scores (B, K, H, W); in training `MaskPrediction`s, the main one first.

    A class's score is a sum over all queries: how probably the query's thing is of the class,
    times how probably it is at that pixel. The logits of the latter are resized to the image
    before the sigmoid, which does not commute with it; the authors' code resizes them to the size
    of its training crops, whose size its windows have as well. No class token goes through the
    blocks.

    Args:
        num_classes: K.
        backbone: timm's name of a plain vision transformer.
        image_size: (height, width) of the training crops.
        outputs: blocks behind which the decoder looks, ascending.
        num_heads: of the decoder's attention.
        num_layers: of the decoder, for each output.
        pretrained: whether timm loads weights of the backbone.
        positions: how positions are resized to other image sizes.
        drop_path: rate of the last block; rises linearly from 0.
        normalisation: what the backbone was trained on, see `PlainViT`.
        backbone_arguments: further ones of timm's constructor.
    """

    criterion: ClassVar[str] = "attention_to_mask"

    def __init__(
        self,
        num_classes: int,
        backbone: str = "vit_base_patch16_384",
        image_size: Sequence[int] = (512, 512),
        outputs: Sequence[int] = (5, 7, 11),
        num_heads: int = 12,
        num_layers: int = 3,
        pretrained: bool = False,
        positions: Positions = "bicubic",
        drop_path: float = 0.1,
        normalisation: Normalisation = "half",
        backbone_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        encoder = make_encoder(
            backbone,
            image_size,
            pretrained=pretrained,
            positions=positions,
            drop_path=drop_path,
            normalisation=normalisation,
            backbone_arguments=backbone_arguments,
        )
        check_outputs(encoder, outputs)
        check_heads(encoder, num_heads)
        super().__init__(num_classes, 1, published_settings(encoder))
        self.encoder = encoder
        self.outputs = tuple(outputs)
        self.num_heads, self.normalisation = num_heads, normalisation
        self.decoder = Decoder(encoder.width, num_classes, len(outputs), num_heads, num_layers)

    def score(self, images: Tensor) -> Tensor | tuple[MaskPrediction, ...]:
        predictions = self.decoder(*self.levels(images, self.outputs))
        if self.training:
            return tuple(predictions)
        return score_prediction(predictions[0], images)


class ShrunkSegViT(PlainNetwork):
    """SegViT whose tokens are every second row and column's from one block on ("Shrunk").

    Scores and training as of `SegViT`. The decoder is the published one, which brings the whole
    grid back from what is learnt and from the maps before the shrinking and behind the last block.

    Args:
        shrink_at: the block whose attention only the kept tokens ask for.
        num_layers: of the decoder, for each of the two maps and behind them.
        others: as of `SegViT`.
    """

    criterion: ClassVar[str] = "attention_to_mask"
    setting_type = Setting
    block_types = (*PlainNetwork.block_types, ShrinkingBlock)

    def __init__(
        self,
        num_classes: int,
        backbone: str = "vit_large_patch16_384",
        image_size: Sequence[int] = (640, 640),
        shrink_at: int = 8,
        num_heads: int = 16,
        num_layers: int = 3,
        pretrained: bool = False,
        positions: Positions = "bicubic",
        drop_path: float = 0.3,
        normalisation: Normalisation = "half",
        backbone_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        encoder = make_encoder(
            backbone,
            image_size,
            pretrained=pretrained,
            positions=positions,
            drop_path=drop_path,
            normalisation=normalisation,
            backbone_arguments=backbone_arguments,
        )
        check_heads(encoder, num_heads)
        if not 0 < shrink_at < encoder.depth:
            raise UserError(
                f"'shrink_at' is one of the blocks 1 to {encoder.depth - 1}, not {shrink_at}"
            )
        blocks = encoder.vit.blocks
        if not isinstance(blocks[shrink_at].attn, Attention):
            raise UserError(f"'{backbone}' cannot shrink: its attention is no plain one")
        blocks[shrink_at] = ShrinkingBlock(blocks[shrink_at])
        super().__init__(num_classes, stride=1)
        self.encoder = encoder
        self.shrink_at = shrink_at
        num_tokens = encoder.grid[0] * encoder.grid[1]
        self.decoder = ShrunkDecoder(
            encoder.width, num_classes, num_tokens, 2, num_heads, num_layers
        )

    def score(self, images: Tensor) -> Tensor | tuple[MaskPrediction, ...]:
        encoder = self.encoder
        tokens, grid, _ = encoder.embed(images)
        before = encoder.run(range(self.shrink_at), tokens)
        positions = torch.arange(grid[0] * grid[1], device=images.device).view(grid)
        tokens = encoder.vit.blocks[self.shrink_at](before, positions[::2, ::2].flatten())
        tokens = encoder.run(range(self.shrink_at + 1, encoder.depth), tokens)
        whole = resize_tokens(self.decoder.tokens.weight[None], encoder.grid, grid)
        predictions = self.decoder([before, tokens], whole, grid)
        if self.training:
            return tuple(predictions)
        return score_prediction(predictions[0], images)


def score_prediction(prediction: MaskPrediction, images: Tensor) -> Tensor:
    """Scores (B, K, H, W) of images (B, 3, H, W)."""
    masks = resize(prediction.masks, (images.shape[2], images.shape[3]))
    return score_classes(prediction.classes, masks)


def make_encoder(backbone: str, image_size: Sequence[int], **arguments: Any) -> PlainViT:
    """The encoder of SegViT and DToP: no class token in the blocks, no final norm."""
    return PlainViT(
        backbone,
        image_size,
        prefix=False,
        final_norm=False,
        ln_eps=1e-6,
        drop_path_of_mlps_only=True,
        **arguments,
    )


def check_outputs(encoder: PlainViT, outputs: Sequence[int]) -> None:
    """Raise UserError unless outputs are blocks of the encoder, ascending."""
    if list(outputs) != sorted(set(outputs) & set(range(encoder.depth))) or not outputs:
        raise UserError(
            f"'outputs' are blocks from 0 to {encoder.depth - 1}, ascending, not {list(outputs)}"
        )


def check_heads(encoder: PlainViT, num_heads: int) -> None:
    """Raise UserError unless a decoder of half the encoder's width can have so many heads."""
    width = encoder.width // 2
    if num_heads < 1 or width % num_heads:
        raise UserError(f"num_heads={num_heads} does not divide the decoder's {width} channels")


@register_network
def segvit_b(num_classes: int, **arguments: Any) -> SegViT:
    """ViT-B, 512x512: 120.9 GFLOPs as published for ADE20K."""
    return SegViT(num_classes, **arguments)


@register_network
def segvit_l(num_classes: int, **arguments: Any) -> SegViT:
    """ViT-L, 640x640: 637.9 GFLOPs as published for ADE20K."""
    published: dict[str, Any] = {
        "backbone": "vit_large_patch16_384",
        "image_size": (640, 640),
        "outputs": (7, 15, 23),
        "num_heads": 16,
        "drop_path": 0.3,
    }
    return SegViT(num_classes, **(published | arguments))


@register_network
def segvit_shrunk_l(num_classes: int, **arguments: Any) -> ShrunkSegViT:
    """ViT-L of which a quarter of the tokens goes on from block 8: 373.5 GFLOPs as published."""
    return ShrunkSegViT(num_classes, **arguments)
