"""Weights into a network, and what came of it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from segtrain.errors import UserError
from segtrain.networks import Network
from segtrain.weights.keys import ENCODER, KeyTable, key_tables, no_arguments
from segtrain.weights.readers import read_config, read_weights

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
        notes: what may keep the network from computing exactly what the origin's does: values that
            no weights show, and parts that the file lacks.
    """

    origin: str
    matched: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    reshaped: tuple[tuple[str, Shape, Shape], ...]
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{len(self.matched)} loaded"]
        if self.missing:
            parts.append(f"{len(self.missing)} missing ({_some(self.missing)})")
        if self.unexpected:
            parts.append(f"{len(self.unexpected)} unexpected ({_some(self.unexpected)})")
        if self.reshaped:
            shapes = [f"{name} {file} for {network}" for name, file, network in self.reshaped]
            parts.append(f"{len(self.reshaped)} of another shape ({_some(shapes)})")
        return "; ".join([f"names of {self.origin}: {', '.join(parts)}", *self.notes])


def load_weights(
    network: Network, path: str | Path, *, strict: bool = True, backbone_only: bool = False
) -> LoadReport:
    """Load a file's parameters into a network; the file's names tell where it comes from.

    Args:
        network: left as it was if anything is raised.
        path: a safetensors file, one written by ``torch.save``, a ``.pdparams`` file of Paddle or
            a zip with one in it, a ``.pkl`` file of detectron2, or a Hugging Face folder.
        strict: every parameter of the network must be in the file, and the reverse. If False,
            what fits is loaded and the report tells the rest.
        backbone_only: load the encoder alone, as from an ImageNet checkpoint; what is in the file
            beside an encoder is left there.

    Raises:
        UserError: the file cannot be read safely, or does not fit.
    """
    path = Path(path)
    demanded = _read_folder_config(network, path) if path.is_dir() else {}
    weights = read_weights(path)
    table, named, unknown = _our_names(weights, network, backbone_only)
    if not named or (table and table.network != _module(network)):
        raise UserError(f"weights {path}: {_foreign(network, table, weights, named)}")
    own = network.state_dict()
    if backbone_only:
        own, named = _encoder_part(own), _encoder_part(named)
    exact = {name for table in _tables(network) for name in table.exact}
    named = {
        name: _as_layer(value, own[name]) if name in own and name not in exact else value
        for name, value in network.fit_weights(named).items()
        if name in own or not _is_count(name)  # which frozen batch norms do without
    }
    shapes = {
        name: (tuple(named[name].shape), tuple(value.shape))
        for name, value in own.items()
        if name in named
    }
    missing = tuple(name for name in own if name not in named and not _is_count(name))
    surplus = tuple(name for name in named if name not in own)
    optional = _optional(network, (*missing, *surplus)) if backbone_only else []
    report = LoadReport(
        origin=table.origin if table else "segtrain",
        matched=tuple(name for name, (file, ours) in shapes.items() if file == ours),
        missing=missing,
        unexpected=(*unknown, *surplus),
        reshaped=tuple((name, *both) for name, both in shapes.items() if both[0] != both[1]),
        notes=(*_notes(network, table, named), *_new_parts(missing, optional)),
    )
    misplaced = {*missing, *surplus, *(() if backbone_only else unknown)} - set(optional)
    if strict and (misplaced or report.reshaped):
        theirs, ours = _arguments(network, named)
        other = _another_network(network, table, named, demanded, theirs, ours)
        classes = _other_classes(network, report, theirs, ours)
        raise UserError(f"weights {path}: {_misfit(network, report, other, classes)}")
    for argument, value in demanded.items():
        if getattr(network, argument) != value:
            raise UserError(
                f"weights {path}: config.json asks for {argument}={value!r}, which the weights do "
                f"not show, the network has {getattr(network, argument)}: create it with "
                f"{_written({argument: value})}"
            )
    network.load_state_dict({name: named[name] for name in report.matched}, strict=False)
    return report


def _module(network: Network) -> str:
    """The module of ``segtrain.networks`` that defines a network."""
    return type(network).__module__.rpartition(".")[2]


def _tables(network: Network) -> list[KeyTable]:
    """The tables that lead to a network's names."""
    return [table for table in key_tables() if table.network == _module(network)]


def _encoder_part(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in weights.items() if name.startswith(ENCODER)}


def _is_count(name: str) -> bool:
    """Whether it is a batch norm's count of batches: nothing reads it, and Paddle has none."""
    return name.endswith(".num_batches_tracked")


def _optional(network: Network, names: Iterable[str]) -> list[str]:
    """Those of an encoder's names that may be absent, from the file or from the network."""
    optional = tuple(start for table in _tables(network) for start in table.optional)
    return [name for name in names if name.startswith(optional)]


def _new_parts(missing: Iterable[str], optional: Collection[str]) -> list[str]:
    new = [name for name in missing if name in optional]
    return [f"{_some(new)}: not in the file, begin with the network's values"] if new else []


def _as_layer(value: Tensor, own: Tensor) -> Tensor:
    """A 1x1 convolution's weight (o, i, 1, 1) as a linear layer's (o, i), or the reverse."""
    if own.ndim == 2 and value.shape[2:] == (1, 1):
        return value.flatten(1)
    if value.ndim == 2 and own.shape[2:] == (1, 1):
        return value[:, :, None, None]
    return value


def _our_names(
    weights: Mapping[str, Tensor], network: Network, backbone_only: bool
) -> tuple[KeyTable | None, dict[str, Tensor], list[str]]:
    """The origin that knows most of a file's names, the weights by our names, unknown names.

    Where the encoder alone is wanted, only its names count: that of another network may fit.
    Networks that share blocks share names: among origins that know equally many, it is the one
    whose encoder the file fills, and then one of this very network. No table stands for our own
    names; if nobody knows any name, no weight is returned.
    """

    def count(names: Iterable[str]) -> int:
        return sum(name.startswith(ENCODER) or not backbone_only for name in names)

    own = network.state_dict()
    known = count(name for name in weights if name in own)
    best: tuple[KeyTable | None, dict[str, Tensor], list[str]]
    best, rank = (None, dict(weights) if known else {}, []), (known, 0, True)
    for table in key_tables():
        named, unknown = table.rename(weights)
        if named and count(named) >= rank[0]:
            table_rank = (
                count(named),
                -table.encoder_gaps(named),
                table.network == _module(network),
            )
            if table_rank > rank:
                best, rank = (table, named, unknown), table_rank
    return best


def _read_folder_config(network: Network, folder: Path) -> dict[str, Any]:
    """Arguments that a network must have been created with, by a Hugging Face folder's config."""
    config = read_config(folder)
    tables = {table.model_type: table for table in key_tables() if table.model_type}
    table = tables.get(config["model_type"])
    if table is None:
        raise UserError(
            f"weights {folder}: config.json is of model_type {config['model_type']!r}, "
            f"segtrain reads: {', '.join(sorted(tables))}"
        )
    try:
        return table.read_config(config) if table.network == _module(network) else {}
    except UserError as error:
        raise UserError(f"weights {folder}: {error}") from error


def _notes(
    network: Network, table: KeyTable | None, named: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """What of a file's origin the weights do not show, and where the network differs there."""
    theirs = _traceless(table, named)
    if not table or not theirs:
        return ()
    own = {argument: getattr(network, argument) for argument in theirs}
    notes = [
        f"{table.origin} has {argument}={value}, the network {own[argument]}: "
        f"create it with {_written({argument: value})} for equal outputs"
        for argument, value in theirs.items()
        if value not in (..., own[argument])
    ]
    if table.recipe:
        recipe = table.recipe(named)
        taken = (
            f'taken for the recipe "{recipe}" of {table.origin} ({_written(theirs)})'
            if recipe
            else f"fits no recipe of {table.origin}, the network's own values are assumed"
        )
        untold = f"{' and '.join(theirs)} leave no trace in a file"
        notes.insert(0, f"{taken}: {untold}, the network has {_written(own)}")
    return tuple(notes)


def _traceless(table: KeyTable | None, named: Mapping[str, Tensor]) -> dict[str, Any]:
    """The origin's traceless arguments; none of an encoder alone, which is to be trained on."""
    return table.traceless(named) if table and len(_encoder_part(named)) < len(named) else {}


def _foreign(
    network: Network,
    table: KeyTable | None,
    weights: Mapping[str, Tensor],
    named: Mapping[str, Tensor],
) -> str:
    """Whose a file is that is not for a network, and what it is for where that is plain."""
    arguments = table.read_arguments(named) if table else {}
    # Networks have single names in common, as those of ResNet's layers.
    known = table and (arguments or not table.encoder_gaps(named))
    origin = f"of {table.origin}" if table and known else "of an unknown network"
    advice = f"; its names begin with {_some(weights)}"
    if arguments:
        call = _call({"num_classes": network.num_classes, **arguments, **_traceless(table, named)})
        advice = f": create the network with {call}"
    return f"{origin}, not for {type(network).__name__}{advice}"


def _arguments(
    network: Network, named: Mapping[str, Tensor]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a file's weights, by our names, and the network's tell of ``create_network``."""
    own = network.state_dict()
    if len(_encoder_part(named)) == len(named):
        own = _encoder_part(own)
    read = next((table.read_arguments for table in _tables(network)), no_arguments)
    return read(named), read(own)


def _other_classes(
    network: Network, report: LoadReport, theirs: Mapping[str, Any], ours: Mapping[str, Any]
) -> int | None:
    """The number of classes of a file that fits but for that number; None for any other."""
    if report.missing or report.unexpected:
        return None
    if any(file[1:] != own[1:] for _, file, own in report.reshaped):
        return None
    if theirs and ours:
        alike = {**theirs, "num_classes": None} == {**ours, "num_classes": None}
        return theirs.get("num_classes") if alike and theirs != ours else None
    lengths = {(file[:1], own[:1]) for _, file, own in report.reshaped}
    if len(lengths) != 1:
        return None
    ((found, own),) = lengths
    return found[0] if found and own == (network.num_classes,) else None


def _another_network(
    network: Network,
    table: KeyTable | None,
    named: Mapping[str, Tensor],
    demanded: Mapping[str, Any],
    theirs: dict[str, Any],
    ours: dict[str, Any],
) -> str:
    """How to create the network that weights are for, if they show that it is another one."""
    if not theirs or not ours or theirs == ours:
        return ""
    untold = _traceless(table, named) | {
        argument: value
        for argument, value in demanded.items()
        if argument in theirs or value != getattr(network, argument)
    }
    present = {
        argument: getattr(network, argument)
        for argument in (*untold, *ours)
        if argument in untold or ours[argument] is ...
    }
    classes = {"num_classes": network.num_classes}
    return (
        f"does not fit {_call(classes | ours | present)}: "
        f"create the network with {_call(classes | theirs | untold)}"
    )


def _misfit(network: Network, report: LoadReport, other: str, classes: int | None) -> str:
    """Why a file does not fit a network, and what to do where that is plain."""
    if classes is not None:
        return (
            f"for {classes} classes, the network has {network.num_classes}: create it with "
            f"num_classes={classes}, or load the encoder alone with backbone_only=True"
        )
    encoder = [
        name
        for name in (*report.missing, *report.unexpected, *(name for name, *_ in report.reshaped))
        if name.startswith(ENCODER)
    ]
    if other:
        alone = "" if encoder else ", or load the encoder alone with backbone_only=True"
        return f"of {report.origin}, {other}{alone}"
    if not encoder and all(name.startswith(ENCODER) for name in report.matched):
        return "holds an encoder alone: load it with backbone_only=True"
    return f"does not fit {type(network).__name__}; {report}"


def _call(arguments: dict[str, Any]) -> str:
    """``create_network(...)`` with ``name`` and the other arguments."""
    others = {argument: value for argument, value in arguments.items() if argument != "name"}
    return f'create_network("{arguments["name"]}", {_written(others)})'


def _written(arguments: Mapping[str, Any]) -> str:
    """Arguments as they stand in a call."""
    texts = {
        argument: f'"{value}"' if isinstance(value, str) else "..." if value is ... else str(value)
        for argument, value in arguments.items()
    }
    return ", ".join(f"{argument}={text}" for argument, text in texts.items())


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
