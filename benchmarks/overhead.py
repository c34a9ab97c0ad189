"""What a training step costs under train.py beyond a bare Lightning loop with the same step.

python -m benchmarks.overhead
python -m benchmarks.overhead --batch 16 --crop 512 --steps 400    # on a GPU

One side is the whole command line: W&B offline, metrics, the cost curve, pictures, checkpoints,
report and progress. The other is a Trainer without logger and callbacks around the same network,
criterion, optimiser, schedule and data. Each is a process; they run step by step in turn, so that
what else the machine does meets both, and are compared round by round. Neither validates while the
clock runs. Time is given by the clock on the wall and, where a CPU computes, by what the process
itself used.
"""

import argparse
import contextlib
import multiprocessing
import os
import statistics
import tempfile
import time
import warnings
from pathlib import Path

import torch
from lightning import LightningModule, Trainer

import train
from data import create_data_module
from segtrain import create_network
from segtrain.training import (
    CrossEntropy,
    PolynomialSchedule,
    SegmentationModule,
    create_optimizer,
)

CONFIGS = Path(train.__file__).parent / "configs"
WARM_UP = 20  # steps: the first row of metrics costs W&B a tenth of a second, once
ROUND = 20  # steps between two updates of the progress; metrics are logged as often


class Turns:
    """One of two loops, each in a process of its own, that take a step each in turn.

    Attributes:
        times: seconds of each step, by the clock on the wall and of the process.
    """

    def __init__(self, other):
        self.other = other
        self.times = []
        self.started = now()

    def step_begins(self):
        """Ends the turn; the step before ends here, with all that a loop does between two steps."""
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.times.append([end - start for end, start in zip(now(), self.started, strict=True)])
        self.other.send(None)
        self.wait()

    def wait(self):
        with contextlib.suppress(EOFError):  # the other has ended
            self.other.recv()
        self.started = now()


def now():
    return time.perf_counter(), time.process_time()


class Bare(LightningModule):
    """The same step and nothing else."""

    def __init__(self, config, num_classes, turns):
        super().__init__()
        self.network = create_network(**config["model"], num_classes=num_classes)
        self.criterion = CrossEntropy(**config["criterion"])
        self.config, self.turns = config, turns

    def training_step(self, batch, batch_index):
        self.turns.step_begins()
        return self.criterion(self.network(batch["image"]), batch["mask"])

    def configure_optimizers(self):
        schedule = self.config["schedule"]
        optimizer = create_optimizer(**self.config["optimizer"]).build(self.network)
        scheduler = PolynomialSchedule(schedule["steps"], schedule["warmup_steps"]).build(optimizer)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


def run_bare(config, other, result):
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    turns = Turns(other)
    turns.wait()
    data = create_data_module(**config["data"])
    trainer = Trainer(
        max_steps=config["schedule"]["steps"],
        max_epochs=-1,
        limit_val_batches=0,
        use_distributed_sampler=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        logger=False,
        **config["trainer"],
    )
    trainer.fit(Bare(config, data.num_classes, turns), data)
    other.close()
    result.send(turns.times)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--crop", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="lightning")
    with tempfile.TemporaryDirectory() as folder:
        measure(options, folder)


def measure(options, folder):
    steps = options.steps + WARM_UP
    arguments = ["model=segformer_b0", "optimizer=adamw_segformer", "schedule=160k", "name=run"]
    arguments += [f"schedule.steps={steps}", f"schedule.validate_every={steps}"]
    arguments += [
        f"schedule.log_every={ROUND}",
        f"data.root={folder}/scenes",
        "data.train_images=64",
        "data.eval_images=4",
    ]
    arguments += [f"data.image_size=[{options.crop},{options.crop}]", "data.workers=0"]
    arguments += [f"data.crop_size=[{options.crop},{options.crop}]"]
    arguments += [f"data.train_scale=[{options.crop},{options.crop}]"]
    arguments += [f"data.batch_size={options.batch}", "criterion.class_weights=null"]
    arguments += ["tracking.mode=offline", "trainer.devices=1"]
    config = train.compose(arguments, CONFIGS).values
    os.chdir(folder)

    processes = multiprocessing.get_context("spawn")
    ours, theirs = processes.Pipe()
    result, sent = processes.Pipe(duplex=False)
    bare = processes.Process(target=run_bare, args=(config, theirs, sent))
    bare.start()
    theirs.close()
    turns = Turns(ours)
    step = SegmentationModule.training_step

    def step_in_turn(self, batch, batch_index):
        turns.step_begins()
        return step(self, batch, batch_index)

    SegmentationModule.training_step = step_in_turn
    status = train.main(arguments)
    ours.close()
    assert status == 0
    report(options, turns.times, result.recv())
    bare.join()


def report(options, ours, bare):
    # The first time of each loop is its start.
    pairs = list(zip(ours, bare, strict=False))[1 + WARM_UP :]
    # Some of what is done is done every so many steps: whole rounds of it are compared.
    rounds = [pairs[i : i + ROUND] for i in range(0, len(pairs) - ROUND + 1, ROUND)]
    size = f"{options.batch} images of {options.crop}x{options.crop}"
    print(f"SegFormer-B0, {size}, {len(rounds)} rounds of {ROUND} steps")
    clocks = ["wall"] if torch.accelerator.is_available() else ["wall", "process"]
    for number, clock in enumerate(clocks):
        sums = [[sum(pair[loop][number] for pair in r) for loop in (0, 1)] for r in rounds]
        steps = [statistics.median(column) / ROUND for column in zip(*sums, strict=True)]
        added = statistics.median(ours - bare for ours, bare in sums) / ROUND
        ratio = statistics.median(ours / bare - 1 for ours, bare in sums)
        print(
            f"  {clock:8} bare {1e3 * steps[1]:8.2f} ms  train.py {1e3 * steps[0]:8.2f} ms"
            f"  added {1e3 * added:+7.2f} ms  {100 * ratio:+6.2f} %"
        )


if __name__ == "__main__":
    main()
