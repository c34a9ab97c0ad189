"""Runs the command line in forks of a process that has imported everything once, and kills them.

Reads jobs from standard input, one JSON object per line, and answers each with the status of its
processes, negative for a signal. A job: ``arguments``, ``folder`` (to run in), ``output`` (a file
for what it prints), ``processes``, and, to be killed, ``kill``:

- ``{"rank": r, "step": n}``: when the batch of step n is about to be trained on;
- ``{"rank": r, "saving": n}``: when half of the n-th checkpoint is written;
- ``{"rank": r, "after": seconds}``: that long after the first batch came.

Each process writes the samples that it trains on into ``seen.txt``: step, epoch and index.
"""

import contextlib
import io
import json
import os
import signal
import socket
import sys
import time
import traceback

import torch
import torch.nn.parallel.distributed
from lightning.pytorch.utilities import rank_zero_only

import callbacks.resume  # noqa: F401
import data  # noqa: F401
import run_folder
import train
from segtrain import create_network, measure_cost
from segtrain.training import SegmentationModule


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def install(kill, started):
    """Make this process announce its first batch, and die when it is to."""
    training_step, save = SegmentationModule.training_step, torch.save
    saved = 0

    def step(self, batch, *arguments):
        os.write(started, b"!")
        if self.global_step == kill.get("step"):
            die()
        with open("seen.txt", "a") as file:  # noqa: PTH123
            for epoch, index in zip(batch["epoch"], batch["index"], strict=True):
                file.write(f"{self.global_step} {epoch} {index}\n")
        return training_step(self, batch, *arguments)

    def save_half(content, file, *arguments, **options):
        nonlocal saved
        saved += 1
        if saved == kill.get("saving"):
            whole = io.BytesIO()
            save(content, whole)
            half = whole.getvalue()[: len(whole.getvalue()) // 2]
            with contextlib.ExitStack() as stack:
                named = not hasattr(file, "write")
                target = stack.enter_context(open(file, "wb")) if named else file  # noqa: PTH123
                target.write(half)
                target.flush()
                die()
        return save(content, file, *arguments, **options)

    SegmentationModule.training_step = step
    torch.save = save_half


def run(job, rank, started, port):
    os.chdir(job["folder"])
    output = os.open(job["output"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    if job["processes"] > 1:
        # What Lightning gives to the processes that it starts.
        place = {"NODE_RANK": "0", "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job["processes"])}
        os.environ.update(place, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        for name in [text[5:] for text in job["arguments"] if text.startswith("name=")]:
            os.environ[run_folder.RUN_NAME] = name
        rank_zero_only.rank = rank
    kill = job.get("kill") or {}
    install(kill if kill.get("rank") == rank else {}, started)
    return train.main(job["arguments"])


def fork(job, rank, port):
    started, announce = os.pipe()
    pid = os.fork()
    if pid:
        os.close(announce)
        return pid, started
    status = 1
    try:
        status = run(job, rank, announce, port)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def answer(job):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    forks = [fork(job, rank, port) for rank in range(job["processes"])]
    kill = job.get("kill") or {}
    if "after" in kill:
        pid, started = forks[kill["rank"]]
        os.read(started, 1)
        time.sleep(kill["after"])
        os.kill(pid, signal.SIGKILL)
    elif kill:
        os.waitpid(forks[kill["rank"]][0], 0)
    if kill:  # the others would only notice after a while
        for rank, (pid, _) in enumerate(forks):
            if rank != kill["rank"]:
                os.kill(pid, signal.SIGKILL)
    statuses = []
    for pid, started in forks:
        with contextlib.suppress(ChildProcessError):
            statuses.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        os.close(started)
    return statuses


if __name__ == "__main__":
    # What is imported only where it is used would be imported in every fork.
    measure_cost(create_network("edaformer_nano", 2), (32, 32))
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)
