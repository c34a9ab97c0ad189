"""SETR (CVPR 2021, 2012.15840): a plain vision transformer, and decoders of convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn

from segtrain.errors import UserError, did_you_mean
from segtrain.networks.blocks import grid_from_tokens
from segtrain.networks.mla_head import SCALE, MLAHead, MLANeck
from segtrain.networks.plain_vit import (
    Normalisation,
    PlainNetwork,
    PlainViT,
    Positions,
)
from segtrain.networks.registry import register_network
from segtrain.networks.up_head import UpHead, initialise_classifier
from segtrain.reduction.plain import published_settings

Head = Literal["naive", "pup", "mla"]
HEADS = ("naive", "pup", "mla")
HeadStyle = Literal["mmseg", "official"]
HEAD_STYLES = ("mmseg", "official")
#: Size of a variant -> timm's name of its encoder.
BACKBONES = {
    "s": "vit_small_patch16_384",
    "b": "vit_base_patch16_384",
    "l": "vit_large_patch16_384",
}


def quarters(depth: int) -> tuple[int, ...]:
    """The last block of each quarter of an encoder: 2, 5, 8, 11 of 12."""
    return tuple(max(1, quarter * depth // 4) - 1 for quarter in (1, 2, 3, 4))


def published_auxiliary(head: Head, head_style: HeadStyle, depth: int) -> tuple[int, ...]:
    """Blocks that auxiliary heads follow; for encoders of 24 blocks those of the authors."""
    if head == "mla":
        return quarters(depth) if head_style == "official" else quarters(depth)[::-1]
    blocks = (9, 14, 19) if depth == 24 else quarters(depth)[:3]
    return (*blocks, depth - 1) if (head, head_style) == ("pup", "official") else blocks


class UpDecoder(nn.Module):
    """The decoders naive and PUP: an `UpHead` after the last block, others in training.

    Args:
        in_channels: of the maps.
        channels: of the convolutions.
        num_classes: K.
        head: ``naive`` or ``pup``.
        official: the authors' way, or else OpenMMLab's.
        depth: of the encoder, whose last block the main head follows.
        auxiliary: blocks that the auxiliary heads follow.
    """

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        head: Head,
        official: bool,
        depth: int,
        auxiliary: Sequence[int],
    ) -> None:
        super().__init__()
        progressive = head == "pup"
        kernel = 3 if progressive else 1
        # The authors' naive decoder is upsampled once, straight to the image.
        naive_scale = 1 if official and not progressive else 4

        def make_head(convolutions: int, scale: int) -> UpHead:
            return UpHead(
                in_channels,
                channels,
                num_classes,
                convolutions,
                kernel,
                scale,
                bias=official,
                upsample_last=not (official and convolutions > 1),
            )

        self.head = make_head(4, 2) if progressive else make_head(1, naive_scale)
        self.auxiliary_heads = nn.ModuleList(make_head(1, naive_scale) for _ in auxiliary)
        self.last, self.auxiliary = depth - 1, auxiliary
        #: Of the scores over the map.
        self.scale = (8 if official else 16) if progressive else naive_scale

    @property
    def blocks(self) -> set[int]:
        """Those whose maps `forward` takes."""
        return {self.last, *(self.auxiliary if self.training else ())}

    def forward(self, maps: Mapping[int, Tensor], as_published: bool = False) -> list[Tensor]:
        """Maps (B, C, h, w) by block -> scores (B, K, f*h, f*w), in training auxiliary ones too."""
        scores = [self.head(maps[self.last], as_published)]
        if self.training:
            for block, head in zip(self.auxiliary, self.auxiliary_heads, strict=True):
                scores.append(head(maps[block]))
        return scores


class MLADecoder(nn.Module):
    """The decoder MLA: a neck over several blocks' maps, a head, and others in training.

    Args:
        in_channels: of the maps.
        channels: of the neck.
        num_classes: K.
        official: the authors' way, or else OpenMMLab's.
        levels: blocks whose maps it takes, ascending.
        auxiliary: those of them that auxiliary heads follow.
    """

    scale = SCALE

    def __init__(
        self,
        in_channels: int,
        channels: int,
        num_classes: int,
        official: bool,
        levels: Sequence[int],
        auxiliary: Sequence[int],
    ) -> None:
        super().__init__()
        self.neck = MLANeck(in_channels, channels, len(levels))
        self.head = MLAHead(channels, num_classes, len(levels), official)
        self.auxiliary_heads = nn.ModuleList(
            initialise_classifier(nn.Conv2d(channels, num_classes, 1, bias=not official))
            for _ in auxiliary
        )
        self.levels, self.auxiliary = levels, auxiliary

    @property
    def blocks(self) -> set[int]:
        """Those whose maps `forward` takes."""
        return set(self.levels)

    def forward(self, maps: Mapping[int, Tensor], as_published: bool = False) -> list[Tensor]:
        """Maps (B, C, h, w) by block -> scores (B, K, 4h, 4w), in training auxiliary ones too."""
        aggregated = self.neck([maps[block] for block in self.levels])
        scores = [self.head(aggregated, as_published)]
        if self.training:
            for block, head in zip(self.auxiliary, self.auxiliary_heads, strict=True):
                scores.append(head(aggregated[self.levels.index(block)]))
        return scores


class SETR(PlainNetwork):
    """(B, 3, H, W) of any size -> scores (B, K, ceil(f*H/p), ceil(f*W/p)), p the patches' side.

    f is 4 (``naive``, ``mla``) or 16 (``pup``), and of the authors' heads 1 (``naive``), 8
    (``pup``) and 4 (``mla``). In training it gives a tuple, the scores and those of the auxiliary
    heads. The encoder has no final norm; the heads begin with their own.

    Args:
        num_classes: K.
        head: ``naive`` (one convolution), ``pup`` (progressive upsampling) or ``mla`` (multi-level
            aggregation).
        head_style: ``mmseg`` (OpenMMLab) or ``official`` (the authors). Their heads differ in
            biases, upsampling and classifiers, their encoders in training: stochastic depth leaves
            OpenMMLab's attentions out.
        backbone: timm's name of the encoder.
        image_size: (height, width) of the training crops.
        pretrained: whether timm loads the encoder's weights.
        channels: of the heads' convolutions; half of it in MLA's branches.
        auxiliary: blocks, counted from 0, that auxiliary heads follow, in the heads' order; the
            authors' (9, 14, 19 of 24) or the ends of the quarters if None. Those of MLA are among
            its levels, the ends of the quarters.
        drop_path: rate of the encoder's last block; the rates rise linearly from 0.
        positions: how positions are resized to other images: see `PlainViT`.
        normalisation: of what the encoder gets: see `PlainViT`.
        backbone_arguments: what timm's constructor takes, such as ``embed_dim`` or ``depth``.

    Raises:
        UserError: an argument names what there is not, or the encoder cannot be built.
    """

    def __init__(
        self,
        num_classes: int,
        head: Head = "naive",
        head_style: HeadStyle = "mmseg",
        backbone: str = BACKBONES["l"],
        image_size: Sequence[int] = (512, 512),
        pretrained: bool = False,
        channels: int = 256,
        auxiliary: Sequence[int] | None = None,
        drop_path: float = 0.0,
        positions: Positions = "bilinear",
        normalisation: Normalisation = "imagenet",
        backbone_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        if head not in HEADS:
            raise UserError(f"there is no head '{head}': {did_you_mean(head, HEADS)}")
        if head_style not in HEAD_STYLES:
            raise UserError(
                f"there is no head_style '{head_style}': {did_you_mean(head_style, HEAD_STYLES)}"
            )
        official = head_style == "official"
        encoder = PlainViT(
            backbone,
            image_size,
            pretrained=pretrained,
            prefix=head != "mla",
            final_norm=False,
            drop_path=drop_path,
            drop_path_of_mlps_only=not official,
            positions=positions,
            normalisation=normalisation,
            backbone_arguments=backbone_arguments,
        )
        width, depth = encoder.width, encoder.depth
        if auxiliary is None:
            auxiliary = published_auxiliary(head, head_style, depth)
        choices = quarters(depth) if head == "mla" else tuple(range(depth))
        if not (isinstance(auxiliary, Sequence) and set(auxiliary) <= set(choices)):
            raise UserError(
                f"'auxiliary' lists blocks of {', '.join(map(str, choices))}, not {auxiliary!r}"
            )
        decoder: UpDecoder | MLADecoder
        if head == "mla":
            decoder = MLADecoder(width, channels, num_classes, official, choices, tuple(auxiliary))
        else:
            decoder = UpDecoder(
                width, channels, num_classes, head, official, depth, tuple(auxiliary)
            )
        stride = max(1, encoder.patch_size // decoder.scale)
        super().__init__(num_classes, stride, published_settings(encoder))
        self.encoder, self.decoder = encoder, decoder
        self.head, self.head_style = head, head_style

    def score(self, images: Tensor) -> Tensor | tuple[Tensor, ...]:
        blocks = sorted(self.decoder.blocks)
        levels, grid = self.levels(images, blocks)
        maps = {
            block: grid_from_tokens(level.restore(level.tokens), grid)
            for block, level in zip(blocks, levels, strict=True)
        }
        scores = self.decoder(maps, self.as_published)
        size = (images.shape[2], images.shape[3])
        visible = [crop_padding(each, grid, size, self.encoder.patch_size) for each in scores]
        return tuple(visible) if len(visible) > 1 else visible[0]


def crop_padding(
    scores: Tensor, grid: tuple[int, int], image_size: tuple[int, int], patch_size: int
) -> Tensor:
    """Scores (B, K, f*h, f*w) of a grid (h, w) of patches, less those of padding alone."""
    (height, width), scale = image_size, scores.shape[2] // grid[0]
    return scores[:, :, : -(-height * scale // patch_size), : -(-width * scale // patch_size)]


def _variant(head: Head, size: str, num_classes: int, arguments: dict[str, Any]) -> SETR:
    published: dict[str, Any] = {"head": head, "backbone": BACKBONES[size]}
    return SETR(num_classes, **(published | arguments))


@register_network
def setr_naive_s(num_classes: int, **arguments: Any) -> SETR:
    """ViT-S, and a convolution: 22.5 M parameters for 150 classes."""
    return _variant("naive", "s", num_classes, arguments)


@register_network
def setr_naive_b(num_classes: int, **arguments: Any) -> SETR:
    """ViT-B, and a convolution: 87.4 M parameters for 150 classes."""
    return _variant("naive", "b", num_classes, arguments)


@register_network
def setr_naive_l(num_classes: int, **arguments: Any) -> SETR:
    """ViT-L, and a convolution: 305.4 M parameters for 150 classes."""
    return _variant("naive", "l", num_classes, arguments)


@register_network
def setr_pup_s(num_classes: int, **arguments: Any) -> SETR:
    """ViT-S, and progressive upsampling: 27.5 M parameters for 150 classes."""
    return _variant("pup", "s", num_classes, arguments)


@register_network
def setr_pup_b(num_classes: int, **arguments: Any) -> SETR:
    """ViT-B, and progressive upsampling: 95.4 M parameters for 150 classes."""
    return _variant("pup", "b", num_classes, arguments)


@register_network
def setr_pup_l(num_classes: int, **arguments: Any) -> SETR:
    """ViT-L, and progressive upsampling: 315.5 M parameters for 150 classes."""
    return _variant("pup", "l", num_classes, arguments)


@register_network
def setr_mla_s(num_classes: int, **arguments: Any) -> SETR:
    """ViT-S, and multi-level aggregation: 26.7 M parameters for 150 classes."""
    return _variant("mla", "s", num_classes, arguments)


@register_network
def setr_mla_b(num_classes: int, **arguments: Any) -> SETR:
    """ViT-B, and multi-level aggregation: 91.6 M parameters for 150 classes."""
    return _variant("mla", "b", num_classes, arguments)


@register_network
def setr_mla_l(num_classes: int, **arguments: Any) -> SETR:
    """ViT-L, and multi-level aggregation: 309.6 M parameters for 150 classes."""
    return _variant("mla", "l", num_classes, arguments)
