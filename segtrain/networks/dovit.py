"""DoViT (WACV 2024, 2308.01944): patches that are easy to classify leave the encoder early."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segtrain.errors import UserError, did_you_mean
from segtrain.networks.blocks import Grid, grid_from_tokens
from segtrain.networks.mask_transformer import MaskTransformer
from segtrain.networks.plain_vit import (
    Normalisation,
    PlainNetwork,
    PlainViT,
    Positions,
)
from segtrain.networks.registry import register_network
from segtrain.networks.setr import crop_padding
from segtrain.networks.up_head import UpHead
from segtrain.reduction.passing import (
    Selection,
    aggregate,
    budget,
    confidences,
    exact_lengths,
    keep_least_confident,
    mean_lengths,
    pass_on,
    select,
)
from segtrain.reduction.setting import Setting
from segtrain.reduction.token_passing import TokenPassing, at_decision, published_settings

#: name of the size -> timm's backbone, the blocks before which patches may stop.
VARIANTS = {
    "s": ("vit_small_patch16_384", (2, 5, 8)),
    "b": ("vit_base_patch16_384", (2, 5, 8)),
    "l": ("vit_large_patch16_384", (6, 12, 18)),
}
DECODERS = ("setr", "segmenter")
BATCH_RULES = ("exact", "mean")


@dataclass(frozen=True)
class Decision:
    """What was decided before a block.

    Attributes:
        confidence: (B, N) of the patches; of stopped ones it may be 0 instead.
        active: (B, N), which patches have not stopped.
        selection: the tokens that run until the next decision.
    """

    confidence: Tensor
    active: Tensor
    selection: Selection


@dataclass(frozen=True)
class Encoding:
    """What the encoder gives.

    Attributes:
        tokens: (B, P + N, C), normed; those of stopped patches as they stopped.
        grid: (h, w), h * w = N.
        decisions: none under a setting under which nothing stops.
        auxiliary_scores: (B, K, s * h, s * w) of each auxiliary head, in training alone.
    """

    tokens: Tensor
    grid: Grid
    decisions: list[Decision]
    auxiliary_scores: list[Tensor]


class Decoder(nn.Module):
    """The head over all tokens, and the auxiliary ones by which patches stop."""

    def __init__(self, head: UpHead | MaskTransformer, auxiliary_heads: Iterable[UpHead]) -> None:
        super().__init__()
        self.head = head
        self.auxiliary_heads = nn.ModuleList(auxiliary_heads)


class DoViT(PlainNetwork):
    """(B, 3, H, W) of any size -> scores (B, K, ceil(f*H/p), ceil(f*W/p)), p the patches' side.

    f is 4 with SETR's decoder, 1 with Segmenter's.

    Before some blocks an auxiliary head scores the map. Patches that it is sure of stop there:
    their tokens stay as they are, while the others go through the next blocks, and come back for
    the decoder, which sees all. A stopped patch never runs again. If many tokens rest, the first
    prefix token, the class token, is drawn to their mean. Prefix tokens never stop.

    In training the auxiliary scores follow the scores. In evaluation images of a batch do not
    depend on each other.

    Of the authors' code this leaves out that its sort is not stable, by which another token than
    the class token is drawn to the mean, and that its criterion of differences compares with 0.

    Args:
        num_classes: K.
        backbone: timm's name of a plain vision transformer with a class token.
        decoder: ``setr`` (SETR's naive one; the auxiliary heads upsample too) or ``segmenter`` (its
            mask transformer; the auxiliary heads score tokens).
        image_size: (height, width) of training crops.
        pretrained: whether timm loads its weights.
        decisions: the blocks before which patches may stop, from 0.
        aggregation_rate: share of an image's tokens above which resting ones are aggregated.
        ramp_steps: training steps over which thresholds fall from 1 to the setting's; the first
            step, at least, stops none.
        difference: patches also stop where their confidence has risen by less than this since the
            decision before; -1 for nowhere.
        detach_auxiliaries: whether the auxiliary heads' gradients stop before the encoder.
        batch_rule: in evaluation, whether what runs of an image is its own active tokens
            (``exact``) or as many as in the mean of the batch (``mean``), as always in training.
        final_norm: whether the norm behind the last block is kept.
        auxiliary_convolutions: of each auxiliary head, each upsampled with SETR's decoder.
        channels: of the convolutions.
        drop_path: rate of the last block's MLP; the rates rise linearly from 0.
        positions, normalisation: as in `PlainViT`; ``positions`` is that of the decoder's authors
            if None.
        backbone_arguments: what timm's constructor takes, such as ``embed_dim`` or ``depth``.

    Raises:
        UserError: an argument has no possible value.
    """

    setting_type = TokenPassing
    setting: TokenPassing

    def __init__(
        self,
        num_classes: int,
        backbone: str = "vit_small_patch16_384",
        decoder: Literal["setr", "segmenter"] = "setr",
        image_size: Sequence[int] = (512, 512),
        pretrained: bool = False,
        decisions: Sequence[int] = (2, 5, 8),
        aggregation_rate: float = 0.1,
        ramp_steps: int = 1,
        difference: float = -1.0,
        detach_auxiliaries: bool = False,
        batch_rule: Literal["exact", "mean"] = "exact",
        final_norm: bool = True,
        auxiliary_convolutions: int = 1,
        channels: int = 256,
        drop_path: float = 0.0,
        positions: Positions | None = None,
        normalisation: Normalisation = "imagenet",
        backbone_arguments: Mapping[str, Any] | None = None,
    ) -> None:
        for kind, value, known in (
            ("decoder", decoder, DECODERS),
            ("batch rule", batch_rule, BATCH_RULES),
        ):
            if value not in known:
                raise UserError(f"there is no {kind} '{value}': {did_you_mean(value, known)}")
        if type(ramp_steps) is not int or ramp_steps < 1:
            raise UserError(f"'ramp_steps' is a whole number above 0, not {ramp_steps!r}")
        encoder = PlainViT(
            backbone,
            image_size,
            pretrained=pretrained,
            final_norm=final_norm,
            drop_path=drop_path,
            drop_path_of_mlps_only=True,
            positions=positions or ("bilinear" if decoder == "setr" else "bicubic"),
            normalisation=normalisation,
            backbone_arguments=backbone_arguments,
        )
        if not encoder.num_prefix:
            raise UserError(f"'{backbone}' has no class token, to which DoViT aggregates")
        _check_decisions(decisions, encoder.depth)
        scale = 4 if decoder == "setr" else 1
        stride = max(1, encoder.patch_size // scale)
        super().__init__(num_classes, stride, published_settings())
        self.encoder = encoder
        up_head = functools.partial(
            UpHead, encoder.width, channels, num_classes, scale=scale, norm=decoder == "setr"
        )
        self.decoder = Decoder(
            up_head() if decoder == "setr" else _mask_transformer(encoder, num_classes),
            (up_head(auxiliary_convolutions) for _ in decisions),
        )
        self.upsamples = scale > 1
        self.decisions = tuple(decisions)
        self.aggregation_rate = aggregation_rate
        self.ramp_steps = ramp_steps
        self.difference = difference
        self.detach_auxiliaries = detach_auxiliaries
        self.batch_rule = batch_rule

    def check_setting(self, setting: Setting) -> None:
        assert isinstance(setting, TokenPassing)
        setting.check_decisions(self.decisions)

    def forward(self, images: Tensor) -> Any:
        """(B, 3, H, W) -> scores; in training a tuple, the auxiliary scores behind them."""
        encoding = self.encode(images)
        tokens, grid, head = encoding.tokens, encoding.grid, self.decoder.head
        if isinstance(head, MaskTransformer):
            scores = grid_from_tokens(head(tokens[:, self.encoder.num_prefix :]), grid)
        else:
            scores = head(self.encoder.maps(tokens, grid), self.as_published)
        size = (images.shape[2], images.shape[3])
        visible = [
            crop_padding(each, grid, size, self.encoder.patch_size)
            for each in (scores, *encoding.auxiliary_scores)
        ]
        return tuple(visible) if self.training else visible[0]

    def encode(self, images: Tensor) -> Encoding:
        """Run the encoder on (B, 3, H, W) under the current setting."""
        encoder = self.encoder
        tokens, grid, rotations = encoder.embed(images)
        tokens = taken = encoder.run(range(self.decisions[0]), tokens, rotations)
        decisions: list[Decision] = []
        auxiliary_scores = []
        ends = (*self.decisions, encoder.depth)
        for number, (start, end) in enumerate(itertools.pairwise(ends)):
            last = decisions[-1] if decisions else None
            if self.training or self.setting.stops:
                scores, confidence = self._judge(number, tokens, taken, grid, last)
                if self.training:
                    auxiliary_scores.append(scores)
            if not self.setting.stops:
                tokens = encoder.run(range(start, end), tokens, rotations)
                continue
            decision = self._decide(number, confidence, last)
            decisions.append(decision)
            selection = decision.selection
            tokens = aggregate(tokens, selection.resting, self.aggregation_rate)
            taken, placed = selection.take(tokens), selection.take_rotations(rotations)
            if selection.rectangular:
                taken = encoder.run(range(start, end), taken, placed)
            else:
                taken = self._run_packed(range(start, end), taken, placed, selection)
            tokens = selection.put(tokens, taken)
        return Encoding(encoder.vit.norm(tokens), grid, decisions, auxiliary_scores)

    def _judge(
        self, number: int, tokens: Tensor, taken: Tensor, grid: Grid, last: Decision | None
    ) -> tuple[Tensor, Tensor]:
        """Scores of an auxiliary head, and the confidences (B, N) by them."""
        head = self.decoder.auxiliary_heads[number]
        exact = self.batch_rule == "exact" and not self.training
        if last is None or not exact or self.upsamples or self.as_published:
            if self.detach_auxiliaries:
                tokens = tokens.detach()
            scores = head(self.encoder.maps(tokens, grid), self.as_published)
            return scores, confidences(scores, grid)
        # A head without neighbours: of the tokens that ran, all of one image in a column.
        column = (taken.shape[1], 1)
        scores = head(grid_from_tokens(taken, column))
        confidence = last.selection.put(
            tokens.new_zeros(*tokens.shape[:2], 1, dtype=torch.float32),
            confidences(scores, column)[..., None],
        )
        return scores, confidence[:, self.encoder.num_prefix :, 0]

    def _decide(self, number: int, confidence: Tensor, last: Decision | None) -> Decision:
        active = torch.ones_like(confidence, dtype=torch.bool) if last is None else last.active
        if self.setting.keep is None:
            previous = None if last is None else last.confidence
            return self._decide_by_threshold(number, confidence, active, previous)
        num_prefix = self.encoder.num_prefix
        count = budget(confidence.shape[1], at_decision(self.setting.keep, number))
        if last is not None:
            count = min(count, last.selection.lengths[0] - num_prefix)
        active = keep_least_confident(active, confidence, count)
        running = F.pad(active, (num_prefix, 0), value=True)
        lengths = [num_prefix + count] * len(active)
        return Decision(confidence, active, select(running, lengths))

    # How many tokens run is not known to a compiled graph.
    @torch.compiler.disable
    def _decide_by_threshold(
        self, number: int, confidence: Tensor, active: Tensor, previous: Tensor | None
    ) -> Decision:
        active = pass_on(active, confidence, self.threshold(number), previous, self.difference)
        running = F.pad(active, (self.encoder.num_prefix, 0), value=True)
        mean = self.training or self.batch_rule == "mean"
        lengths = mean_lengths(running) if mean else exact_lengths(running)
        return Decision(confidence, active, select(running, lengths))

    # A compiled graph would hold one batch's lengths.
    @torch.compiler.disable
    def _run_packed(
        self, blocks: Sequence[int], tokens: Tensor, rotations: Tensor | None, selection: Selection
    ) -> Tensor:
        encoder, lengths = self.encoder, selection.lengths
        if tokens.device.type != "cpu":
            return encoder.run(blocks, tokens, rotations, selection.core)
        # A CPU gains nothing by many rows, and its caches hold a single image's for longer.
        images = tokens.split(lengths, dim=1)
        placed = [None] * len(lengths) if rotations is None else rotations.split(lengths)
        return torch.cat(
            [encoder.run(blocks, *image) for image in zip(images, placed, strict=True)], dim=1
        )

    def threshold(self, decision: int) -> float:
        """The setting's at a decision; in training it falls to that from 1."""
        assert self.setting.threshold is not None
        threshold = at_decision(self.setting.threshold, decision)
        if not self.training:
            return threshold
        return 1 - min(1.0, self.step / self.ramp_steps) * (1 - threshold)


def _check_decisions(decisions: Sequence[int], depth: int) -> None:
    ascending = all(before < behind for before, behind in itertools.pairwise((-1, *decisions)))
    if not decisions or not ascending or decisions[-1] >= depth:
        raise UserError(
            f"'decisions' are blocks from 0 to {depth - 1} in ascending order, "
            f"not {list(decisions)}"
        )


def _mask_transformer(encoder: PlainViT, num_classes: int) -> MaskTransformer:
    """As OpenMMLab has it."""
    return MaskTransformer(
        encoder.width,
        num_classes,
        num_heads=encoder.num_heads,
        dropout=0.0,
        drop_path=0.1,
        drop_path_of_mlps_only=True,
    )


def _variant(
    decoder: Literal["setr", "segmenter"], size: str, num_classes: int, arguments: dict[str, Any]
) -> DoViT:
    backbone, decisions = VARIANTS[size]
    published: dict[str, Any] = {"decoder": decoder, "backbone": backbone, "decisions": decisions}
    published["drop_path"] = 0.1 if decoder == "segmenter" else 0.0
    return DoViT(num_classes, **(published | arguments))


@register_network
def dovit_setr_s(num_classes: int, **arguments: Any) -> DoViT:
    """ViT-S, with SETR's naive decoder."""
    return _variant("setr", "s", num_classes, arguments)


@register_network
def dovit_setr_b(num_classes: int, **arguments: Any) -> DoViT:
    """ViT-B, with SETR's naive decoder."""
    return _variant("setr", "b", num_classes, arguments)


@register_network
def dovit_setr_l(num_classes: int, **arguments: Any) -> DoViT:
    """ViT-L, with SETR's naive decoder."""
    return _variant("setr", "l", num_classes, arguments)


@register_network
def dovit_segmenter_s(num_classes: int, **arguments: Any) -> DoViT:
    """ViT-S, with Segmenter's mask transformer."""
    return _variant("segmenter", "s", num_classes, arguments)


@register_network
def dovit_segmenter_b(num_classes: int, **arguments: Any) -> DoViT:
    """ViT-B, with Segmenter's mask transformer."""
    return _variant("segmenter", "b", num_classes, arguments)


@register_network
def dovit_segmenter_l(num_classes: int, **arguments: Any) -> DoViT:
    """ViT-L, with Segmenter's mask transformer."""
    return _variant("segmenter", "l", num_classes, arguments)
