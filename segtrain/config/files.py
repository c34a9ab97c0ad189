"""Reading YAML: files, and the values of the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError
from yaml import MarkedYAMLError, YAMLError

from segtrain.errors import UserError, did_you_mean


def read_file(file: Path, dotted: bool = False) -> dict[str, Any]:
    """The mapping in a YAML file, interpolations unresolved.

    Args:
        file: its path.
        dotted: whether keys may have dots in them, as those of a sweep's parameters have; in a
            configuration that is a slip.

    Raises:
        UserError: the file is not there, is not YAML or holds no mapping.
    """
    try:
        content = OmegaConf.load(file)
    except YAMLError as error:
        raise UserError(f"{shown(file)}: {_problem(error, with_place=True)}") from error
    except GrammarParseError as error:
        raise UserError(
            f"{shown(file)}: not a valid interpolation: {_first_line(error)}"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or _first_line(error)
        raise UserError(f"cannot read {shown(file)}: {reason}") from error
    if not isinstance(content, DictConfig):
        raise UserError(f"{shown(file)}: expected 'key: value' lines, found a list")
    values: dict[str, Any] = none_is_null(OmegaConf.to_container(content))
    if not dotted:
        _check_keys(values, file)
    return values


def read_value(key: str, text: str) -> Any:
    """The value that `key=text` gives, as a YAML file would: numbers, lists, mappings, null.

    Raises:
        UserError: the text is not YAML.
    """
    try:
        content = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]))
    except YAMLError as error:
        raise UserError(f"cannot read {key}={text!r}: {_problem(error)}") from error
    except GrammarParseError as error:
        raise UserError(f"cannot read {key}={text!r}: not a valid interpolation") from error
    assert isinstance(content, dict)
    return none_is_null(content["value"])


def _check_keys(values: dict[str, Any], file: Path) -> None:
    for key, value in values.items():
        if "." in str(key):
            raise UserError(f"{shown(file)}: '{key}' is no key: each part is a section of its own")
        if isinstance(value, dict):
            _check_keys(value, file)


def none_is_null(value: Any) -> Any:
    """Python's `None` as null: sweeps pass it, YAML reads it as a word."""
    if isinstance(value, dict):
        return {name: none_is_null(item) for name, item in value.items()}
    if isinstance(value, list):
        return [none_is_null(item) for item in value]
    return None if value == "None" else value


def list_choices(folder: Path, group: str) -> list[str]:
    """The names that `group=` takes."""
    return sorted(file.stem for file in (folder / group).glob("*.yaml"))


def choice_file(folder: Path, group: str, name: object, source: str = "") -> Path:
    """The file of one choice of a group; `source` starts the message of the error.

    Raises:
        UserError: the group has no such choice.
    """
    choices = list_choices(folder, group)
    if name not in choices:
        suggestion = did_you_mean(str(name), choices)
        raise UserError(f"{source}no {group} called '{name}': {suggestion}")
    return folder / group / f"{name}.yaml"


def shown(file: Path) -> str:
    """A path as messages show it: relative to the current folder where it lies below it."""
    return str(file.relative_to(Path.cwd()) if file.is_relative_to(Path.cwd()) else file)


def _problem(error: YAMLError, with_place: bool = False) -> str:
    if not isinstance(error, MarkedYAMLError) or error.problem_mark is None:
        return f"not valid YAML: {_first_line(error)}"
    place = f" in line {error.problem_mark.line + 1}" if with_place else ""
    return f"not valid YAML{place}: {error.problem}"


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0]
