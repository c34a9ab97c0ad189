"""DToP (ICCV 2023, 2308.01045): tokens leave a plain vision transformer where a head is sure."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from segtrain.errors import UserError
from segtrain.networks.attention_to_mask import AttentionToMask
from segtrain.networks.blocks import grid_from_tokens, initialise_linear
from segtrain.networks.mask_prediction import MaskPrediction
from segtrain.networks.plain_vit import Normalisation, PlainNetwork, Positions
from segtrain.networks.registry import register_network
from segtrain.networks.segvit import check_heads, check_outputs, make_encoder
from segtrain.reduction.attention_core import PackedAttention
from segtrain.reduction.early_exit import EarlyExit, stay
from segtrain.reduction.setting import Setting


class Tokens(NamedTuple):
    """Tokens of several images one after the other, each image with its own number of them.

    Attributes:
        values: (S, C).
        positions: (S,) int64, image * N + patch.
        num_images: B, which a graph may leave free.
        uneven: tokens of each image, which add up to S; None if all have the same number.
    """

    values: Tensor
    positions: Tensor
    num_images: int
    uneven: list[int] | None

    @property
    def even(self) -> bool:
        """Whether all images have the same number of tokens."""
        return self.uneven is None

    @property
    def lengths(self) -> list[int]:
        """Tokens of each image."""
        return self.uneven or [self.values.shape[0] // self.num_images] * self.num_images

    def rows(self, values: Tensor) -> Tensor:
        """(S, X) -> (B, T, X) if the numbers are the same, (1, S, X) if not."""
        return values.unflatten(0, (self.num_images if self.even else 1, -1))


class Stage(NamedTuple):
    """What happens at one exit.

    Attributes:
        tokens: that get there.
        prediction: of the head; its masks (B, K, h, w) are, where a token has left, the ones that
            it left with.
        stays: (S,) bool, which of the tokens go on; None if all do.
    """

    tokens: Tokens
    prediction: MaskPrediction
    stays: Tensor | None


class Head(nn.Module):
    """Attention to mask on the tokens that are left; classes are there or they are not.

    Args:
        in_width: C of the tokens.
        num_classes: K.
        num_heads: of the attention, in width C / 2.
        num_layers: of it.
    """

    def __init__(self, in_width: int, num_classes: int, num_heads: int, num_layers: int) -> None:
        super().__init__()
        width = in_width // 2
        self.queries = nn.Embedding(num_classes, width)
        self.attention = AttentionToMask(in_width, width, num_heads, num_layers)
        self.classifier = nn.Linear(width, 2)
        self.apply(initialise_linear)

    def forward(self, tokens: Tokens) -> tuple[Tensor, Tensor]:
        """Class logits (B, K, 2), being there first, and the tokens' mask logits (S, K)."""
        queries = self.queries.weight.expand(tokens.num_images, -1, -1)
        queries, masks = self.attention(queries, tokens.rows(tokens.values), tokens.uneven)[-1]
        return self.classifier(queries), masks.transpose(1, 2).flatten(0, 1)


class Decoder(nn.Module):
    """A head behind the last block, and one of the same kind at each exit before it."""

    def __init__(
        self, in_width: int, num_classes: int, exits: int, num_heads: int, num_layers: int
    ) -> None:
        super().__init__()
        sizes = in_width, num_classes, num_heads, num_layers
        self.auxiliary_heads = nn.ModuleList(Head(*sizes) for _ in range(exits - 1))
        self.head = Head(*sizes)

    @property
    def heads(self) -> list[nn.Module]:
        """All heads in the order of the exits."""
        return [*self.auxiliary_heads, self.head]


class DToP(PlainNetwork):
    """(B, 3, H, W) -> scores (B, K, H/16, W/16); in training `MaskPrediction`s, the main one first.

    A class's score at a patch is how probably the class is in the image, by the last head, times
    how probably it is there, by the head at which the patch's token has left. Exits at which the
    setting lets no token leave are not computed in evaluation.

    Several images run one after the other in the same sequence, with attention within each; in
    training, once tokens have left, each image on its own, as whole images are dropped in the
    blocks' residual branches.

    Args:
        num_classes: K.
        backbone: timm's name of a plain vision transformer.
        image_size: (height, width) of the training crops.
        outputs: blocks behind which the exits are, ascending; the last one is the last block.
        num_heads: of the heads' attention.
        num_layers: of each head.
        pretrained: whether timm loads weights of the backbone.
        positions: how positions are resized to other image sizes.
        drop_path: rate of the last block; rises linearly from 0.
        normalisation: what the backbone was trained on, see `PlainViT`.
        backbone_arguments: further ones of timm's constructor.
    """

    criterion: ClassVar[str] = "attention_to_mask"
    setting_type = EarlyExit
    setting: EarlyExit

    def __init__(
        self,
        num_classes: int,
        backbone: str = "vit_base_patch16_384",
        image_size: Sequence[int] = (512, 512),
        outputs: Sequence[int] = (5, 7, 11),
        num_heads: int = 6,
        num_layers: int = 3,
        pretrained: bool = False,
        positions: Positions = "bicubic",
        drop_path: float = 0.1,
        normalisation: Normalisation = "imagenet",
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
        if outputs[-1] != encoder.depth - 1:
            raise UserError(f"'outputs' end with the last block, {encoder.depth - 1}")
        super().__init__(num_classes, encoder.patch_size, published_settings())
        self.encoder = encoder
        self.outputs = tuple(outputs)
        self.num_heads, self.normalisation = num_heads, normalisation
        self.decoder = Decoder(encoder.width, num_classes, len(outputs), num_heads, num_layers)

    def check_setting(self, setting: Setting) -> None:
        assert isinstance(setting, EarlyExit)
        exits = len(self.outputs) - 1
        if len(setting.thresholds) not in (1, exits):
            raise UserError(
                f"'thresholds' of a setting is a list of 1 or {exits} (exits before the last), "
                f"not of {len(setting.thresholds)}"
            )

    def forward(self, images: Tensor) -> Tensor | tuple[MaskPrediction, ...]:
        predictions = [stage.prediction for stage in self.stages(images)]
        if self.training:
            return tuple(reversed(predictions))
        classes, masks = predictions[-1]
        return classes.softmax(dim=2)[:, :, :1, None] * masks.sigmoid()

    def stages(self, images: Tensor) -> Iterator[Stage]:
        """What happens at each exit that is computed: all of them in training."""
        values, grid, rotations = self.encoder.embed(images)
        num_images, num_patches = values.shape[:2]
        positions = torch.arange(num_images * num_patches, device=values.device)
        tokens = Tokens(values.flatten(0, 1), positions, num_images, None)
        canvas = values.new_zeros(len(positions), self.num_classes)
        starts = (0, *(output + 1 for output in self.outputs))
        for blocks, head, threshold in zip(
            itertools.starmap(range, itertools.pairwise(starts)),
            self.decoder.heads,
            self._thresholds(),
            strict=True,
        ):
            tokens = self._run(blocks, tokens, rotations)
            if not self.training and threshold == 1 and head is not self.decoder.head:
                continue
            classes, masks = head(tokens)
            canvas = canvas.to(masks).index_copy(0, tokens.positions, masks)
            rows = canvas.unflatten(0, (num_images, num_patches))
            prediction = MaskPrediction(classes, grid_from_tokens(rows, grid))
            if threshold == 1:
                yield Stage(tokens, prediction, None)
                continue
            with torch.no_grad():
                image_of = tokens.positions // num_patches
                present = classes.float().softmax(dim=2)[:, :, 0]
                probabilities = present[image_of] * masks.float().sigmoid()
                stays = stay(probabilities, image_of, num_images, threshold, self.setting.kept)
            yield Stage(tokens, prediction, stays)
            tokens = _select(tokens, stays, image_of)

    def _thresholds(self) -> tuple[float, ...]:
        """One for each head; from the last one, nothing leaves."""
        thresholds = self.setting.thresholds
        exits = len(self.outputs) - 1
        return (*(thresholds * exits if len(thresholds) == 1 else thresholds), 1.0)

    def _run(self, blocks: Iterable[int], tokens: Tokens, rotations: Tensor | None) -> Tokens:
        """The tokens behind some of the encoder's blocks."""
        if rotations is not None:
            # Of the positions that are left, alike for all heads.
            rotations = tokens.rows(rotations[tokens.positions % len(rotations)])[:, None]
        rows = tokens.rows(tokens.values)
        if tokens.even or not self.training:
            core = None if tokens.even else PackedAttention(tokens.lengths)
            rows = self.encoder.run(blocks, rows, rotations, core)
        else:
            parts = rows.split(tokens.lengths, dim=1)
            placed: Sequence[Tensor | None] = [None] * len(parts)
            if rotations is not None:
                placed = rotations.split(tokens.lengths, dim=2)
            rows = torch.cat(
                [self.encoder.run(blocks, *image) for image in zip(parts, placed, strict=True)],
                dim=1,
            )
        return tokens._replace(values=rows.flatten(0, 1))


def _select(tokens: Tokens, stays: Tensor, image_of: Tensor) -> Tokens:
    """Those tokens that stay; their numbers are all that the device is waited for."""
    lengths = image_of.new_zeros(tokens.num_images).index_add_(0, image_of, stays.long()).tolist()
    chosen = stays.logical_not().to(torch.uint8).argsort(stable=True)[: sum(lengths)]
    uneven = None if len(set(lengths)) == 1 else lengths
    return Tokens(tokens.values[chosen], tokens.positions[chosen], tokens.num_images, uneven)


def published_settings() -> tuple[EarlyExit, ...]:
    """No exit, and thresholds around the authors': 0.9 for ViT-B on ADE20K, else 0.95."""
    thresholds = (0.99, 0.98, 0.95, 0.9, 0.85, 0.8)
    reduced = (EarlyExit(f"tau_{threshold}", (threshold,)) for threshold in thresholds)
    return (EarlyExit("full"), *reduced)


@register_network
def dtop_b(num_classes: int, **arguments: Any) -> DToP:
    """ViT-B, 512x512: 109.9 GFLOPs without exits as published for ADE20K, 86.8 with them."""
    return DToP(num_classes, **arguments)


@register_network
def dtop_l(num_classes: int, **arguments: Any) -> DToP:
    """ViT-L, 640x640: 617.0 GFLOPs without exits as published for ADE20K, 412.8 with them."""
    published: dict[str, Any] = {
        "backbone": "vit_large_patch16_384",
        "image_size": (640, 640),
        "outputs": (7, 15, 23),
        "num_heads": 8,
        "drop_path": 0.3,
        "normalisation": "half",
    }
    return DToP(num_classes, **(published | arguments))
