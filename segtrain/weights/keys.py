"""How another origin's parameter names become ours."""

from __future__ import annotations

import functools
import importlib
import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor


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
    """

    origin: str
    network: str
    modules: Mapping[str, str]
    unused: tuple[str, ...] = ()
    encoder_prefix: str = ""

    def rename(self, weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """The weights by our names, and the names that the table does not know.

        A file without the encoder's prefix is taken for an ImageNet file.
        """
        segmentation = any(key.startswith(self.encoder_prefix) for key in weights)
        prefix = "" if segmentation else self.encoder_prefix
        named, unknown = {}, []
        for key, value in weights.items():
            module, _, parameter = f"{prefix}{key}".rpartition(".")
            ours = self._translate(module)
            if ours is not None:
                named[f"{ours}.{parameter}"] = value
            elif module not in self.unused:
                unknown.append(key)
        return named, unknown

    def _translate(self, module: str) -> str | None:
        for pattern, template in self._patterns:
            match = pattern.fullmatch(module)
            if match:
                return template.format(*match.groups())
        return None

    @functools.cached_property
    def _patterns(self) -> list[tuple[re.Pattern[str], str]]:
        return [
            (re.compile(re.escape(theirs).replace(r"\*", r"(\d+)")), ours.replace("*", "{}"))
            for theirs, ours in self.modules.items()
        ]


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
