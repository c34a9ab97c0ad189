"""Batches in shared memory that is there already: how workers hand them over.

PyTorch gives every tensor of every batch new shared memory, whose pages the kernel has to zero and
map in both processes, and a file descriptor that travels through a socket. Here a worker stacks
samples into one of a few slots, which it uses again as soon as nobody holds a tensor of the batch
that was there.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
import weakref
from collections.abc import Callable
from multiprocessing.reduction import DupFd
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import get_worker_info
from torch.utils.data._utils.collate import collate_tensor_fn, default_collate_fn_map

# Of addresses: pages that no batch has filled take no memory. Larger batches find no place.
_SLOT_BYTES = 2**28
# Where arrays start, and at the start of a slot the bytes whose first says that it is taken.
_ALIGNMENT = 64
_CLOSE_ON_EXEC = 1  # MFD_CLOEXEC

Batch = dict[str, Any]

_numbers = itertools.count()
_pools: weakref.WeakValueDictionary[int, SlotPool] = weakref.WeakValueDictionary()


class SlotPool:
    """Shared memory of one process that loads and of its workers; each worker fills its own slots.

    There are no locks: a worker alone marks a slot as taken and the process alone as free, in turn.
    The queue between them orders what is written before what is read, and reference counts order
    what is read before the mark.

    Args:
        workers: number of them.
        slots: of each worker.

    Raises:
        OSError: the system has no such memory.
    """

    def __init__(self, workers: int, slots: int) -> None:
        self._process = os.getpid()
        self.number = next(_numbers)
        self.slots = slots
        self._map(_create_file(workers * slots * _SLOT_BYTES))
        _pools[self.number] = self

    def _map(self, descriptor: int) -> None:
        # Has no name and ends with the last process that maps it, however that ends.
        self._descriptor = descriptor
        weakref.finalize(self, os.close, descriptor)
        pages = mmap.mmap(descriptor, 0)
        self._memory = np.frombuffer(pages, np.uint8).reshape(-1, _SLOT_BYTES)

    def __getstate__(self) -> dict[str, Any]:
        """For workers that are not forked."""
        attributes = {key: value for key, value in vars(self).items() if key != "_memory"}
        return attributes | {"_descriptor": DupFd(self._descriptor)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._map(state["_descriptor"].detach())

    def find_free(self, worker: int) -> int | None:
        """A slot of a worker that holds no batch in use."""
        first = worker * self.slots
        for slot in range(first, first + self.slots):
            if not self._memory[slot, 0]:
                return slot
        return None

    def slot(self, slot: int) -> np.ndarray:
        """(_SLOT_BYTES,) uint8, another object each time."""
        return self._memory[slot]

    def take(self, slot: int) -> None:
        """Mark as holding a batch, in the worker."""
        self._memory[slot, 0] = 1

    def open(self, slot: int, batch: Batch) -> Batch:
        """In the process that loads, tensors that are views of a slot.

        The slot is free when the last of them is gone.
        """
        memory = self.slot(slot)
        weakref.finalize(memory, self._release, slot).atexit = False
        return {
            key: value.of(memory) if isinstance(value, _Array) else value
            for key, value in batch.items()
        }

    def _release(self, slot: int) -> None:
        # Not by a process forked meanwhile: its parent may hold the batch still.
        if os.getpid() == self._process:
            self._memory[slot, 0] = 0


def _create_file(size: int) -> int:
    # Not /dev/shm, of which containers have 64 MB. Not by os.memfd_create, which is missing from
    # Pythons that were built for old systems.
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "memfd_create"):
        raise OSError("no memfd_create")
    descriptor = libc.memfd_create(b"segtrain-batches", _CLOSE_ON_EXEC)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    os.ftruncate(descriptor, size)
    return descriptor


class _Array(NamedTuple):
    """A tensor in a slot."""

    dtype: torch.dtype
    shape: torch.Size
    offset: int  # bytes

    def of(self, memory: np.ndarray) -> Tensor:
        count = self.shape.numel()
        flat = torch.frombuffer(memory, dtype=self.dtype, count=count, offset=self.offset)
        return flat.view(self.shape)


class _Filling:
    """A slot while tensors are placed in it."""

    def __init__(self, memory: np.ndarray) -> None:
        self._memory = memory
        self._used = _ALIGNMENT
        self._arrays: dict[int, _Array] = {}

    def place(self, dtype: torch.dtype, shape: torch.Size) -> Tensor | None:
        """An uninitialised tensor in the slot; None for one that is empty or does not fit."""
        end = self._used + shape.numel() * dtype.itemsize
        if end == self._used or end > len(self._memory):
            return None
        array = _Array(dtype, shape, self._used)
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        tensor = array.of(self._memory)
        self._arrays[tensor.data_ptr()] = array
        return tensor

    def stack(self, tensors: list[Tensor], *, collate_fn_map: Any = None) -> Tensor:
        """As `default_collate` stacks tensors, but here."""
        first = tensors[0]
        out = self.place(first.dtype, torch.Size((len(tensors), *first.shape)))
        if out is None:
            return collate_tensor_fn(tensors, collate_fn_map=collate_fn_map)
        return torch.stack(tensors, out=out)

    def put(self, tensor: Tensor) -> _Array | Tensor:
        """Where a tensor is in the slot, copied to it if need be; itself if it does not fit."""
        array = self._arrays.get(tensor.data_ptr()) if tensor.is_contiguous() else None
        if array is not None and (array.dtype, array.shape) == (tensor.dtype, tensor.shape):
            return array
        copy = self.place(tensor.dtype, tensor.shape)
        if copy is None:
            return tensor
        copy.copy_(tensor)
        return self._arrays[copy.data_ptr()]


class _SlotBatch:
    """A batch in a slot, which becomes the batch itself where it is unpickled."""

    def __init__(self, *parts: Any) -> None:
        self._parts = parts

    def __reduce__(self) -> tuple[Callable[..., Batch], tuple[Any, ...]]:
        return _open, self._parts


def _open(pool: int, slot: int, batch: Batch) -> Batch:
    return _pools[pool].open(slot, batch)


class CollateIntoSlots:
    """A `collate_fn` of workers whose batches travel in slots, or as ever where none is free.

    Args:
        collate_fn: makes a dictionary of samples by `default_collate`.
        pool: of these workers.
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Batch], pool: SlotPool) -> None:
        self.collate_fn = collate_fn
        self.pool = pool

    def __call__(self, samples: list[Any]) -> Batch | _SlotBatch:
        worker = get_worker_info()
        assert worker is not None
        slot = self.pool.find_free(worker.id)
        if slot is None:
            return self.collate_fn(samples)

        filling = _Filling(self.pool.slot(slot))
        default_collate_fn_map[Tensor] = filling.stack
        try:
            batch = self.collate_fn(samples)
        finally:
            default_collate_fn_map[Tensor] = collate_tensor_fn
        packed = {
            key: filling.put(value) if isinstance(value, Tensor) else value
            for key, value in batch.items()
        }
        self.pool.take(slot)
        return _SlotBatch(self.pool.number, slot, packed)
