"""Loading in worker processes: how many, with how many threads, and how their errors arrive."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import cv2
import torch
from torch.utils.data import DataLoader

from segtrain.errors import UserError

_MOST_WORKERS = 8


class SegmentationLoader(DataLoader[dict[str, Any]]):
    """A DataLoader from whose workers a UserError arrives as it was raised.

    PyTorch re-raises it with the worker's traceback pasted into the message.
    """

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        try:
            yield from super().__iter__()
        except UserError as error:
            message = str(error).rpartition(f"{UserError.__name__}: ")[2].strip()
            raise UserError(message) from error


def automatic_workers(ranks_here: int) -> int:
    """Worker processes per rank: the cores shared out, one left to the rank itself."""
    # Where the system can tell, the cores that this process may use, not all that there are.
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return max(0, min(_MOST_WORKERS, cores // ranks_here - 1))


def prepare_worker(worker_id: int) -> None:
    """Load with one thread, and leave it to the rank to act on signals.

    OpenCV and PyTorch would otherwise start one thread per core in every worker. A scheduler
    signals every process of a job; a worker that ended would take its rank along before that could
    write a checkpoint.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # One that hangs can still be ended, by a second SIGTERM.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))
