"""A worker: takes trials from a study and runs each as a ``train.py`` process of its own."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from run_folder import RUN_NAME
from segtrain.errors import Stopped, UserError
from tuning import study as studies
from tuning.page import write_report
from tuning.storage import reported
from tuning.sweep_file import Sweep
from tuning.trial import FAILURE, RESULT, TRIAL, TrialAddress

if TYPE_CHECKING:
    import optuna

#: Trainings in a row that fail before a worker takes the cause to be the same for all.
MAX_FAILURES = 3
#: Seconds between two looks at the study while other workers run its last trials.
LOOK = 5
#: Seconds in which signals are one: a launcher passes on what the terminal has sent as well.
TOGETHER = 1
#: What a trial does not inherit: it is one training of this machine, whoever started the worker.
FOREIGN = ("SLURM_", "WANDB_RUN_ID", "WANDB_SWEEP_ID", RUN_NAME)
RANKS = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "NODE_RANK"),
    *("MASTER_ADDR", "MASTER_PORT"),
)


@dataclass(frozen=True)
class Order:
    """What a worker was asked to do.

    Attributes:
        sweep: the sweep.
        name: of the study; its runs are ``<name>-<number>``.
        n_trials: over all workers.
        storage: a URL, or the path of a journal file.
        arguments: of ``train.py``, the same for all trials.
        program: ``train.py``.
        folder: of the sweep: the report and what trials print.
    """

    sweep: Sweep
    name: str
    n_trials: int
    storage: str
    arguments: list[str]
    program: Path
    folder: Path


class Worker:
    """Runs trials until none is left to run.

    The first SIGINT, SIGTERM or SIGUSR1 asks the training to stop with a checkpoint and gives its
    trial back; the second kills it.
    """

    def __init__(self, order: Order) -> None:
        self.order = order
        self.study = studies.open_study(order.sweep, order.name, order.storage)
        self._lives = studies.Lives()
        self._signals: list[int] = []
        self._signalled = 0.0
        self._training: subprocess.Popen[bytes] | None = None
        self._lost = False

    def run(self) -> None:
        """Run trials until ``n_trials`` have ended, whoever ran them.

        Raises:
            Stopped: by a signal; the trial waits for another worker.
            UserError: the storage or every training fails.
        """
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)
        failures: list[str] = []
        waiting = False
        while True:
            with reported(self.order.storage):
                studies.retry_lost(self.study, self._lives, self.order.n_trials)
                trial = studies.claim(self.study, self.order.sweep, self.order.n_trials)
                trials = self.study.get_trials(deepcopy=False)
            if trial is not None:
                waiting = False
                failure = self._run_trial(trial)
                failures = [*failures, failure] if failure else []
                with reported(self.order.storage):
                    write_report(self.study, self.order.sweep, self.order.folder)
                if len(failures) == MAX_FAILURES:
                    raise UserError(f"{MAX_FAILURES} trials in a row failed, at last: {failure}")
            else:
                running = [t for t in studies.counting(trials) if studies.is_open(t)]
                if not running:
                    break
                if not waiting:
                    numbers = ", ".join(str(t.number) for t in running)
                    print(f"waiting for other workers' trials ({numbers}); Ctrl-C leaves them")
                waiting = True
            self._pause(0 if trial is not None else LOOK)
        with reported(self.order.storage):
            write_report(self.study, self.order.sweep, self.order.folder)

    def _pause(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while not self._signals and time.monotonic() < end:
            time.sleep(0.1)
        if self._signals:
            raise _stopped(self._signals[0])

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._signals and time.monotonic() - self._signalled < TOGETHER:
            return
        self._signalled = time.monotonic()
        self._signals.append(number)
        if self._training is not None:
            self._stop(kill=len(self._signals) > 1)
        elif len(self._signals) > 1:
            raise _stopped(number)

    def _stop(self, kill: bool) -> None:
        if self._training is not None and self._training.poll() is None:
            # Rank zero alone is asked, and sees to the others; the loaders must not be stopped.
            if kill:
                os.killpg(self._training.pid, signal.SIGKILL)
            else:
                self._training.terminate()

    def _run_trial(self, trial: optuna.Trial) -> str | None:
        """Run a trial and say in the study how it ended; returns why its training failed."""
        import optuna
        from optuna.trial import TrialState

        name = f"{self.order.name}-{trial.number}"
        values = ", ".join(f"{key}={_short(value)}" for key, value in trial.params.items())
        folder = Path("runs") / name
        resumes = self._take_over(trial, folder)
        again = f" (again {trial.user_attrs[studies.RETRY_OF]})" if _is_retry(trial) else ""
        print(f"trial {trial.number}{again}: {values}", flush=True)
        status = 0 if (folder / RESULT).exists() else self._train(trial, folder, resumes)
        if self._lost:
            print(f"trial {trial.number}: another worker took it over while this one slept")
            self._lost = False
            return None
        failure = None
        with reported(self.order.storage):
            losses = trial.user_attrs.get(studies.LOSSES, 0)
            try:
                if self._signals and status != 0:
                    studies.give_back(self.study, trial, losses)
                    studies.retry_lost(self.study, self._lives, self.order.n_trials)
                    print(f"trial {trial.number}: given back")
                elif status < 0 or status > 128:  # by a signal
                    number = -status if status < 0 else status - 128
                    studies.give_back(self.study, trial, losses + 1)
                    print(f"trial {trial.number}: its training was stopped by signal {number}")
                    if losses + 1 == studies.MAX_LOSSES:
                        failure = f"{name} was stopped by signal {number} each time"
                else:
                    failure = self._tell(trial, folder, status)
            except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
                state = self.study.trials[trial.number].state
                if state == TrialState.RUNNING:
                    raise
                print(f"trial {trial.number}: another worker took it over")
        return failure

    def _tell(self, trial: optuna.Trial, folder: Path, status: int) -> str | None:
        from optuna.trial import TrialState

        if status != 0:
            failure = _last_words(self._log(folder.name))
        elif not (folder / RESULT).exists():
            failure = f"{folder} has no {RESULT}"
        else:
            result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
            values = {metric: result.get(metric) for metric in self.order.sweep.objectives}
            shown = ", ".join(f"{metric} {_short(value)}" for metric, value in values.items())
            missing = [metric for metric, value in values.items() if value is None]
            if result["pruned"] or not missing:
                if result["pruned"]:
                    self.study.tell(trial, state=TrialState.PRUNED)
                    shown = f"pruned at step {result['step']}, {shown}"
                else:
                    self.study.tell(trial, list(values.values()))
                print(f"trial {trial.number}: {shown}", flush=True)
                return None
            failure = f"{folder} has no value of {missing[0]}"
        trial.set_user_attr(FAILURE, failure)
        self.study.tell(trial, state=TrialState.FAIL)
        print(f"trial {trial.number}: failed: {failure}", flush=True)
        return failure

    def _take_over(self, trial: optuna.Trial, folder: Path) -> bool:
        """Move the run of a lost attempt here; whether there is something to go on with.

        Moved, and not read where it is: should its training still live, it can do no harm.
        """
        if not _is_retry(trial):
            return False
        old = folder.with_name(f"{self.order.name}-{trial.user_attrs[studies.RETRY_OF]}")
        if old.exists() and not folder.exists():
            old.rename(folder)
        begun = (folder / "config.yaml").exists()
        if begun and any((folder / "checkpoints").glob("*.ckpt")):
            return True
        if folder.exists():
            shutil.rmtree(folder)
        return False

    def _train(self, trial: optuna.Trial, folder: Path, resumes: bool) -> int:
        """Run the training to its end; returns its exit status, as ``Popen`` gives it."""
        parameters = [p.argument(trial.params[p.key]) for p in self.order.sweep.parameters]
        new = [*self.order.arguments, *parameters, f"name={folder.name}"]
        arguments = [f"resume={folder}"] if resumes else new
        log = self._log(folder.name)
        log.parent.mkdir(parents=True, exist_ok=True)
        child_end, own_end = os.pipe()
        address = TrialAddress(
            self.order.name,
            self.order.storage,
            trial._trial_id,
            self.order.sweep.pruning,
            child_end,
        )
        alive = threading.Event()
        pulse = threading.Thread(target=self._beat, args=(trial, alive), daemon=True)
        try:
            with log.open("ab") as output:
                self._training = subprocess.Popen(
                    [sys.executable, str(self.order.program), *arguments],
                    env=_environment(os.environ) | {TRIAL: address.text()},
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    pass_fds=[child_end],
                    # Ctrl-C on a terminal reaches the worker alone, which passes it on.
                    start_new_session=True,
                )
            pulse.start()
            if self._signals:  # one came before there was a training to stop
                self._stop(kill=False)
            status = self._training.wait()
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self._training.pid, signal.SIGKILL)  # ranks that it may have left
            return status
        finally:
            self._training = None
            alive.set()
            os.close(child_end)
            os.close(own_end)
            if pulse.is_alive():
                pulse.join()

    def _beat(self, trial: optuna.Trial, over: threading.Event) -> None:
        import optuna

        beat = 0
        while not over.wait(studies.BEAT):
            beat += 1
            try:
                trial.set_user_attr(studies.WORKER, studies.sign_of_life(beat))
            except optuna.exceptions.UpdateFinishedTrialError:
                self._lost = True
                self._stop(kill=True)
                return
            except Exception:
                continue  # a storage that comes back in time has missed nothing

    def _log(self, name: str) -> Path:
        return self.order.folder / "logs" / f"{name}.log"


def _stopped(number: int) -> Stopped:
    return Stopped("stopped; the same command goes on", 128 + number)


def _is_retry(trial: optuna.Trial) -> bool:
    return studies.RETRY_OF in trial.user_attrs


def _environment(environment: Mapping[str, str]) -> dict[str, str]:
    return {
        key: value
        for key, value in environment.items()
        if not key.startswith(FOREIGN) and key not in RANKS
    }


def _last_words(log: Path) -> str:
    """What a failed training has to say: its error, or the last line that it printed."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if line.startswith("segtrain: error: ")]
    last = (errors or lines or ["it printed nothing"])[-1].removeprefix("segtrain: error: ")
    return f"{last} ({log})"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
