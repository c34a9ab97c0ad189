"""What every network of segtrain offers: scores, and settings to trade them for cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

from torch import Tensor, nn

from segtrain.errors import UserError, did_you_mean
from segtrain.networks.mask_prediction import MaskPrediction
from segtrain.reduction import Setting


class Network(nn.Module):
    """From a normalised image batch (B, 3, H, W) to scores (B, K, ceil(H/s), ceil(W/s)).

    A subclass reads its reduction from ``self.setting`` in ``forward``. Switching a setting
    changes this one attribute: no parameter, no buffer, no other module.

    Args:
        num_classes: K.
        stride: s, how many image pixels one score covers along an axis.
        settings: the published settings, the one under which the weights are trained first.
    """

    setting_type: ClassVar[type[Setting]] = Setting
    #: Whether the published costs are those of a window, where windows slide, and not of the image.
    cost_of_window: ClassVar[bool] = False
    #: The loss that takes what the network gives in training: cross_entropy, attention_to_mask or
    #: mask_classification.
    criterion: ClassVar[str] = "cross_entropy"
    #: Image pixels that a pixel of a mask covers along an axis, where the network has ``masks``.
    mask_stride: ClassVar[int | None] = None
    #: Classes of the modules that repeat, the units that are sharded and recomputed one at a time.
    #: They are called, and nothing else reads their parameters.
    block_types: ClassVar[tuple[type[nn.Module], ...]] = ()
    #: Whether to compute the way the authors' code does, where ours gives the same scores with
    #: fewer operations; to count theirs.
    as_published: bool = False
    #: Whether the scores are those of whole images, (B, K, 1, 1).
    classifies_images: bool = False
    #: Optimiser steps that the weights have been trained for, for what changes with them.
    step: int = 0

    def __init__(
        self, num_classes: int, stride: int, settings: Sequence[Setting] = (Setting("full"),)
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.stride = stride
        self.settings: dict[str, Setting] = {setting.name: setting for setting in settings}
        self.setting: Setting = settings[0]

    @property
    def blocks(self) -> list[nn.Module]:
        """The modules of ``block_types``, outer ones before what they hold."""
        return [module for module in self.modules() if isinstance(module, self.block_types)]

    @property
    def data_dependent(self) -> bool:
        """Whether the cost under the current setting depends on what the image shows."""
        return self.setting.data_dependent

    @property
    def training_setting(self) -> Setting:
        """The setting under which the weights are trained."""
        return next(iter(self.settings.values()))

    def resolve_setting(self, setting: str | Setting | Mapping[str, Any]) -> Setting:
        """The setting that a name, a setting or plain values stand for.

        Raises:
            UserError: no published setting has that name, or the values do not fit.
        """
        if isinstance(setting, str):
            if setting not in self.settings:
                raise UserError(
                    f"{type(self).__name__} has no setting '{setting}': "
                    f"{did_you_mean(setting, self.settings)}"
                )
            return self.settings[setting]
        if not isinstance(setting, Setting):
            named = "name" in setting
            setting = self.setting_type.from_values(setting)
            for published in self.settings.values():
                if not named and published.values == setting.values:
                    return published
        if not isinstance(setting, self.setting_type):
            raise UserError(
                f"{type(self).__name__} takes a {self.setting_type.__name__}, "
                f"not a {type(setting).__name__}"
            )
        self.check_setting(setting)
        return setting

    def check_setting(self, setting: Setting) -> None:
        """Raise UserError if a setting does not fit this network's layers."""

    def fit_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A file's weights, by our names, in the shapes that this network has them in."""
        return dict(weights)

    def train_under(self, setting: str | Setting | Mapping[str, Any]) -> None:
        """Make a setting the training setting, and the current one.

        Raises:
            UserError: there is no such setting, or it does not fit.
        """
        self.setting = self.resolve_setting(setting)
        self.settings = {self.setting.name: self.setting} | self.settings

    def masks(self, images: Tensor) -> MaskPrediction:
        """(B, 3, H, W) -> what the queries say, where the network has a ``mask_stride``.

        Raises:
            UserError: it has none, and scores pixels.
        """
        raise UserError(f"{type(self).__name__} scores pixels and has no masks")

    @contextmanager
    def using(self, setting: str | Setting | Mapping[str, Any]) -> Iterator[Setting]:
        """Switch to a setting, and back to the former one on leaving, also after an error."""
        former = self.setting
        self.setting = self.resolve_setting(setting)
        try:
            yield self.setting
        finally:
            self.setting = former
