"""Segmenter (ICCV 2021, 2105.05633): a plain vision transformer, and scores for each patch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from segtrain.errors import UserError, did_you_mean
from segtrain.networks.blocks import grid_from_tokens, initialise_linear
from segtrain.networks.mask_transformer import MaskTransformer
from segtrain.networks.plain_vit import (
    Normalisation,
    PlainNetwork,
    PlainViT,
    Positions,
)
from segtrain.networks.registry import register_network
from segtrain.reduction.plain import published_settings

DECODERS = ("mask", "linear")
#: Size of a variant -> timm's name of its encoder.
BACKBONES = {
    "ti": "vit_tiny_patch16_384",
    "s": "vit_small_patch16_384",
    "b": "vit_base_patch16_384",
    "l": "vit_large_patch16_384",
}
HeadStyle = Literal["official", "mmseg"]


@dataclass(frozen=True)
class StyleValues:
    """What the authors' code and OpenMMLab's do differently.

    Attributes:
        ln_eps: of the encoder's layer norms; timm's own, 1e-6 in a ViT, if None.
        positions: how they are resized: see `PlainViT`.
        drop_path_of_mlps_only: whether stochastic depth leaves the attentions out.
        decoder: arguments of the mask transformer.
    """

    ln_eps: float | None
    positions: Positions
    drop_path_of_mlps_only: bool
    decoder: Mapping[str, Any]


STYLES = {
    "official": StyleValues(1e-5, "bilinear", False, {"dropout": 0.1}),
    "mmseg": StyleValues(
        None,
        "bicubic",
        True,
        {"dropout": 0.0, "drop_path": 0.1, "drop_path_of_mlps_only": True},
    ),
}


class Segmenter(PlainNetwork):
    """(B, 3, H, W) of any size -> scores (B, K, ceil(H/p), ceil(W/p)), p the side of the patches.

    Training and evaluation are alike.

    Args:
        num_classes: K.
        decoder: ``mask`` (mask transformer) or ``linear`` (a linear layer).
        head_style: ``official`` (the authors) or ``mmseg`` (OpenMMLab), which differ in the epsilon
            of the encoder's layer norms, in how positions are resized, and in dropout and
            stochastic depth.
        backbone: timm's name of the encoder.
        image_size: (height, width) of the training crops.
        pretrained: whether timm loads the encoder's weights.
        drop_path: rate of the encoder's last block; the rates rise linearly from 0.
        positions: how positions are resized to other images: see `PlainViT`; as ``head_style`` has
            it if None.
        normalisation: of what the encoder gets: see `PlainViT`.
        decoder_heads: of the mask transformer's attention; width // 64 if None.
        backbone_arguments: what timm's constructor takes, such as ``embed_dim`` or ``depth``.

    Raises:
        UserError: an argument names what there is not, or the encoder cannot be built.
    """

    def __init__(
        self,
        num_classes: int,
        decoder: Literal["mask", "linear"] = "mask",
        head_style: HeadStyle = "official",
        backbone: str = BACKBONES["s"],
        image_size: Sequence[int] = (512, 512),
        pretrained: bool = False,
        drop_path: float = 0.1,
        positions: Positions | None = None,
        normalisation: Normalisation = "half",
        decoder_heads: int | None = None,
        backbone_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        if decoder not in DECODERS:
            raise UserError(f"there is no decoder '{decoder}': {did_you_mean(decoder, DECODERS)}")
        if head_style not in STYLES:
            raise UserError(
                f"there is no head_style '{head_style}': {did_you_mean(head_style, STYLES)}"
            )
        values = STYLES[head_style]
        encoder = PlainViT(
            backbone,
            image_size,
            pretrained=pretrained,
            ln_eps=values.ln_eps,
            drop_path=drop_path,
            drop_path_of_mlps_only=values.drop_path_of_mlps_only,
            positions=positions or values.positions,
            normalisation=normalisation,
            backbone_arguments=backbone_arguments,
        )
        width = encoder.width
        if decoder_heads is not None and (decoder_heads < 1 or width % decoder_heads):
            raise UserError(
                f"decoder_heads={decoder_heads} does not divide the encoder's {width} channels"
            )
        super().__init__(num_classes, encoder.patch_size, published_settings(encoder))
        self.encoder = encoder
        self.head_style: HeadStyle = head_style
        self.decoder: MaskTransformer | nn.Linear
        if decoder == "mask":
            self.decoder = MaskTransformer(
                width, num_classes, num_heads=decoder_heads, **values.decoder
            )
        else:
            self.decoder = nn.Linear(width, num_classes)
            initialise_linear(self.decoder)

    def score(self, images: Tensor) -> Tensor:
        (level,), grid = self.levels(images, [self.encoder.depth - 1])
        return grid_from_tokens(level.restore(self.decoder(level.tokens)), grid)


def _variant(size: str, num_classes: int, arguments: dict[str, Any]) -> Segmenter:
    return Segmenter(num_classes, **({"backbone": BACKBONES[size]} | arguments))


@register_network
def segmenter_ti(num_classes: int, **arguments: Any) -> Segmenter:
    """ViT-Ti: 6.7 M parameters for 150 classes."""
    return _variant("ti", num_classes, arguments)


@register_network
def segmenter_s(num_classes: int, **arguments: Any) -> Segmenter:
    """ViT-S: 26.0 M parameters for 150 classes."""
    return _variant("s", num_classes, arguments)


@register_network
def segmenter_b(num_classes: int, **arguments: Any) -> Segmenter:
    """ViT-B: 102.5 M parameters for 150 classes."""
    return _variant("b", num_classes, arguments)


@register_network
def segmenter_l(num_classes: int, **arguments: Any) -> Segmenter:
    """ViT-L, trained on crops of 640 pixels: 333.2 M parameters for 150 classes."""
    return _variant("l", num_classes, {"image_size": (640, 640)} | arguments)
