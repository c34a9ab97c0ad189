"""Choices, files and overrides in their order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from segtrain.config.arguments import Argument, parse_arguments
from segtrain.config.composition import OPEN, Composition, flat
from segtrain.config.files import choice_file, read_file, read_value, shown
from segtrain.errors import UserError, did_you_mean

Choices = dict[str, list[str]]


@dataclass(frozen=True)
class ComposedConfig:
    """What the command line asks for.

    Attributes:
        values: the configuration, nested plain values, interpolations resolved.
        overrides: the arguments as given.
        choices: group -> names, for the groups chosen on the command line.
        show: what to print instead of running, if anything.
        resumed: the configuration of the run that goes on, as it was saved; None without `resume=`.
    """

    values: dict[str, Any]
    overrides: list[str]
    choices: Choices
    show: Literal["help", "cfg"] | None
    resumed: dict[str, Any] | None = None


def last_value(arguments: list[str], key: str) -> str | None:
    """The text that the command line gives to a key; None without one, or for null.

    Raises:
        UserError: an argument cannot be read.
    """
    texts = [argument.text for argument in parse_arguments(arguments)[1] if argument.key == key]
    return texts[-1] if texts and texts[-1] not in ("", "null", "None") else None


def compose(arguments: list[str], folder: Path, run: Path | None = None) -> ComposedConfig:
    """Composes the configuration that the arguments ask for, from the files in `folder`.

    Args:
        arguments: of the command line.
        folder: `configs/`.
        run: the folder of the run that `resume=` names, where its value is not that folder itself.

    Raises:
        UserError: a mistake in the arguments or in a file, as one line that names the key, the
            file where it is in one, and the nearest right name.
    """
    show, parsed = parse_arguments(arguments)
    main = read_file(folder / "config.yaml")
    choices: Choices = {group: _names(names) for group, names in main.pop("defaults").items()}

    chosen: Choices = {}
    overrides = []
    saved: Path | None = None
    resumed = _config_of_run(last_value(arguments, "resume"), run)
    for argument in parsed:
        if argument.sign and argument.key in ("config", "experiment"):
            raise UserError(f"write {argument.key}=value, without '{argument.sign}'")
        if argument.key == "config":
            saved = Path(argument.text)
        elif argument.key in (*choices, "experiment") and not _gives_values(argument):
            chosen[argument.key] = _chosen_names(argument)
        else:
            overrides.append(argument)
    if saved and resumed:
        raise UserError("config= does not go with resume=, which has its own")
    saved = saved or resumed
    if saved is None and not chosen.get("experiment"):
        saved = _config_beside_checkpoint(overrides)
    if saved and chosen.get("experiment"):
        raise UserError("experiment= does not go with config= or resume=, which have their own")

    experiments = _read_experiments(folder, chosen.get("experiment", []), choices)
    if not saved:
        choices |= {group: names for group, names in chosen.items() if group in choices}
    for group, names in choices.items():
        main[group] = _read_choices(folder, group, names)
    composition = Composition(main)
    if saved:
        _apply_saved(composition, saved)
        if not resumed:
            composition.override("name", None)  # what is repeated or scored is another run
        for group, names in chosen.items():
            composition.replace(group, _read_choices(folder, group, names))
    for source, values in experiments.items():
        for key, value in values.items():
            composition.override(key, value, source)
    for argument in overrides:
        _apply(composition, argument)
    before = read_file(resumed) if resumed else None
    return ComposedConfig(composition.resolve(), arguments, chosen, show, before)


def _names(choice: Any) -> list[str]:
    """The choices of a group as `defaults` writes them: a name or a list of names."""
    return [str(name) for name in (choice if isinstance(choice, list) else [choice])]


def _gives_values(argument: Argument) -> bool:
    """Whether `group=...` changes values of the group (a sweep's mapping) and selects nothing."""
    return bool(argument.sign) or isinstance(read_value(argument.key, argument.text), dict)


def _chosen_names(argument: Argument) -> list[str]:
    value = read_value(argument.key, argument.text)
    if value is None and argument.key == "experiment":
        return []
    return _names(value if isinstance(value, list) else argument.text)


def _config_of_run(folder: str | None, run: Path | None) -> Path | None:
    if folder is None:
        return None
    file = (run or Path(folder)) / "config.yaml"
    if not file.is_file():
        runs = [run.parent.name for run in Path(folder).parent.glob("*/config.yaml")]
        raise UserError(
            f"resume={folder}: no run there (no {file}): {did_you_mean(Path(folder).name, runs)}"
        )
    return file


def _config_beside_checkpoint(overrides: list[Argument]) -> Path | None:
    """The configuration of the run that `ckpt=` is a checkpoint of, if it is one of a run."""
    files = [Path(a.text).parent.parent / "config.yaml" for a in overrides if a.key == "ckpt"]
    return next((file for file in files if file.is_file()), None)


def _read_experiments(
    folder: Path, names: list[str], choices: Choices
) -> dict[str, dict[str, Any]]:
    """Values of the experiments by the start of messages about them; updates the choices."""
    experiments = {}
    for name in names:
        file = choice_file(folder, "experiment", name)
        source = f"{shown(file)}: "
        values = read_file(file)
        defaults = values.pop("defaults", {})
        if not isinstance(defaults, dict):
            raise UserError(f"{source}'defaults' expects lines of 'group: name'")
        for group, chosen in defaults.items():
            if group not in choices:
                raise UserError(f"{source}no group '{group}': {did_you_mean(group, choices)}")
            choices[group] = _names(chosen)
            for choice in choices[group]:
                choice_file(folder, group, choice, source)
        experiments[source] = values
    return experiments


def _read_choices(folder: Path, group: str, names: list[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in names:
        values |= read_file(choice_file(folder, group, name))
    return values


def _apply_saved(composition: Composition, file: Path) -> None:
    saved = read_file(file)
    there = flat(saved)
    for section in OPEN:
        if isinstance(there.get(section), dict):
            composition.replace(section, there[section])
    for key, value in saved.items():
        composition.override(key, value, f"{shown(file)}: ")
    missing = composition.examples.keys() - there.keys()
    if missing:
        first = min(missing, key=lambda key: (key.count("."), key))
        raise UserError(f"{shown(file)} has no '{first}', which every saved configuration has")


def _apply(composition: Composition, argument: Argument) -> None:
    key = argument.key
    if argument.sign == "~":
        composition.remove(key)
    elif argument.sign == "+":
        composition.add(key, read_value(key, argument.text))
    else:
        composition.override_text(key, argument.text)
