"""Optimisers over parameter groups, and the learning rate as a function of the optimiser step."""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from segtrain.errors import UserError, check_arguments, did_you_mean

#: Learning rate, weight decay and parameters of some that share them, as torch takes them.
Group = dict[str, Any]
#: Norm layers; timm's, such as LayerNorm2d and BatchNormAct2d, are kinds of them.
NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.modules.batchnorm._NormBase)


class GroupRule(TypedDict, total=False):
    """What differs for the parameters that a rule matches."""

    learning_rate_scale: float
    weight_decay_scale: float


@dataclass(frozen=True)
class Optimizer:
    """An optimiser with rules that give some parameters another learning rate or weight decay.

    A rule applies to parameters whose full name contains its key, where an underscore in the key
    also stands for a dot: ``stages_0_norm`` matches ``encoder.stages.0.norm.weight``. Longer keys
    are tried first, equally long ones in alphabetical order, and the first match wins, as in mmcv:
    a decoder's norm under rules for ``decoder`` and ``norm`` follows ``decoder`` alone.

    Attributes:
        norm_decay_scale, embedding_decay_scale: factors on the weight decay of what is in norm
            layers and in ``nn.Embedding``, whatever its name, beside a rule's; as in detectron2.
    """

    learning_rate: float
    weight_decay: float
    groups: Mapping[str, GroupRule] = field(default_factory=dict, kw_only=True)
    norm_decay_scale: float = field(default=1.0, kw_only=True)
    embedding_decay_scale: float = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        known = GroupRule.__annotations__
        for key, rule in self.groups.items():
            for name in rule:
                if name not in known:
                    raise UserError(
                        f"optimizer.groups.{key}.{name} is unknown: {did_you_mean(name, known)}"
                    )

    def rule_for(self, name: str) -> GroupRule:
        """The rule of the parameter with that full name; an empty one if none matches."""
        undotted = name.replace(".", "_")
        for key in sorted(sorted(self.groups), key=len, reverse=True):
            if key in name or key in undotted:
                return self.groups[key]
        return {}

    def build(self, network: nn.Module) -> torch.optim.Optimizer:
        """The optimiser, with one group for each pair of scales of the two.

        Not for each pair of products: a checkpoint's groups fit whatever the values are.
        """
        members: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in network.named_parameters():
            if parameter.requires_grad:
                rule = self.rule_for(name)
                owner = network.get_submodule(name.rpartition(".")[0])
                scales = (
                    rule.get("learning_rate_scale", 1.0),
                    rule.get("weight_decay_scale", 1.0) * self._decay_scale_of(owner),
                )
                members[scales].append(parameter)
        groups = [
            {
                "params": parameters,
                "lr": self.learning_rate * learning_rate_scale,
                "weight_decay": self.weight_decay * weight_decay_scale,
            }
            for (learning_rate_scale, weight_decay_scale), parameters in members.items()
        ]
        return self._over(groups)

    def _decay_scale_of(self, layer: nn.Module) -> float:
        if isinstance(layer, NORMS):
            return self.norm_decay_scale
        return self.embedding_decay_scale if isinstance(layer, nn.Embedding) else 1.0

    def _over(self, groups: list[Group]) -> torch.optim.Optimizer:
        raise NotImplementedError


@dataclass(frozen=True)
class AdamW(Optimizer):
    """Adam with decoupled weight decay."""

    betas: Sequence[float] = (0.9, 0.999)

    def _over(self, groups: list[Group]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(groups, betas=(self.betas[0], self.betas[1]))


@dataclass(frozen=True)
class SGD(Optimizer):
    """Stochastic gradient descent; the weight decay is part of the gradient."""

    momentum: float = 0.9

    def _over(self, groups: list[Group]) -> torch.optim.Optimizer:
        return torch.optim.SGD(groups, lr=self.learning_rate, momentum=self.momentum)


_OPTIMIZERS: dict[str, type[Optimizer]] = {"adamw": AdamW, "sgd": SGD}


def create_optimizer(name: str = "adamw", **arguments: Any) -> Optimizer:
    """The optimiser that a configuration describes.

    Args:
        name: ``adamw`` or ``sgd``.
        arguments: of that class.

    Raises:
        UserError: it has no such argument, or one is missing.
    """
    parameters = inspect.signature(_OPTIMIZERS[name]).parameters
    check_arguments(f"optimizer.name={name}", arguments, parameters)
    for parameter in parameters.values():
        if parameter.default is parameter.empty and parameter.name not in arguments:
            raise UserError(f"optimizer.name={name} needs optimizer.{parameter.name}")
    return _OPTIMIZERS[name](**arguments)


@dataclass(frozen=True)
class PolynomialSchedule:
    """Polynomial decay, times a linear warm-up; in optimiser steps.

    At step t of T the learning rate is base * (E + (1 - E) * (1 - (t - S) / (T - S))^power), the
    whole base up to step S. During the first W steps it is this times
    1 - (1 - t/W) * (1 - factor), as mmcv's linear warm-up over a poly schedule has it. PaddleSeg
    lets the decay begin where the warm-up ends, S = W.

    Args:
        steps: T.
        warmup_steps: W; 0 for no warm-up.
        warmup_factor: the share of the learning rate at step 0.
        power: exponent of the decay.
        end_factor: E, the share of the learning rate at step T.
        decay_start: S; the learning rate does not decay if it is not before T.
    """

    steps: int
    warmup_steps: int = 1500
    warmup_factor: float = 1e-6
    power: float = 1.0
    end_factor: float = 0.0
    decay_start: int = 0

    def __call__(self, step: int) -> float:
        """The factor on the base learning rate at a step."""
        begun = max(0, step - self.decay_start) / max(1, self.steps - self.decay_start)
        decay = self.end_factor + (1 - self.end_factor) * max(0.0, 1 - begun) ** self.power
        if step >= self.warmup_steps:
            return decay
        return decay * (1 - (1 - step / self.warmup_steps) * (1 - self.warmup_factor))

    def build(self, optimizer: torch.optim.Optimizer) -> LambdaLR:
        # A plain function: the state of an object would be stored in checkpoints, and on resuming
        # beat what the configuration says.
        return LambdaLR(optimizer, lambda step: self(step))
