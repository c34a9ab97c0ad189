"""Published networks as plain functions of their name."""

from __future__ import annotations

import fnmatch
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

from segtrain.errors import UserError, check_arguments, did_you_mean
from segtrain.networks.network import Network

Constructor = TypeVar("Constructor", bound=Callable[..., Network])

_constructors: dict[str, Callable[..., Network]] = {}


def register_network(constructor: Constructor) -> Constructor:
    """Make a function that builds a network available under the function's own name."""
    _constructors[constructor.__name__] = constructor
    return constructor


@functools.cache
def _import_network_modules() -> None:
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        importlib.import_module(f"segtrain.networks.{module.name}")


def list_networks(pattern: str = "*") -> list[str]:
    """Names of the networks that match a shell pattern, sorted."""
    _import_network_modules()
    return sorted(fnmatch.filter(_constructors, pattern))


def create_network(
    name: str,
    num_classes: int,
    training_setting: str | Mapping[str, Any] | None = None,
    **arguments: Any,
) -> Network:
    """Build a network with freshly initialised weights.

    Args:
        name: one of ``list_networks()``.
        num_classes: number of classes that the network scores.
        training_setting: name or plain values of the setting under which the weights are trained;
            the network's own choice if None.
        arguments: what the network's constructor takes; the defaults are the published values.

    Raises:
        UserError: there is no network of that name, or it takes no such argument or setting.
    """
    names = list_networks()
    if name not in names:
        raise UserError(f"there is no network '{name}': {did_you_mean(name, names)}")
    constructor = _constructors[name]
    accepted = [*_accepted_arguments(constructor), "training_setting"]
    check_arguments(f"network '{name}'", arguments, accepted)
    network = constructor(num_classes=num_classes, **arguments)
    if training_setting is not None:
        network.train_under(training_setting)
    return network


def _accepted_arguments(constructor: Callable[..., Network]) -> list[str]:
    """Arguments of a constructor; where it passes the rest on, those of the class it returns."""
    parameters = inspect.signature(constructor).parameters.values()
    accepted = [p.name for p in parameters if p.kind is not inspect.Parameter.VAR_KEYWORD]
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters):
        returned = inspect.get_annotations(constructor, eval_str=True)["return"]
        accepted += list(inspect.signature(returned).parameters)
    return sorted(set(accepted) - {"num_classes"})
