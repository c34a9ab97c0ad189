"""What the settings of a network cost, on the images that it is validated on."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from segtrain import Cost, Network, UserError, measure_cost
from segtrain.calibration import at_threshold, find_threshold, placeholder
from segtrain.reduction import Setting
from segtrain.training import FullySharded, SegmentationModule


class SettingCosts:
    """Measures settings on rank zero, and finds the thresholds that keep to budgets.

    What depends on the image is measured at the start of every validation, in the weights that are
    scored: at its end, an average of weights has given way to those that are trained.

    Args:
        trainer: with its module and data.
        budgets: GMACs that thresholds are to be found for.
        latency: whether to time the network, too, next to counting.
        count: of the images, spread over the validation set, where a cost depends on them.

    Attributes:
        thresholds: those found, by the setting's name.
    """

    def __init__(
        self, trainer: Trainer, budgets: Iterable[float], latency: bool, count: int
    ) -> None:
        self._data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._module = cast(SegmentationModule, trainer.lightning_module)
        network = self._module.network
        self._budgets = {placeholder(network, budget).name: budget for budget in budgets}
        self._latency = latency
        self._count = count
        # Costs are measured on rank zero alone, where nothing could be gathered from the others.
        sharded = isinstance(trainer.strategy, FullySharded) and trainer.is_global_zero
        self._measured = copy.deepcopy(network).cpu() if sharded else network
        self._images: Tensor | None = None
        self._costs: dict[tuple[str, tuple[int, int], str], Cost] = {}
        self.thresholds: dict[str, float] = {}

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of what costs are given for: a nominal image, or a window of it."""
        height, width = self._data.image_size_for_cost
        inference = self._module.inference
        if inference.mode == "slide" and self._module.network.cost_of_window:
            height, width = min(height, inference.window[0]), min(width, inference.window[1])
        return height, width

    def meet_budgets(self, trainer: Trainer, settings: Sequence[Setting]) -> list[Setting]:
        """The settings, those of a budget at a new threshold; a collective if there are any.

        Raises:
            UserError: a budget is out of reach, and no training would be lost by it.
        """
        found: dict[str, float | str] = {}
        wanted = [setting for setting in settings if setting.name in self._budgets]
        if wanted and trainer.is_global_zero:
            found = self._find_thresholds(trainer, wanted)
        if wanted:
            found = trainer.strategy.broadcast(found)
        for name, threshold in found.items():
            if not isinstance(threshold, str):
                self.thresholds[name] = threshold
            elif trainer.sanity_checking or trainer.state.fn is not TrainerFn.FITTING:
                raise UserError(threshold)
            else:
                rank_zero_warn(f"{threshold}; the threshold stays as it was")
        return [
            at_threshold(setting, self.thresholds[setting.name])
            if setting.name in self.thresholds
            else setting
            for setting in settings
        ]

    def _find_thresholds(
        self, trainer: Trainer, settings: Iterable[Setting]
    ) -> dict[str, float | str]:
        """By the setting's name; a text says why there is none."""
        network, images = self._up_to_date(), self._read_images(trainer)
        found: dict[str, float | str] = {}
        for setting in settings:
            try:
                with trainer.precision_plugin.val_step_context():
                    budget = self._budgets[setting.name]
                    found[setting.name] = find_threshold(network, budget, images, setting)
            except UserError as error:
                found[setting.name] = str(error)
        return found

    def measure(self, trainer: Trainer, settings: Sequence[Setting]) -> None:
        """Measure settings, on rank zero; again where other weights cost something else."""
        device = self._module.device
        depending = any(setting.data_dependent for setting in settings)
        network = self._up_to_date() if depending else self._measured
        images = self._read_images(trainer) if depending else None
        for setting in settings:
            if self._key(setting) in self._costs and not setting.data_dependent:
                continue
            with trainer.precision_plugin.val_step_context():
                self._costs[self._key(setting)] = measure_cost(
                    network, self.image_size, setting, device, images=images, latency=self._latency
                )

    def row(self, setting: Setting) -> dict[str, Any]:
        """The cost of a measured setting as plain values; a spread only where it has one."""
        cost = self._costs[self._key(setting)]
        low, high = cost.latency_spread_ms or (None, None)
        return {
            "parameters": cost.parameters,
            "macs": cost.macs,
            "gmacs": cost.macs / 1e9,
            "gmacs_std": None if cost.macs_std is None else cost.macs_std / 1e9,
            "gmacs_worst": None if cost.macs_worst is None else cost.macs_worst / 1e9,
            "latency_ms": cost.latency_ms,
            "latency_low_ms": low,
            "latency_high_ms": high,
            "peak_memory_mib": cost.peak_memory_mib,
            "image_size": list(cost.image_size),
            "device": cost.device,
            "convention": cost.convention,
        }

    def _key(self, setting: Setting) -> tuple[str, tuple[int, int], str]:
        return setting.name, self.image_size, str(self._module.device)

    def _up_to_date(self) -> Network:
        """The network; where it is sharded, a whole copy of its present weights on its device."""
        network = self._module.network
        if self._measured is network:
            return network
        copied, present = (
            itertools.chain(each.parameters(), each.buffers()) for each in (self._measured, network)
        )
        for tensor, value in zip(copied, present, strict=True):
            tensor.data.copy_(value)
        self._measured.step = network.step
        return copy.deepcopy(self._measured).to(self._module.device)

    def _read_images(self, trainer: Trainer) -> Tensor:
        """(N, 3, H, W): the middles of validation images, the same ones every time."""
        if self._images is None:
            loader: Any = trainer.val_dataloaders
            there = len(loader.dataset)
            spread = np.linspace(0, there - 1, min(self._count, there)).round().astype(int)
            batches = (loader.collate_fn([loader.dataset[index]]) for index in spread.tolist())
            images = (self._data.on_after_batch_transfer(batch, 0)["image"] for batch in batches)
            self._images = torch.cat([cut_middle(image, self.image_size) for image in images])
        return self._images


def cut_middle(images: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, 3, h, w) -> (B, 3, *size): enlarged if need be, then cut on all sides alike."""
    height, width = images.shape[2:]
    enlarged = max(1.0, size[0] / height, size[1] / width)
    if enlarged > 1:
        height, width = math.ceil(height * enlarged), math.ceil(width * enlarged)
        images = F.interpolate(images, (height, width), mode="bilinear", align_corners=False)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    return images[:, :, top : top + size[0], left : left + size[1]]
