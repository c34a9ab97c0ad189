"""The same sweep for Weights & Biases, whose agents start ``train.py`` by their default command."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from segtrain.config.arguments import parse_arguments
from segtrain.config.files import read_value
from segtrain.errors import UserError, first_line
from tuning.sweep_file import Parameter, Sweep


def wandb_sweep(
    sweep: Sweep, name: str, n_trials: int, arguments: list[str], validate_every: int
) -> dict[str, Any]:
    """The sweep configuration of Weights & Biases; what all trials have becomes constants.

    It knows one objective: of two, the first is optimised and the other is for its charts.

    Raises:
        UserError: an argument removes a key, which its commands cannot say.
    """
    parameters: dict[str, Any] = {}
    for argument in parse_arguments(arguments)[1]:
        if argument.sign == "~":
            raise UserError(f"engine=wandb cannot pass on ~{argument.key}")
        value = read_value(argument.key, argument.text)
        parameters[argument.sign + argument.key] = {"value": value}
    parameters |= {parameter.key: _parameter(parameter) for parameter in sweep.parameters}
    metric, direction = next(iter(sweep.objectives.items()))
    config: dict[str, Any] = {
        "name": name,
        "program": "train.py",
        # Grids need lists; nsga2 has no counterpart, and two objectives are best spread out.
        "method": "bayes" if sweep.sampler == "tpe" and len(sweep.objectives) == 1 else "random",
        "metric": {"name": metric, "goal": direction},
        "run_cap": n_trials,
        "parameters": parameters,
    }
    if sweep.pruning is not None:
        # It counts values of the metric, of which there is one for each validation.
        first = max(1, sweep.pruning["warmup_steps"] // validate_every)
        config["early_terminate"] = {"type": "hyperband", "min_iter": first}
    return config


def _parameter(parameter: Parameter) -> dict[str, Any]:
    if parameter.kind == "categorical":
        return {"values": list(parameter.choices)}
    low, high, step = parameter.low, parameter.high, parameter.step
    ends = {"min": low, "max": high}
    if parameter.kind == "int":
        if step is not None:
            return {"values": list(range(int(low), int(high) + 1, int(step)))}
        if parameter.log:
            return {"distribution": "q_log_uniform_values", "q": 1, **ends}
        return {"distribution": "int_uniform", **ends}
    if parameter.log:
        return {"distribution": "log_uniform_values", **ends}
    if step is not None:
        return {"distribution": "q_uniform", "q": step, **ends}
    return {"distribution": "uniform", **ends}


def create_sweep(config: Mapping[str, Any], tracking: Mapping[str, Any]) -> str:
    """Create the sweep on the server; returns the command that starts an agent.

    Args:
        config: of the sweep.
        tracking: ``project`` and ``entity`` to create it in.

    Raises:
        UserError: the server does not answer, or refuses it.
    """
    import wandb

    try:
        created = wandb.sweep(
            json.loads(json.dumps(config)), entity=tracking["entity"], project=tracking["project"]
        )
        entity = tracking["entity"] or wandb.Api().default_entity
    except (wandb.errors.Error, ValueError, OSError) as error:
        raise UserError(
            f"Weights & Biases did not create the sweep: {first_line(error)}"
        ) from error
    return f"wandb agent {entity}/{tracking['project']}/{created}"
