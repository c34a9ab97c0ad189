"""What the commands over all files of a data set share: arguments, processes and progress."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, TypeVar

import cv2

from command_line import CONFIGS, Arguments, read_arguments
from data import SegmentationData, create_data_module
from data.loader import automatic_workers
from progress import Progress
from segtrain.config import compose
from segtrain.errors import UserError

#: Of every such command.
OPTIONS = {"workers": "processes; one for each core if left out, 0: none beside this one"}
#: Files that a process takes at once.
_CHUNK = 8

Item = TypeVar("Item")
Result = TypeVar("Result")

_function: Callable[[Any], Any]  # of a worker process


def open_data_set(
    arguments: list[str], usage: str, options: Mapping[str, str]
) -> tuple[SegmentationData, Arguments] | None:
    """The data set that a command line names, and the command's own options.

    Args:
        arguments: of the command line: data=NAME, keys of `data`, and the command's own.
        usage: what the help begins with.
        options: name -> meaning of the command's own, beside `OPTIONS`.

    Returns:
        None if help was asked for, and printed.

    Raises:
        UserError: an argument is unknown or has no such value.
    """
    given = read_arguments(arguments, usage, {**options, **OPTIONS})
    if given is None:
        return None
    workers = given.values.setdefault("workers", automatic_workers(1) + 1)
    if type(workers) is not int or workers < 0:
        raise UserError(f"workers={workers}: give a number of processes, 0 for none")
    return create_data_module(**compose(given.overrides, CONFIGS).values["data"]), given


def for_every(
    function: Callable[[Item], Result], items: Sequence[Item], workers: int, unit: str
) -> Iterator[Result]:
    """The results of a function, in the order of the items, with progress.

    Args:
        function: is called in the processes; what it holds is handed to each of them once.
        items: small things, such as indices.
        workers: processes; 0 calls the function in this one.
        unit: of the items, in the plural.

    Raises:
        UserError: a process was killed.
    """
    with Progress(len(items), unit) as bar:
        if workers == 0:
            for item in items:
                yield function(item)
                bar.advance()
            return
        with ProcessPoolExecutor(workers, initializer=_start, initargs=(function,)) as pool:
            try:
                for result in pool.map(_call, items, chunksize=_CHUNK):
                    yield result
                    bar.advance()
            except BrokenProcessPool:
                raise UserError(
                    f"a process was killed after {bar.done} of {len(items)} {unit}, most likely"
                    " for memory: use fewer (workers=1)"
                ) from None


def _start(function: Callable[[Any], Any]) -> None:
    """Work with one thread, and leave an interrupt to the process that waits for the results."""
    global _function
    _function = function
    cv2.setNumThreads(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A pool's processes would outlive one that was killed, and wait for work without end."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _call(item: Any) -> Any:
    return _function(item)
