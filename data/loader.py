"""Loading in worker processes: how many, set up how, and how their batches and errors arrive."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import cv2
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.slots import CollateIntoSlots, SlotPool
from segtrain.errors import UserError

_MOST_WORKERS = 8
# Batches that a worker is ahead by: enough for one of slow images among many of fast ones.
_PREFETCH_FACTOR = 4
# Slots of a worker beside those it is ahead by. Lightning holds two batches and lets go of a third
# late, and with one worker they are all of it.
_SLOTS_IN_USE = 4
# Of glibc's mallopt: its parameters, and the highest threshold that it takes.
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_HIGHEST_MMAP_THRESHOLD = 32 * 2**20

_with_workers: weakref.WeakSet[Any] = weakref.WeakSet()


class SegmentationLoader(DataLoader[dict[str, Any]]):
    """A DataLoader whose workers hand batches over in slots, and errors as they were raised.

    Args:
        dataset: of samples that `collate_fn` makes dictionaries of.
        stock: PyTorch's way for batches, instead of slots of shared memory (`data.slots`) and
            copies to the device ahead of time.
        device: on which batches are used; to a CUDA device they are copied ahead of time.
        options: of DataLoader.
    """

    def __init__(
        self,
        dataset: Dataset[dict[str, Any]],
        *,
        stock: bool = False,
        device: torch.device | None = None,
        **options: Any,
    ) -> None:
        if options.get("num_workers"):
            options = {"prefetch_factor": _PREFETCH_FACTOR, **options}
        super().__init__(dataset, **options)
        self.stock = stock
        self.device = device

    def __iter__(self) -> Iterator[dict[str, Any]]:  # type: ignore[override]
        batches: Iterator[dict[str, Any]] = super().__iter__()
        if not self.stock and self.device is not None and self.device.type == "cuda":
            batches = copy_ahead(batches, self.device)
        try:
            yield from batches
        except UserError as error:
            # PyTorch raises it again with the worker's traceback pasted into the message.
            message = str(error).rpartition(f"{UserError.__name__}: ")[2].strip()
            raise UserError(message) from error
        except RuntimeError as error:
            if "unable to allocate shared memory" not in str(error):
                raise
            raise UserError(
                "/dev/shm is full, through which batches travel with data.loader=stock, and without"
                " it where many are kept: give the container more (docker run --shm-size=8g)"
            ) from error

    def _get_iterator(self) -> Any:
        # Slots are of these workers alone: what earlier ones had sent in vain may fill theirs.
        pool = self._create_pool() if self.num_workers and not self.stock else None
        collate_fn = self.collate_fn
        if pool is not None:
            self.collate_fn = CollateIntoSlots(collate_fn, pool)
        try:
            iterator = super()._get_iterator()
        finally:
            self.collate_fn = collate_fn
        if self.num_workers:
            _with_workers.add(iterator)
        return iterator

    def _create_pool(self) -> SlotPool | None:
        try:
            return SlotPool(self.num_workers, (self.prefetch_factor or 0) + _SLOTS_IN_USE)
        except OSError as error:
            rank_zero_warn(
                f"data.loader=shared_memory: this system gives none ({error}); batches travel as"
                " with data.loader=stock, which is slower and needs room in /dev/shm"
            )
            return None


@atexit.register
def _end_workers() -> None:
    """Where loaders are left at the end; else they get one SIGTERM, which workers ignore."""
    for iterator in list(_with_workers):
        iterator._shutdown_workers()


def copy_ahead(batches: Iterable[dict[str, Any]], device: torch.device) -> Iterator[dict[str, Any]]:
    """Copy batches to a CUDA device, each while the step before it computes.

    Args:
        batches: in pinned memory; from other memory each copy is waited for.
        device: to copy them to.
    """
    stream = torch.cuda.Stream(device)

    def copy(batch: dict[str, Any]) -> tuple[dict[str, Any], torch.cuda.Event]:
        with torch.cuda.stream(stream):
            copied = {
                key: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in batch.items()
            }
            return copied, stream.record_event()

    def use(batch: dict[str, Any], copied: torch.cuda.Event) -> dict[str, Any]:
        current = torch.cuda.current_stream(device)
        current.wait_event(copied)
        for value in batch.values():
            if isinstance(value, Tensor):
                # Its memory is the other stream's, which must not have it back before this one.
                value.record_stream(current)
        return batch

    ahead = None
    for batch in batches:
        following = copy(batch)
        if ahead is not None:
            yield use(*ahead)
        ahead = following
    if ahead is not None:
        yield use(*ahead)


def automatic_workers(ranks_here: int) -> int:
    """Worker processes per rank: the cores shared out, one left to the rank itself."""
    # Where the system can tell, the cores that this process may use, not all that there are.
    linux = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if linux else os.cpu_count() or 1
    return max(0, min(_MOST_WORKERS, cores // ranks_here - 1))


def prepare_worker(worker_id: int) -> None:
    """Load with one thread, keep freed memory, and leave it to the rank to act on signals.

    OpenCV and PyTorch would otherwise start one thread per core in every worker. A scheduler
    signals every process of a job; a worker that ended would take its rank along before that could
    write a checkpoint.
    """
    cv2.setNumThreads(0)
    torch.set_num_threads(1)
    keep_freed_memory()
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # One that hangs can still be ended, by a second SIGTERM.
    signal.signal(signal.SIGTERM, lambda number, frame: signal.signal(number, signal.SIG_DFL))


def keep_freed_memory() -> None:
    """Let glibc keep what is freed, for the arrays of the next image.

    It would give their pages back to the system, which then has to zero and map others. Another
    allocator is left as it is.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "gnu_get_libc_version"):
        libc.mallopt(_MMAP_THRESHOLD, _HIGHEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, 2**31 - 1)
