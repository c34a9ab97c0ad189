"""The threshold under which a network costs what a budget allows."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from segtrain.cost import measure_cost
from segtrain.errors import UserError
from segtrain.networks import Network
from segtrain.reduction import Setting

#: What a setting that is described by its mean cost has in the place of a reduction's fields.
BUDGET = "budget_gmacs"
#: Share of the budget by which the mean cost may miss it.
TOLERANCE = 0.01
#: Confidences crowd near 1: thresholds are told apart to about 1e-7.
HALVINGS = 24


def calibrate(
    network: Network,
    budget_gmacs: float,
    images: Tensor,
    setting: str | Setting | Mapping[str, Any] | None = None,
) -> Setting:
    """The setting whose threshold `find_threshold` chooses, called ``budget_40`` for 40 GMACs.

    Args:
        network: as `segtrain.measure_cost` takes it, with the weights that it is to run with.
        budget_gmacs: mean multiply-accumulates of an image, in units of 10^9.
        images: (N, 3, H, W), normalised; each counted alone.
        setting: whose threshold is chosen; the current one if None and it has a threshold, else
            the first that the network publishes with one.

    Raises:
        UserError: no threshold reaches the budget, or there is no setting with one.
    """
    base = placeholder(network, budget_gmacs, setting)
    return at_threshold(base, find_threshold(network, budget_gmacs, images, base))


def find_threshold(
    network: Network, budget_gmacs: float, images: Tensor, setting: Setting
) -> float:
    """The threshold of a setting by which images cost the budget on average, by bisection.

    It is within 1 % of the budget, or as near as the cost, which may go in steps, comes to it. The
    arguments are `calibrate`'s; the setting has a threshold.

    Raises:
        UserError: no threshold reaches the budget.
    """
    assert setting.threshold_range is not None

    def cost(threshold: float) -> float:
        chosen = setting.with_threshold(threshold)
        return measure_cost(network, setting=chosen, images=images, latency=False).macs / 1e9

    lowest, highest = setting.threshold_range
    costs = {threshold: cost(threshold) for threshold in (lowest, highest)}
    least, most = sorted(costs.values())
    if not (1 - TOLERANCE) * least <= budget_gmacs <= (1 + TOLERANCE) * most:
        raise UserError(
            f"a budget of {budget_gmacs:g} GMACs is out of reach of {type(network).__name__}: "
            f"thresholds from {lowest:g} to {highest:g} cost {least:.4g} to {most:.4g} GMACs on "
            f"average over {len(images)} images of {images.shape[2]}x{images.shape[3]}"
        )

    def miss(threshold: float) -> float:
        return abs(costs[threshold] - budget_gmacs)

    rising = costs[highest] > costs[lowest]
    for _ in range(HALVINGS):
        if min(map(miss, costs)) <= TOLERANCE * budget_gmacs:
            break
        middle = (lowest + highest) / 2
        costs[middle] = cost(middle)
        if (costs[middle] > budget_gmacs) == rising:
            highest = middle
        else:
            lowest = middle
    return min(costs, key=miss)


def at_threshold(setting: Setting, threshold: float) -> Setting:
    """The setting with another threshold and its own name."""
    return dataclasses.replace(setting.with_threshold(threshold), name=setting.name)


def placeholder(
    network: Network,
    budget_gmacs: float,
    setting: str | Setting | Mapping[str, Any] | None = None,
) -> Setting:
    """A setting by the name that the calibrated one will have; the arguments are `calibrate`'s.

    Raises:
        UserError: there is no setting with a threshold.
    """
    candidates = [network.setting, *network.settings.values()]
    if setting is not None:
        candidates = [network.resolve_setting(setting)]
    for candidate in candidates:
        if candidate.threshold_range is not None:
            return dataclasses.replace(candidate, name=f"budget_{budget_gmacs:g}")
    raise UserError(
        f"a budget of {budget_gmacs:g} GMACs is met by a threshold, and no setting of "
        f"{type(network).__name__} has one: {', '.join(each.name for each in candidates)}"
    )


def read_budget(chosen: object) -> float | None:
    """GMACs, where a configuration gives ``{budget_gmacs: 40}`` for a setting; otherwise None.

    Raises:
        UserError: it is no positive number, or something stands beside it.
    """
    if not isinstance(chosen, Mapping) or BUDGET not in chosen:
        return None
    budget = chosen[BUDGET]
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not budget > 0:
        raise UserError(f"{BUDGET} is a positive number, got {budget!r}")
    if len(chosen) > 1:
        others = ", ".join(str(key) for key in chosen if key != BUDGET)
        raise UserError(f"{BUDGET} takes the place of a setting's values, here {others}")
    return float(budget)
