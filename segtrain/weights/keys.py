"""How another origin's parameter names become ours."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

#: What the names of a network's encoder begin with.
ENCODER = "encoder."


def no_arguments(_: Mapping[str, Any]) -> dict[str, Any]:
    """Tell nothing of what a network is created with."""
    return {}


@dataclass(frozen=True)
class KeyTable:
    """The parameter names of one origin, for one network.

    A module of this folder that defines a table is all that it takes to load that origin's files.

    Attributes:
        origin: where the names come from, in words, for reports and messages.
        network: module of ``segtrain.networks`` whose names the table leads to.
        modules: their module -> our module; ``*`` stands for an index, carried over in order. The
            parameter's own name (weight, running_mean, ...) is the same on both sides.
        unused: modules in their files that play no part in the network.
        encoder_prefix: what precedes the encoder's names in segmentation files and is absent from
            ImageNet files.
        convert: applied to a file's weights before they are renamed, where one parameter of theirs
            is several of ours or the reverse.
        read_arguments: from weights by our names, of the whole network or of the encoder, to what
            ``create_network`` builds their network with: ``name`` and the arguments that are not
            its defaults (``...`` for one whose value the weights do not tell). Empty if unclear.
        traceless: from weights of the whole network, by our names, to arguments, kept as the
            network's attributes, that weights do not tell, and the origin's values (``...`` for
            one that is unknown).
        recipe: where those values depend on the origin's recipe: from the same weights to the one
            that they fit, in words; empty if none. Reports tell it always.
        optional: what the names of those of our encoder modules begin with that may be absent, from
            the file or from the network, where an encoder alone is loaded to be trained on.
        exact: our names of weights that are read in another way where they are a 1x1 convolution's
            than where they are a linear layer's, so that neither stands for the other.
        model_type: the origin's name for the network in the ``config.json`` of a folder.
        read_config: from such a file's content to further traceless arguments. Raises UserError
            if it describes a network that ours cannot be.
    """

    origin: str
    network: str
    modules: Mapping[str, str]
    unused: tuple[str, ...] = ()
    encoder_prefix: str = ""
    convert: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] = dict
    read_arguments: Callable[[Mapping[str, Tensor]], dict[str, Any]] = no_arguments
    traceless: Callable[[Mapping[str, Tensor]], dict[str, Any]] = no_arguments
    recipe: Callable[[Mapping[str, Tensor]], str] | None = None
    optional: tuple[str, ...] = ()
    exact: tuple[str, ...] = ()
    model_type: str = ""
    read_config: Callable[[Mapping[str, Any]], dict[str, Any]] = no_arguments

    def rename(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The weights by our names, and the names that the table does not know.

        A file without the encoder's prefix is taken for an ImageNet file.
        """
        segmentation = any(key.startswith(self.encoder_prefix) for key in weights)
        prefix = "" if segmentation else self.encoder_prefix
        named, unknown = {}, []
        for key, value in self.convert(weights).items():
            module, _, parameter = f"{prefix}{key}".rpartition(".")
            ours = self._translate(module)
            if ours is not None:
                named[f"{ours}.{parameter}"] = value
            elif module not in self.unused:
                unknown.append(key)
        return named, unknown

    def encoder_gaps(self, named: Mapping[str, Tensor]) -> int:
        """How many of the table's encoder modules have no weight among those by our names."""
        modules = {name.rpartition(".")[0] for name in named}
        ours = {
            name
            for name in self.modules.values()
            if name.startswith(ENCODER) and not f"{name}.".startswith(self.optional)
        }
        return sum(not any(map(_pattern(name).fullmatch, modules)) for name in ours)

    def _translate(self, module: str) -> str | None:
        for pattern, template in self._patterns:
            match = pattern.fullmatch(module)
            if match:
                return template.format(*match.groups())
        return None

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return [
            (_pattern(theirs), ours.replace("*", "{}")) for theirs, ours in self.modules.items()
        ]


def _pattern(module: str) -> re.Pattern[str]:
    return re.compile(re.escape(module).replace(r"\*", r"(\d+)"))


@functools.cache
def key_tables() -> list[KeyTable]:
    """The tables that the modules of this folder define."""
    names = [module.name for module in pkgutil.iter_modules([str(Path(__file__).parent)])]
    modules = [importlib.import_module(f"segtrain.weights.{name}") for name in names]
    return [
        value
        for module in modules
        for value in vars(module).values()
        if isinstance(value, KeyTable)
    ]
