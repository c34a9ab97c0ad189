"""Frames per second, multiply-accumulates and memory of every network, beside SegFormer-B0's.

python -m benchmarks.networks                                    # every registered network
python -m benchmarks.networks --networks 'segformer_*' --settings all --sizes 512x512
python -m benchmarks.networks --precisions fp32 bf16 --modes eager compiled

One image at a time, weights random, 19 classes. Each network takes turns with SegFormer-B0 at its
training setting, so that what else the machine does meets both: a round is one turn of each, the
order changes from round to round, and a turn is a tenth of a second of passes one after the other,
the device waited for at its end. The speed ratio is the median over rounds of the seconds that a
pass of SegFormer-B0 takes over those of the network: 2 is twice as fast. SegFormer-B0's own row
shows how far that ratio is to be trusted. Frames per second, the median over rounds, are given on
a GPU alone. A network that fails under some condition has the reason in its row.

fp32 is float32 proper: TF32 is off for convolutions and products alike. bf16 has weights and
images in bfloat16. compiled is torch.compile in its default mode, without CUDA graphs, for images
of this one size. Memory is weights, image and what a pass holds beside them at its peak.
"""

import argparse
import itertools
import json
import math
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch._dynamo

import segtrain
from benchmarks.merging import seconds
from segtrain import create_network, list_networks, measure_cost
from segtrain.errors import first_line

REFERENCE = "segformer_b0"
CLASSES = 19
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}
MODES = ("eager", "compiled")
TURN = 0.1  # seconds
COLUMNS = f"  {'network':16} {'setting':14} {'Mparams':>8} {'GMACs':>8} {'MiB':>7} {'frames/s':>9}"


@dataclass
class Row:
    """One network at one setting under one condition; what could not be measured is None.

    Attributes:
        parameters: number of learnt values.
        speed_ratio: median over rounds of the network's speed over SegFormer-B0's.
        speed_ratio_quartiles: lower and upper.
        error: why it failed.
    """

    network: str
    setting: str
    image_size: tuple[int, int]
    precision: str
    mode: str
    parameters: int | None = None
    gmacs: float | None = None
    peak_memory_mib: float | None = None
    frames_per_second: float | None = None
    speed_ratio: float | None = None
    speed_ratio_quartiles: tuple[float, float] | None = None
    error: str | None = None


class Contestant:
    """A network that is ready to run under one condition.

    Args:
        name: of the network.
        setting: of the network, by name.
        condition: (image_size, precision, mode).
        device: "cpu" or "cuda".
    """

    def __init__(self, name, setting, condition, device):
        size, precision, mode = condition
        dtype = PRECISIONS[precision]
        self.device = device
        self.network = create_network(name, CLASSES, setting).to(device, dtype).eval()
        if mode == "compiled":
            self.network.compile(dynamic=False)
        self.images = torch.randn(1, 3, *size, device=device, dtype=dtype)
        self.images = self.images.contiguous(memory_format=torch.channels_last)
        self.cost = measure_cost(self.network, size, latency=False)
        self.passes = 1
        self.turn()  # kernels are compiled or chosen
        self.passes = math.ceil(TURN / self.turn())

    @torch.inference_mode()
    def turn(self):
        """Seconds of a pass, of as many as make a turn."""

        def run():
            for _ in range(self.passes):
                self.network(self.images)

        return seconds(run, self.device) / self.passes


def compare(network, reference, rounds):
    """Seconds of a pass in each round, of the network and of the reference."""
    times = []
    for number in range(rounds + 1):
        order = (network, reference) if number % 2 else (reference, network)
        taken = {one: one.turn() for one in order}
        times.append((taken[network], taken[reference]))
    return np.array(times[1:]).T  # clocks rise in the first


def measure(name, setting, condition, device, reference, rounds):
    """One row, of a network that runs."""
    network = Contestant(name, setting, condition, device)
    ours, theirs = compare(network, reference, rounds)
    lower, ratio, upper = np.quantile(theirs / ours, (0.25, 0.5, 0.75)).tolist()
    row = Row(name, setting, *condition)
    row.parameters, row.gmacs = network.cost.parameters, network.cost.macs / 1e9
    row.speed_ratio, row.speed_ratio_quartiles = ratio, (lower, upper)
    if device != "cpu":
        row.frames_per_second = 1 / float(np.median(ours))
    if device != "cpu" or row.mode == "eager":  # elsewhere it is the sum of an eager pass's tensors
        row.peak_memory_mib = network.cost.peak_memory_mib
    return row


def measure_all(subjects, conditions, device, rounds):
    """One row for each condition and (network, setting)."""
    for condition in conditions:
        torch.compiler.reset()
        reference, problem = None, None
        try:
            reference = Contestant(REFERENCE, settings_of(REFERENCE)[0], condition, device)
        except Exception as error:
            problem = f"{REFERENCE}: {first_line(error)}"
        for name, setting in subjects:
            row = Row(name, setting, *condition, error=problem)
            if reference is not None:
                try:
                    row = measure(name, setting, condition, device, reference, rounds)
                except Exception as error:
                    row.error = first_line(error)
            torch.cuda.empty_cache()
            yield row


def settings_of(name):
    """Names of a network's settings, the training setting first."""
    with torch.device("meta"):
        return list(create_network(name, CLASSES).settings)


def show(row):
    label = f"  {row.network:16} {row.setting:14}"
    if row.error:
        return f"{label} failed: {row.error}"
    memory, frames = (
        "-" if value is None else f"{value:.{digits}f}"
        for value, digits in ((row.peak_memory_mib, 0), (row.frames_per_second, 1))
    )
    lower, upper = row.speed_ratio_quartiles
    return (
        f"{label} {row.parameters / 1e6:8.2f} {row.gmacs:8.2f} {memory:>7} {frames:>9}"
        f"   x{row.speed_ratio:.2f} ({lower:.2f} to {upper:.2f})"
    )


def image_size(text):
    height, width = text.split("x")
    return int(height), int(width)


def parse(arguments, on_gpu):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    # A CPU takes minutes for what a GPU does in seconds.
    sizes = [(512, 512), (1024, 2048)] if on_gpu else [(256, 256)]
    precisions, modes = (list(PRECISIONS), list(MODES)) if on_gpu else (["fp32"], ["eager"])
    parser.add_argument("--networks", nargs="+", default=["*"], metavar="PATTERN")
    parser.add_argument(
        "--sizes", nargs="+", type=image_size, default=sizes, metavar="HEIGHTxWIDTH"
    )
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=precisions)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=modes)
    parser.add_argument("--settings", choices=("training", "all"), default="training")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--output", type=Path, default="runs/networks.json", help="by default %(default)s"
    )
    options = parser.parse_args(arguments)
    options.networks = sorted({n for pattern in options.networks for n in list_networks(pattern)})
    if not options.networks:
        parser.error(f"no network has such a name. Have: {', '.join(list_networks())}")
    if options.rounds < 1:
        parser.error("--rounds is at least 1")
    return options


def main(arguments=None):
    on_gpu = torch.cuda.is_available()
    options = parse(arguments, on_gpu)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    result = {
        "segtrain": segtrain.__version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "python": platform.python_version(),
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "threads": torch.get_num_threads(),
        "tf32": False,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "classes": CLASSES,
        "batch_size": 1,
        "reference": REFERENCE,
        "rounds": options.rounds,
        "cells": [],
    }
    print(f"{result['device']}, {result['threads']} thread(s), torch {torch.__version__}, TF32 off")
    if not on_gpu:
        print("No GPU here: ratios alone; small images, fp32 and eager unless asked for others.")
    print(f"speed: times as fast as {REFERENCE}, median and quartiles of {options.rounds} rounds")
    subjects = [
        (name, setting)
        for name in options.networks
        for setting in settings_of(name)[: None if options.settings == "all" else 1]
    ]
    device = "cuda" if on_gpu else "cpu"
    conditions = list(itertools.product(options.sizes, options.precisions, options.modes))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    shown = None
    # Dynamo counts the graphs of all networks together, and would go on without compiling.
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        for row in measure_all(subjects, conditions, device, options.rounds):
            condition = (row.image_size, row.precision, row.mode)
            if condition != shown:
                shown = condition
                height, width = row.image_size
                print(f"\n1x3x{height}x{width}, {row.precision}, {row.mode}\n{COLUMNS}   speed")
            print(show(row), flush=True)
            result["cells"].append(asdict(row))
            options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(f"\n{options.output}")


if __name__ == "__main__":
    main()
