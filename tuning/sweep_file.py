"""What a sweep looks for and where: one checked file of ``configs/sweep/``."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from segtrain.config import compose
from segtrain.config.arguments import parse_arguments
from segtrain.config.files import choice_file, read_file, shown
from segtrain.errors import UserError, check_arguments, did_you_mean

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

Direction = Literal["maximize", "minimize"]

KEYS = ("n_trials", "objectives", "sampler", "pruning", "overrides", "parameters")
SAMPLERS = ("tpe", "random", "nsga2")
#: Metrics of a run; with ``/<setting>`` where a run has one for each setting, else the training's.
OBJECTIVES = ("best/mIoU", "val/mIoU", "val/pixel_accuracy", "train/loss")
COSTS = ("cost/gmacs", "cost/latency_ms", "cost/parameters", "cost/peak_memory_mib")
#: What a run reports at every validation, and pruning therefore goes by.
PRUNABLE = ("best/mIoU", "val/mIoU")
_PARAMETER_KEYS = {
    "float": ("type", "low", "high", "log", "step"),
    "int": ("type", "low", "high", "log", "step"),
    "categorical": ("type", "choices"),
}


@dataclass(frozen=True)
class Parameter:
    """One searched argument of ``train.py``.

    Attributes:
        key: as on the command line; with a leading ``+`` where the key is added.
        kind: float, int or categorical.
        low, high, log, step: of a number; both ends belong to the range.
        choices: of a categorical parameter; plain values.
    """

    key: str
    kind: str
    low: float = 0
    high: float = 0
    log: bool = False
    step: float | None = None
    choices: tuple[Any, ...] = ()

    def distribution(self) -> BaseDistribution:
        """What Optuna samples; lists and mappings travel as the text of their argument."""
        from optuna.distributions import (
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.kind == "float":
            return FloatDistribution(self.low, self.high, log=self.log, step=self.step)
        if self.kind == "int":
            return IntDistribution(
                int(self.low), int(self.high), log=self.log, step=int(self.step or 1)
            )
        return CategoricalDistribution([_storable(choice) for choice in self.choices])

    def argument(self, value: Any) -> str:
        """The argument of ``train.py`` that sets a value."""
        return f"{self.key}={value if isinstance(value, str) else json.dumps(value)}"

    def extremes(self) -> list[Any]:
        """Values that stand for all of them where arguments are checked."""
        ends = [_storable(choice) for choice in self.choices] or [self.low, self.high]
        return [int(end) for end in ends] if self.kind == "int" else ends


@dataclass(frozen=True)
class Sweep:
    """A sweep as its file describes it.

    Attributes:
        name: of the file.
        n_trials: over all workers; None where the file leaves it to the command line.
        objectives: metric -> maximize or minimize; one or two.
        sampler: one of ``SAMPLERS``.
        pruning: ``startup_trials`` and ``warmup_steps`` of the median rule; None stops no trial.
        overrides: arguments of ``train.py`` that all trials have.
        parameters: what is searched.
    """

    name: str
    n_trials: int | None
    objectives: dict[str, Direction]
    sampler: str
    pruning: dict[str, int] | None
    overrides: list[str]
    parameters: list[Parameter]

    def space(self) -> dict[str, Any]:
        """What has to stay the same while a study goes on; plain values."""
        parameters = {p.key: str(p.distribution()) for p in self.parameters}
        objectives = [[*item] for item in self.objectives.items()]
        return {"objectives": objectives, "parameters": parameters}


def read_sweep(name: str, folder: Path) -> Sweep:
    """Read and check ``sweep/<name>.yaml`` in the folder of configurations.

    Raises:
        UserError: there is no such file, or something in it cannot be meant.
    """
    file = choice_file(folder, "sweep", name)
    values = read_file(file, dotted=True)
    try:
        return _sweep(name, values)
    except UserError as error:
        raise UserError(f"{shown(file)}: {error}") from None


def _sweep(name: str, values: Mapping[str, Any]) -> Sweep:
    check_arguments("a sweep", values, KEYS)
    n_trials = values.get("n_trials")
    if n_trials is not None:
        check_count("n_trials", n_trials)
    objectives = _mapping("objectives", values.get("objectives"))
    if len(objectives) not in (1, 2):
        raise UserError(f"'objectives' takes one or two metrics, got {len(objectives)}")
    for metric, direction in objectives.items():
        per_setting = any(metric.startswith(f"{m}/") for m in ("val/mIoU", *COSTS[:2]))
        if metric not in (*OBJECTIVES, *COSTS) and not per_setting:
            suggestion = did_you_mean(metric, (*OBJECTIVES, *COSTS))
            raise UserError(f"'objectives': no metric '{metric}': {suggestion}")
        _word(f"objectives.{metric}", direction, ("maximize", "minimize"))
    sampler = values.get("sampler", "tpe")
    _word("sampler", sampler, SAMPLERS)
    overrides = values.get("overrides", [])
    if not isinstance(overrides, list) or not all(isinstance(o, str) for o in overrides):
        raise UserError("'overrides' expects a list of arguments: [schedule.steps=1000]")
    parameters = _mapping("parameters", values.get("parameters"))
    if not parameters:
        raise UserError("'parameters' names nothing to search")
    return Sweep(
        name,
        n_trials,
        objectives,
        sampler,
        _pruning(values.get("pruning"), objectives),
        overrides,
        [_parameter(key, value) for key, value in parameters.items()],
    )


def check_count(key: str, value: Any) -> None:
    """Raise UserError unless the value is a whole number above 0."""
    if type(value) is not int or value < 1:
        raise UserError(f"'{key}' expects a whole number above 0, got {json.dumps(value)}")


def _pruning(value: Any, objectives: Mapping[str, Direction]) -> dict[str, int] | None:
    if value is None:
        return None
    pruning = _mapping("pruning", value)
    check_arguments("'pruning'", pruning, ("startup_trials", "warmup_steps"))
    if len(objectives) > 1 or not set(objectives) <= set(PRUNABLE):
        raise UserError(
            f"'pruning' needs one objective, {' or '.join(PRUNABLE)}: write pruning: null"
        )
    counts = {"startup_trials": 5, "warmup_steps": 0} | pruning
    for key, count in counts.items():
        if type(count) is not int or count < 0:
            raise UserError(f"'pruning.{key}' expects a whole number, got {json.dumps(count)}")
    return counts


def _parameter(key: str, value: Any) -> Parameter:
    where = f"parameters.{key}"
    given = _mapping(where, value)
    kind = str(given.get("type"))
    _word(f"{where}.type", kind, _PARAMETER_KEYS)
    check_arguments(f"'{where}'", given, _PARAMETER_KEYS[kind])
    if kind == "categorical":
        choices = given.get("choices")
        if not isinstance(choices, list) or not choices:
            raise UserError(f"'{where}.choices' expects a list of values")
        texts = [_storable(choice) for choice in choices]
        if any(a == b and type(a) is type(b) for a, b in itertools.combinations(texts, 2)):
            raise UserError(f"'{where}.choices' names a value twice")
        return Parameter(key, kind, choices=tuple(choices))
    types = (int,) if kind == "int" else (int, float)
    for end in ("low", "high", "step"):
        number = given.get(end)
        if type(number) not in types and not (end == "step" and number is None):
            expected = "a whole number" if kind == "int" else "a number"
            raise UserError(f"'{where}.{end}' expects {expected}, got {json.dumps(number)}")
    low, high, step, log = given["low"], given["high"], given.get("step"), given.get("log", False)
    if low >= high:
        raise UserError(f"'{where}': low={low} is not below high={high}")
    if type(log) is not bool:
        raise UserError(f"'{where}.log' expects true or false, got {json.dumps(log)}")
    if log and low <= 0:
        raise UserError(f"'{where}': a logarithmic range begins above 0, not at {low}")
    if log and step is not None:
        raise UserError(f"'{where}' takes either log or step, not both")
    if step is not None and not 0 < step <= high - low:
        raise UserError(f"'{where}': step={step} does not fit between {low} and {high}")
    return Parameter(key, kind, low, high, log, step)


def _storable(choice: Any) -> Any:
    """A choice as a storage keeps it."""
    return json.dumps(choice) if isinstance(choice, list | dict) else choice


def _mapping(key: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise UserError(f"'{key}' expects lines of 'key: value', got {json.dumps(value)}")
    return value


def _word(key: str, value: Any, words: Iterable[str]) -> None:
    if value not in words:
        raise UserError(f"'{key}' cannot be '{value}': {did_you_mean(str(value), words)}")


def check_parameters(sweep: Sweep, arguments: list[str], folder: Path) -> dict[str, Any]:
    """The configuration of ``train.py`` that trials start from, its parameters being possible.

    Args:
        sweep: whose parameters are set, each to its ends or to all its choices.
        arguments: what all trials have.
        folder: of the configurations.

    Raises:
        UserError: ``train.py`` has no such key, or it does not take such a value.
    """
    config = compose(arguments, folder).values
    given = {argument.key for argument in parse_arguments(arguments)[1]}
    for parameter in sweep.parameters:
        key = parse_arguments([f"{parameter.key}=0"])[1][0].key
        if key in given:
            raise UserError(f"'{key}' is searched by the sweep {sweep.name} and set by an argument")
        if key in ("name", "resume", "task", "config", "ckpt", "experiment"):
            raise UserError(f"'{key}' cannot be searched")
        for value in parameter.extremes():
            try:
                compose([*arguments, parameter.argument(value)], folder)
            except UserError as error:
                raise UserError(f"sweep {sweep.name}, {parameter.key}: {error}") from None
    return config
