"""A training that is a trial of a sweep: it reports, may be pruned, and leaves its result."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.checkpoints import MONITOR
from callbacks.jsonl import CURVE, METRICS, read_rows
from segtrain.errors import first_line
from tuning.trial import RESULT, TRIAL, TrialAddress


class Trial(Callback):
    """Speaks for the run with the sweep that started it; created only where one did.

    At every validation rank zero reports the mIoU to the study, and all ranks follow its decision
    to go on or to stop. A training that came to its end leaves ``result.json``: the newest value
    of every logged metric, the costs at the training setting, the step and whether it was pruned.
    If the worker dies, the training is told to stop as by SIGTERM.
    """

    def __init__(self, run_folder: Path) -> None:
        self.run_folder = Path(run_folder)
        self.address = TrialAddress.from_text(os.environ[TRIAL])
        self._trial: Any = None
        self._pruned = False
        if self.address.lifeline is not None and "LOCAL_RANK" not in os.environ:
            threading.Thread(target=_follow, args=(self.address.lifeline,), daemon=True).start()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Open the study, where values are to be reported."""
        if trainer.is_global_zero and self.address.pruning is not None:
            self._trial = self.address.open_trial()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report, and stop all ranks if the study says so."""
        if trainer.sanity_checking or trainer.state.fn is not TrainerFn.FITTING:
            return
        if self.address.pruning is None:
            return
        last = trainer.global_step >= trainer.max_steps
        prune = trainer.is_global_zero and self._report(trainer) and not last
        if trainer.strategy.broadcast(prune):
            self._pruned = trainer.should_stop = True

    def _report(self, trainer: Trainer) -> bool:
        try:
            self._trial.report(float(trainer.callback_metrics[MONITOR]), trainer.global_step)
            return self._trial.should_prune()
        # Whatever the storage has: a training of hours does not end because a database restarts.
        except Exception as error:
            warning = f"segtrain: warning: the sweep's storage: {first_line(error)}"
            print(warning, file=sys.stderr)
            return False

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the result, unless the training was stopped from outside."""
        finished = trainer.global_step >= trainer.max_steps or self._pruned
        if trainer.is_global_zero and finished:
            result = _result(self.run_folder)
            result |= {"step": trainer.global_step, "pruned": self._pruned}
            temporary = self.run_folder / f".{RESULT}.writing"
            temporary.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            temporary.replace(self.run_folder / RESULT)


def _result(run_folder: Path) -> dict[str, Any]:
    """What was logged last under each name, and the costs without the name of a setting."""
    result: dict[str, Any] = {}
    for row in read_rows(run_folder / METRICS):
        result |= {name: value for name, value in row.items() if name not in ("step", "time")}
    for row in read_rows(run_folder / CURVE):
        if row["training_setting"]:
            costs = ("gmacs", "latency_ms", "parameters", "peak_memory_mib")
            result |= {f"cost/{cost}": row["cost"][cost] for cost in costs}
    return result


def _follow(lifeline: int) -> None:
    """Wait for the end of the worker: the other end of its pipe closes with it."""
    os.read(lifeline, 1)
    os.kill(os.getpid(), signal.SIGTERM)
