"""Weights into a network, and what came of it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from segtrain.errors import UserError
from segtrain.networks import Network
from segtrain.weights.keys import KeyTable, key_tables
from segtrain.weights.readers import read_weights

ENCODER = "encoder."

Shape = tuple[int, ...]


@dataclass(frozen=True)
class LoadReport:
    """What a file's parameters were to a network.

    Attributes:
        origin: whose names the file uses.
        matched: our names of the parameters and buffers that were loaded.
        missing: those that the file does not have.
        unexpected: names in the file that mean nothing to the network.
        reshaped: (our name, shape in the file, shape in the network) where the shapes differ.
    """

    origin: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[tuple[str, Shape, Shape], ...]

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} loaded"]
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_some(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected ({_some(self.unexpected)})")
        if self.reshaped:
            shapes = [f"{name} {file} for {network}" for name, file, network in self.reshaped]
            parts.append(f"{len(self.reshaped)} of another shape ({_some(shapes)})")
        return f"names of {self.origin}: {', '.join(parts)}"


def load_weights(
    network: Network, path: str | Path, *, strict: bool = True, backbone_only: bool = False
) -> LoadReport:
    """Load a file's parameters into a network; the file's names tell where it comes from.

    Args:
        network: left as it was if anything is raised.
        path: a safetensors file, or one written by ``torch.save``.
        strict: every parameter of the network must be in the file, and the reverse. If False,
            what fits is loaded and the report tells the rest.
        backbone_only: load the encoder alone, as from an ImageNet checkpoint; whatever else is in
            the file is left there.

    Raises:
        UserError: the file cannot be read safely, or does not fit.
    """
    path = Path(path)
    weights = read_weights(path)
    own = network.state_dict()
    table, named, unexpected = _our_names(weights, own)
    foreign = table is not None and table.network != type(network).__module__.rpartition(".")[2]
    if foreign or not named:
        raise UserError(
            f"weights {path}: {f'of {table.origin}' if table else 'of an unknown network'}, not "
            f"for {type(network).__name__}; its names begin with {_some(weights)}"
        )
    if backbone_only:
        own = {name: value for name, value in own.items() if name.startswith(ENCODER)}
        named = {name: value for name, value in named.items() if name.startswith(ENCODER)}
    shapes = {
        name: (tuple(named[name].shape), tuple(value.shape))
        for name, value in own.items()
        if name in named
    }
    report = LoadReport(
        origin=table.origin if table else "segtrain",
        matched=tuple(name for name, (file, ours) in shapes.items() if file == ours),
        missing=tuple(name for name in own if name not in named),
        unexpected=(*unexpected, *(name for name in named if name not in own)),
        reshaped=tuple((name, *both) for name, both in shapes.items() if both[0] != both[1]),
    )
    differs = report.missing or report.reshaped or (report.unexpected and not backbone_only)
    if strict and differs:
        raise UserError(f"weights {path}: {_misfit(network, report)}")
    network.load_state_dict({name: named[name] for name in report.matched}, strict=False)
    return report


def _our_names(
    weights: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> tuple[KeyTable | None, dict[str, Tensor], list[str]]:
    """The origin that knows most of a file's names, the weights by our names, unknown names.

    No table stands for our own names.
    """
    candidates: list[tuple[KeyTable | None, dict[str, Tensor], list[str]]] = [
        (
            None,
            {name: value for name, value in weights.items() if name in own},
            [name for name in weights if name not in own],
        ),
        *((table, *table.rename(weights)) for table in key_tables()),
    ]
    return max(candidates, key=lambda candidate: len(candidate[1]))


def _misfit(network: Network, report: LoadReport) -> str:
    """Why a file does not fit a network, and what to do where that is plain."""
    classes = {file[0] for _, file, _ in report.reshaped}
    if not (report.missing or report.unexpected) and len(classes) == 1:
        (found,) = classes
        if all(ours == (network.num_classes, *file[1:]) for _, file, ours in report.reshaped):
            return (
                f"for {found} classes, the network has {network.num_classes}: create it with "
                f"num_classes={found}, or load the encoder alone with backbone_only=True"
            )
    encoder_fits = not any(name.startswith(ENCODER) for name in report.missing)
    if encoder_fits and all(name.startswith(ENCODER) for name in report.matched):
        return "holds an encoder alone: load it with backbone_only=True"
    return f"does not fit {type(network).__name__}; {report}"


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
