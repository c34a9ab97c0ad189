"""Look for good hyper-parameters: many trainings, on as many machines as run this command.

python sweep.py sweep=learning_rate n_trials=50 experiment=edaformer_tiny_ade20k data.root=FOLDER
python sweep.py sweep=cost storage=postgresql://USER@HOST/DATABASE trainer.devices=8
python sweep.py sweep=learning_rate engine=wandb
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import train
from command_line import run_command
from segtrain.config import to_yaml
from segtrain.config.arguments import parse_arguments
from segtrain.config.files import list_choices, read_value
from segtrain.errors import UserError, did_you_mean
from tuning.sweep_file import Sweep, check_count, check_parameters, read_sweep

ENGINES = ("optuna", "wandb")
#: Arguments of this command; all others are of ``train.py``.
OWN = ("sweep", "n_trials", "storage", "engine", "name")
_USAGE = """\
Runs train.py many times, each time with other values of the sweep's parameters.

usage: sweep.py sweep=NAME [n_trials=N] [storage=URL] [name=STUDY] [engine=wandb] [key=value ...]

  sweep=learning_rate          a file of configs/sweep/
  n_trials=50                  over all workers; more of them go on with a study that is complete
  storage=postgresql://...     any database of Optuna's, or the path of a journal file on a disk
                               that all workers share (sweeps/STUDY/journal.log)
  name=STUDY                   of the study, and of its runs STUDY-0, STUDY-1, ... (NAME)
  engine=wandb                 a sweep of Weights & Biases instead: created where an account is
                               configured, printed where not
  key=value                    arguments of train.py that all trials have

The same command on another machine, or once more on this one, adds a worker; after a stop it goes
on with the study.

sweeps:
"""


def main(arguments: list[str]) -> int:
    """Run the command line; returns its status: 0, 2 for a user's slip, 128 + signal if stopped."""
    return run_command(run, arguments)


def run(arguments: list[str]) -> None:
    """Check everything, then work on the study or hand the sweep to Weights & Biases."""
    show, parsed = parse_arguments(arguments)
    if show is not None:
        print(_USAGE + "\n".join(describe(train.CONFIGS / "sweep")))
        return
    own = {a.key: a.text for a in parsed if a.key in OWN and not a.sign}
    given = [text for text, a in zip(arguments, parsed, strict=True) if a.key not in OWN or a.sign]
    if "sweep" not in own:
        choices = list_choices(train.CONFIGS, "sweep")
        raise UserError(f"sweep=NAME is needed: {did_you_mean('', choices)}")
    sweep = read_sweep(own["sweep"], train.CONFIGS)
    engine = own.get("engine", ENGINES[0])
    if engine not in ENGINES:
        raise UserError(f"'engine' cannot be '{engine}': {did_you_mean(engine, ENGINES)}")
    name = own.get("name", sweep.name)
    given = [*sweep.overrides, *given]
    config = check_parameters(sweep, given, train.CONFIGS)
    check_training(config)
    n_trials = count_trials(sweep, own)
    if engine == "wandb":
        to_wandb(sweep, name, n_trials, given, config)
        return
    group = [] if config["tracking"]["group"] else [f"tracking.group={name}"]

    from tuning.page import print_table
    from tuning.worker import Order, Worker

    folder = Path("sweeps") / name
    storage = own.get("storage", str(folder / "journal.log"))
    program = Path(train.__file__).resolve()
    order = Order(sweep, name, n_trials, storage, [*given, *group], program, folder)
    worker = Worker(order)
    worker.run()
    print_table(worker.study, sweep)
    print(f"{folder}/report.html shows all trials")


def describe(folder: Path) -> list[str]:
    """A line for each sweep: its name and the first line of its file."""
    files = sorted(folder.glob("*.yaml"))
    firsts = (file.read_text("utf-8").partition("\n")[0].removeprefix("# ") for file in files)
    return [f"  {file.stem:<28} {first}" for file, first in zip(files, firsts, strict=True)]


def count_trials(sweep: Sweep, own: dict[str, str]) -> int:
    """How many trials count, over all workers."""
    if "n_trials" in own:
        n_trials = read_value("n_trials", own["n_trials"])
        check_count("n_trials", n_trials)
        return int(n_trials)
    if sweep.n_trials is None:
        raise UserError(f"n_trials=NUMBER is needed: the sweep {sweep.name} has none of its own")
    return sweep.n_trials


def check_training(config: dict[str, Any]) -> None:
    """Raise UserError for what every trial would refuse, and for what no trial can be."""
    if config["task"] != "fit" or config["resume"] is not None:
        raise UserError("a sweep trains from the start: task= and resume= have no place in it")
    if config["trainer"]["num_nodes"] != 1:
        raise UserError("a trial runs on one machine: trainer.num_nodes=1, and a worker on each")
    train.check_files(config)


def to_wandb(
    sweep: Sweep, name: str, n_trials: int, arguments: list[str], config: dict[str, Any]
) -> None:
    """Create the sweep where an account is configured, print it where not."""
    from callbacks.tracking import wandb_mode
    from tuning.wandb_sweep import create_sweep, wandb_sweep

    validate_every = config["schedule"]["validate_every"]
    described = wandb_sweep(sweep, name, n_trials, arguments, validate_every)
    if wandb_mode(config["tracking"]["mode"]) == "online":
        print(create_sweep(described, config["tracking"]))
    else:
        print(to_yaml(described), end="")
        print("created by: wandb sweep FILE, with this text in FILE", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
