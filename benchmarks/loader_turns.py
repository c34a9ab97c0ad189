"""How both sides of the benchmark of loaders are measured. Needs no package at all."""

import contextlib
import gc
import multiprocessing
import os
import time
from collections import Counter
from unittest import mock


def measure_turn(create_loader, batch_size, seconds, stages=None):
    """Throughput of a loader that is made for it, from when its workers are under way.

    Args:
        create_loader: makes a DataLoader that does not end.
        batch_size: images of a batch.
        seconds: how long it is measured, by the clock on the wall.
        stages: what is timed in the workers, too.

    Returns:
        "images", "seconds", "cpu_seconds" of this process and its workers, and with `stages`
        "stages", CPU seconds of each for an image.
    """
    loader = create_loader()
    batches = iter(loader)
    at_once = max(1, loader.num_workers)  # batches that arrive in one go
    for _ in range(2 * at_once):
        next(batches)
    before = _readings(stages)
    images, end = 0, time.perf_counter() + seconds
    while not images or time.perf_counter() < end:
        for _ in range(at_once):
            next(batches)
        images += at_once * batch_size
    spent = _readings(stages)
    spent.subtract(before)
    del batches, loader
    gc.collect()  # ends the workers
    turn = {"images": images, **{key: spent.pop(key) for key in ("seconds", "cpu_seconds")}}
    if stages is not None:
        samples = spent.pop("samples")
        turn["stages"] = {stage: taken / samples for stage, taken in spent.items()}
    return turn


def _readings(stages):
    processes = [os.getpid(), *(worker.pid for worker in multiprocessing.active_children())]
    cpu_seconds = sum(map(_cpu_seconds, processes))
    readings = Counter(seconds=time.perf_counter(), cpu_seconds=cpu_seconds)
    return readings + stages.read() if stages is not None else readings


def _cpu_seconds(process):
    # What clock_getcpuclockid of the C library gives on Linux.
    return time.clock_gettime(~process << 3 | 2)


class Stages:
    """CPU time of the stages of a pipeline, in whatever processes are forked while it is a context.

    Args:
        load_sample: (class, name) of the method that loads a sample.
        functions: (owner, name, stage) of what belongs to a stage. Of what calls another one of
            them, the time of that is not counted again.
    """

    def __init__(self, load_sample, functions):
        self._functions = [(*load_sample, "rest"), *functions]
        self._stages = sorted({stage for _, _, stage in self._functions})
        self._totals = multiprocessing.Array("d", len(self._stages) + 1)  # and samples
        self._here = Counter()  # of the sample that this process loads
        self._inner = []  # of each call under way: seconds in calls that count themselves
        self._patches = contextlib.ExitStack()

    def __enter__(self):
        for owner, name, stage in self._functions:
            timed = self._time(getattr(owner, name), stage)
            self._patches.enter_context(mock.patch.object(owner, name, timed))
        return self

    def __exit__(self, *exception):
        self._patches.close()

    def read(self):
        """Seconds of each stage until now, and "samples"."""
        with self._totals:
            return Counter(dict(zip([*self._stages, "samples"], self._totals, strict=True)))

    def _time(self, function, stage):
        def timed(*arguments, **options):
            self._inner.append(0.0)
            start = time.process_time()
            try:
                return function(*arguments, **options)
            finally:
                taken = time.process_time() - start
                self._here[stage] += taken - self._inner.pop()
                if self._inner:
                    self._inner[-1] += taken
                else:
                    self._add_sample()

        return timed

    def _add_sample(self):
        with self._totals:
            for index, stage in enumerate(self._stages):
                self._totals[index] += self._here[stage]
            self._totals[-1] += 1
        self._here.clear()
