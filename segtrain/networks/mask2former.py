"""Mask2Former (CVPR 2022, 2112.01527): queries that say what they are of, and where it is."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.errors import UserError, did_you_mean
from segtrain.networks.blocks import resize
from segtrain.networks.mask_prediction import MaskPrediction, MaskPredictions, score_classes
from segtrain.networks.masked_attention import DecoderLayer, MaskedAttentionDecoder
from segtrain.networks.network import Network
from segtrain.networks.pixel_decoder import (
    NUM_GROUPS,
    EncoderLayer,
    PixelDecoder,
    PixelEmbedding,
    check_layers,
)
from segtrain.networks.pyramid import BLOCK_TYPES, BatchNorms, create_pyramid
from segtrain.networks.recalibration import Recalibration
from segtrain.networks.registry import register_network
from segtrain.reduction.layers_run import LayersRun, published_settings
from segtrain.reduction.setting import Setting

SIZE_DIVISOR = 32  # of images, which are padded
#: size -> timm's backbone, with the tag of the weights that the authors begin with.
BACKBONES = {
    "r50": "resnet50.tv_in1k",
    "r101": "resnet101.tv_in1k",
    "swin_t": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_s": "swin_small_patch4_window7_224.ms_in1k",
    "swin_b": "swin_base_patch4_window12_384.ms_in1k",
    "swin_l": "swin_large_patch4_window12_384.ms_in22k",
}


class Decoder(nn.Module):
    """The pixel decoder and the queries that look at what it makes."""

    def __init__(self, pixels: PixelDecoder, queries: MaskedAttentionDecoder) -> None:
        super().__init__()
        self.pixels = pixels
        self.queries = queries


class Mask2Former(Network):
    """(B, 3, H, W) -> scores (B, K, H, W), in training `MaskPredictions` of all layers.

    A class's score is a sum over all queries: how probably the query is of the class, times how
    probably it is at that pixel. Images are padded with zeros, right and below, to sides that are
    multiples of 32, and so are the masks of `masks` and of training.

    PRO-SCALE (2404.14657) is this network with an encoder that is fed scale by scale.

    Args:
        num_classes: K.
        backbone: timm's name of a network with maps at strides 4, 8, 16 and 32.
        pretrained: whether timm loads weights of the backbone.
        num_queries: Q.
        drop_path: rate of the backbone's last block; rises linearly from 0.
        batch_norm: whether the backbone's batch norms, if it has some, are ``frozen`` or
            ``trained``.
        encoder_layers: how many update the tokens at stride 32 alone; those at 32 and 16; all.
        decoder_layers: of the queries; each predicts in training.
        width: d, of all that comes behind the backbone.
        num_heads: of every attention behind the backbone.
        encoder_mlp_width, decoder_mlp_width: of the layers' MLPs.
        recalibration: how coarse tokens are weighed by the finest ones, see `TokenRecalibration`;
            None does not.
        temperature: of the recalibration.
        pixel_embedding: what smooths the map at stride 4: ``convolution`` or ``max_pool``,
            PRO-SCALE's light pixel embedding.
        residual: whether a stage's input is added behind each layer of the first two stages.
        exits: numbers of layers of the encoder's last stage after which it may end, ascending
            (ECO-M2F, 2404.15244). Training draws one for each step; a gate is to be trained then,
            which the setting ``gate`` asks. None has no gate.
        backbone_arguments: further ones of timm's constructor.
    """

    setting_type: ClassVar[type[Setting]] = LayersRun
    criterion: ClassVar[str] = "mask_classification"
    mask_stride: ClassVar[int | None] = 4
    block_types: ClassVar[tuple[type[nn.Module], ...]] = (
        *BLOCK_TYPES,
        EncoderLayer,
        DecoderLayer,
    )
    setting: Any  # of that type

    def __init__(
        self,
        num_classes: int,
        backbone: str = BACKBONES["swin_t"],
        pretrained: bool = False,
        num_queries: int = 100,
        drop_path: float = 0.3,
        batch_norm: BatchNorms = "frozen",
        encoder_layers: Sequence[int] = (0, 0, 6),
        decoder_layers: int = 9,
        width: int = 256,
        num_heads: int = 8,
        encoder_mlp_width: int = 1024,
        decoder_mlp_width: int = 2048,
        recalibration: Recalibration | None = None,
        temperature: float = 0.1,
        pixel_embedding: PixelEmbedding = "convolution",
        residual: bool = False,
        exits: Sequence[int] | None = None,
        backbone_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        check_layers("encoder_layers", encoder_layers)
        _check(width, num_heads, num_queries, decoder_layers)
        _check_exits(exits, encoder_layers[2])
        _check_kind("recalibration", recalibration, [None, *get_args(Recalibration)])
        _check_kind("pixel_embedding", pixel_embedding, get_args(PixelEmbedding))
        super().__init__(num_classes, 1, published_settings(encoder_layers, decoder_layers, exits))
        self.num_heads, self.temperature, self.residual = num_heads, temperature, residual
        self.exits = None if exits is None else tuple(exits)
        self.encoder = create_pyramid(
            backbone,
            pretrained=pretrained,
            drop_path=drop_path,
            batch_norm=batch_norm,
            backbone_arguments=backbone_arguments,
        )
        self.decoder = Decoder(
            PixelDecoder(
                self.encoder.widths,
                width,
                num_heads,
                encoder_mlp_width,
                encoder_layers,
                recalibration,
                temperature,
                pixel_embedding,
                residual,
                exits,
            ),
            MaskedAttentionDecoder(
                num_classes, width, num_queries, num_heads, decoder_mlp_width, decoder_layers
            ),
        )

    def check_setting(self, setting: Setting) -> None:
        if isinstance(setting, LayersRun):
            pixels, queries = self.decoder.pixels, self.decoder.queries
            setting.check(pixels.encoder_layers, len(queries.layers), self.exits is not None)

    def forward(self, images: Tensor) -> Tensor | MaskPredictions:
        if self.training:
            return self._train_heads(images)
        if self.setting.gate and len(images) > 1:
            return torch.cat([self.score(image[None]) for image in images])
        return self.score(images)

    def masks(self, images: Tensor) -> MaskPrediction:
        """(B, 3, H, W) -> classes (B, Q, K+1) and masks (B, Q, h, w), logits.

        h and w are a quarter of the padded image's sides.
        """
        if self.setting.gate and len(images) > 1:
            parts = [self._predict(image[None], self.setting.encoder)[0] for image in images]
            return MaskPrediction(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
        return self._predict(images, self.setting.encoder)[0]

    def score(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, K, H, W)."""
        height, width = images.shape[2:]
        classes, masks = self.masks(images)
        rows, columns = masks.shape[2:]
        masks = resize(masks, (4 * rows, 4 * columns))[:, :, :height, :width]
        if self.as_published:
            masks = resize(masks, (height, width))  # theirs go on to the size of the labels
        return score_classes(classes, masks)

    def _train_heads(self, images: Tensor) -> MaskPredictions:
        layers_run, weight = self.setting.encoder, 1.0
        if self.exits is not None:
            # By the step, so that all processes run the same layers.
            layers = random.Random(self.step).choice(self.exits)
            layers_run, weight = (*layers_run[:2], layers), layers / self.exits[-1]
        return MaskPredictions(tuple(self._predict(images, layers_run)), weight)

    def _predict(self, images: Tensor, layers_run: Sequence[int]) -> list[MaskPrediction]:
        bottom, right = (-side % SIZE_DIVISOR for side in images.shape[2:])
        maps = self.encoder(F.pad(images, (0, right, 0, bottom)))
        gated = self.setting.gate and not self.training
        features = self.decoder.pixels(maps, layers_run, gated)
        return self.decoder.queries(features, self.setting.decoder, self.as_published)


def _check(width: int, num_heads: int, num_queries: int, decoder_layers: int) -> None:
    if width % NUM_GROUPS or width % num_heads or width % 4:
        raise UserError(
            f"width={width} is to be a multiple of num_heads={num_heads} and of {NUM_GROUPS}, "
            "the groups of the norms"
        )
    if num_queries < 1 or decoder_layers < 1:
        raise UserError("'num_queries' and 'decoder_layers' are at least 1")


def _check_exits(exits: Sequence[int] | None, layers: int) -> None:
    possible = range(1, layers + 1)
    if exits is not None and (not exits or list(exits) != sorted(set(exits) & set(possible))):
        raise UserError(
            f"'exits' are numbers of layers of the encoder's last stage, from 1 to {layers}, "
            f"ascending, not {list(exits)}"
        )


def _check_kind(name: str, kind: str | None, kinds: Sequence[str | None]) -> None:
    if kind not in kinds:
        raise UserError(f"there is no {name} '{kind}': {did_you_mean(str(kind), map(str, kinds))}")


def variant(size: str, num_classes: int, arguments: Mapping[str, Any]) -> Mask2Former:
    """The network over a published backbone."""
    published: dict[str, Any] = {"backbone": BACKBONES[size]}
    if not size.startswith("swin"):
        published["drop_path"] = 0.0
    return Mask2Former(num_classes, **{**published, **arguments})


@register_network
def mask2former_r50(num_classes: int, **arguments: Any) -> Mask2Former:
    """ResNet-50: 44.0 M parameters."""
    return variant("r50", num_classes, arguments)


@register_network
def mask2former_r101(num_classes: int, **arguments: Any) -> Mask2Former:
    """ResNet-101."""
    return variant("r101", num_classes, arguments)


@register_network
def mask2former_swin_t(num_classes: int, **arguments: Any) -> Mask2Former:
    """Swin-T: 47.4 M parameters; 537.848 GFLOPs as published at 1024x2048, 19 classes."""
    return variant("swin_t", num_classes, arguments)


@register_network
def mask2former_swin_s(num_classes: int, **arguments: Any) -> Mask2Former:
    """Swin-S."""
    return variant("swin_s", num_classes, arguments)


@register_network
def mask2former_swin_b(num_classes: int, **arguments: Any) -> Mask2Former:
    """Swin-B."""
    return variant("swin_b", num_classes, arguments)


@register_network
def mask2former_swin_l(num_classes: int, **arguments: Any) -> Mask2Former:
    """Swin-L."""
    return variant("swin_l", num_classes, arguments)
