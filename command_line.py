"""What the commands beside train.py share: their arguments, and the network that these name."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from segtrain.config import compose, to_yaml
from segtrain.config.arguments import parse_arguments
from segtrain.config.files import read_value
from segtrain.errors import Stopped, UserError, did_you_mean

if TYPE_CHECKING:
    from segtrain.trained import TrainedNetwork

CONFIGS = Path(__file__).parent / "configs"
#: Of every command that opens a network.
NETWORK_OPTIONS = {
    "ckpt": "runs/NAME | FILE.ckpt | wandb:ENTITY/PROJECT/RUN_ID[:alias]: a trained network",
    "weights": "or FILE: somebody's weights, with model=NAME data=NAME or experiment=NAME",
    "setting": "a setting of the network, by name or values; its training setting if left out",
    "device": "cpu, cuda, cuda:1, ...; a GPU if there is one",
}
#: Options that are taken as they are typed: a path may look like a number or a YAML alias.
TEXTS = ("ckpt", "weights", "device", "input", "output")


@dataclass(frozen=True)
class Arguments:
    """What a command line gives.

    Attributes:
        values: of the command's own options.
        overrides: arguments for the configuration, as given.
    """

    values: dict[str, Any]
    overrides: list[str]


def run_command(command: Callable[[list[str]], None], arguments: list[str]) -> int:
    """Run a command, and say in a line what ended it early.

    Returns:
        Its status: 0; 2 for a user's slip; 130 if interrupted; that of `Stopped`.
    """
    try:
        command(arguments)
    except UserError as error:
        if os.environ.get("SEGTRAIN_DEBUG"):
            raise
        print(f"segtrain: error: {error}", file=sys.stderr)
        return 2
    except Stopped as end:
        if str(end):
            print(f"segtrain: {end}", file=sys.stderr)
        return end.status
    except KeyboardInterrupt as interrupt:
        print(f"segtrain: interrupted; {interrupt}".rstrip("; "), file=sys.stderr)
        return 130
    return 0


def read_arguments(
    arguments: list[str], usage: str, options: Mapping[str, str]
) -> Arguments | None:
    """Arguments of a command; None if help was asked for, and printed.

    Args:
        arguments: of the command line.
        usage: what the help begins with.
        options: name -> meaning of the command's own.

    Raises:
        UserError: an argument cannot be read, or is neither the command's nor of a section of the
            configuration.
    """
    show, parsed = parse_arguments(arguments)
    if show is not None:
        width = max(map(len, options)) + 2
        lines = (f"  {name + '=':<{width}} {meaning}" for name, meaning in options.items())
        print("\n".join([usage.strip(), "", *lines, "", "key=value  of train.py's configuration"]))
        return None
    values, overrides = {}, []
    for text, argument in zip(arguments, parsed, strict=True):
        section = argument.key.partition(".")[0]
        if argument.key in options and not argument.sign:
            is_text = argument.key in TEXTS
            values[argument.key] = (
                argument.text if is_text else read_value(argument.key, argument.text)
            )
        elif section in _sections():
            overrides.append(text)
        else:
            raise UserError(f"unknown argument '{text}': {did_you_mean(argument.key, options)}")
    return Arguments(values, overrides)


def _sections() -> set[str]:
    groups = {folder.name for folder in CONFIGS.iterdir() if folder.is_dir()}
    return {*groups, "inference", "config", "compile", "matmul_precision"}


def open_network(arguments: Arguments) -> TrainedNetwork:
    """The network that ``ckpt=``, or ``weights=`` with a configuration, names.

    Raises:
        UserError: there is none, it does not fit its weights, or has no such setting.
    """
    from segtrain import create_network, load_weights
    from segtrain.checkpoints import read_checkpoint
    from segtrain.classes import Classes
    from segtrain.inference import Inference
    from segtrain.trained import TrainedNetwork, make_ready, open_checkpoint, without_download

    weights, config = find_weights(arguments)
    setting, device = (arguments.values.get(key) for key in ("setting", "device"))
    content = read_checkpoint(weights, check=False) if "ckpt" in arguments.values else {}
    if "classes" in content and not arguments.overrides:
        return open_checkpoint(weights, content, setting, device)
    from data import create_data_module

    data = create_data_module(**config["data"])
    # Checkpoints of before have no names.
    classes = Classes.from_values(content["classes"]) if "classes" in content else data.classes
    if len(classes.names) != data.num_classes:
        raise UserError(
            f"{weights} tells {len(classes.names)} classes apart, "
            f"data={config['data']['name']} has {data.num_classes}"
        )
    model = without_download(config["model"])
    network = create_network(**model, num_classes=len(classes.names))
    for note in load_weights(network, weights).notes:
        print(f"segtrain: warning: {note}", file=sys.stderr)
    trained = TrainedNetwork(
        network=network,
        classes=classes,
        inference=Inference(**config["inference"], size_divisor=data.size_divisor),
        eval_scale=data.eval_scale,
        size_divisor=data.size_divisor,
        step=content.get("global_step"),
        config=config,
    )
    return make_ready(trained, setting, device)


def find_weights(arguments: Arguments) -> tuple[Path, dict[str, Any]]:
    """The file that ``ckpt=`` or ``weights=`` names, and the configuration that goes with it.

    Raises:
        UserError: neither or both are given, there is no such file, or it is no checkpoint.
    """
    ckpt, weights = arguments.values.get("ckpt"), arguments.values.get("weights")
    if (ckpt is None) == (weights is None):
        raise UserError("give ckpt=runs/NAME, or weights=FILE with model=NAME data=NAME")
    if weights is not None:
        if not Path(weights).exists():
            raise UserError(f"weights={weights}: there is no such file")
        chosen = {text.partition("=")[0].removeprefix("--") for text in arguments.overrides}
        if not chosen & {"experiment", "config"} and not {"model", "data"} <= chosen:
            raise UserError(f"weights={weights} needs model=NAME data=NAME, or experiment=NAME")
        return Path(weights), compose(arguments.overrides, CONFIGS).values
    from segtrain.checkpoints import find_checkpoint, read_checkpoint

    file = find_checkpoint(str(ckpt))
    config = read_checkpoint(file)["config"]
    if not arguments.overrides:
        return file, config
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "config.yaml"
        saved.write_text(to_yaml(config), encoding="utf-8")
        return file, compose([f"config={saved}", *arguments.overrides], CONFIGS).values
