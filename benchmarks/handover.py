"""How batches get from where they are loaded to where a step trains on them.

python -m benchmarks.handover

First what a hand-over costs: one worker that has its samples ready sends them through slots of
shared memory and in PyTorch's way, in turns; CPU time of both processes. Then one process and one
thread that load crops of ADE20K-like files, each while the main thread sleeps and while it runs
Python, as a training step does that launches kernels. Ratios are medians over rounds.
"""

import multiprocessing
import statistics
import tempfile
import threading
import time
from pathlib import Path

import cv2
import numpy as np
import torch
from torch.utils.data import Dataset

from benchmarks.loader_files import draw_files
from benchmarks.loader_turns import measure_turn
from data import create_data_module
from data.loader import SegmentationLoader, prepare_worker

BATCH_SIZE = 16
ROUNDS = 5
SECONDS = 2  # of a turn


class ReadySamples(Dataset):
    """The same sample over and over."""

    def __init__(self, side):
        self.sample = {
            "image": np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8),
            "mask": np.zeros((side, side), np.uint8),
            "name": "sample",
        }

    def __len__(self):
        return 10**6

    def __getitem__(self, index):
        return {**self.sample, "index": index}


def measure_handover(side, stock):
    """CPU seconds of a sample."""

    def create():
        return SegmentationLoader(
            ReadySamples(side),
            stock=stock,
            batch_size=BATCH_SIZE,
            num_workers=1,
            worker_init_fn=prepare_worker,
        )

    turn = measure_turn(create, BATCH_SIZE, SECONDS)
    return turn["cpu_seconds"] / turn["images"]


def load(images, keys, count, stop):
    """Count loaded samples until it is to stop."""
    while not stop.is_set():
        for key in next(keys):
            images[key]
            count.value += 1


def measure_loading(data, kind, is_busy):
    """Samples a second of one process or thread."""
    loader = data.train_dataloader()
    count = multiprocessing.Value("i", 0, lock=False)
    if kind == "process":
        stop, start = multiprocessing.Event(), multiprocessing.Process
    else:
        stop, start = threading.Event(), threading.Thread
    arguments = (loader.dataset, iter(loader.batch_sampler), count, stop)
    loading = start(target=load, args=arguments)
    loading.start()
    time.sleep(0.5)
    before, began = count.value, time.perf_counter()
    while time.perf_counter() < began + SECONDS:
        if is_busy:
            sum(range(1000))
        else:
            time.sleep(0.01)
    rate = (count.value - before) / (time.perf_counter() - began)
    stop.set()
    loading.join()
    return rate


def main():
    torch.set_num_threads(1)
    cv2.setNumThreads(0)
    for side in (512, 1024):
        ratios = [
            measure_handover(side, True) / measure_handover(side, False) for _ in range(ROUNDS)
        ]
        print(
            f"{side}x{side}: PyTorch's way takes {statistics.median(ratios):.1f} times the CPU time"
            f" of slots ({min(ratios):.1f} to {max(ratios):.1f})"
        )
    with tempfile.TemporaryDirectory() as folder:
        draw_files("ade20k", Path(folder), 60)
        data = create_data_module("ade20k", root=folder, workers=0, batch_size=BATCH_SIZE)
        for is_busy in (False, True):
            ratios = [
                measure_loading(data, "process", is_busy) / measure_loading(data, "thread", is_busy)
                for _ in range(ROUNDS)
            ]
            print(
                f"main thread {'in Python' if is_busy else 'asleep'}: a process loads"
                f" {statistics.median(ratios):.2f} times as many images as a thread"
                f" ({min(ratios):.2f} to {max(ratios):.2f})"
            )


if __name__ == "__main__":
    main()
