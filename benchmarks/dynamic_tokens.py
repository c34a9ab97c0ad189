"""DoViT's encoder with patches stopped, against the same encoder with all tokens.

python -m benchmarks.dynamic_tokens                       # on a CPU minutes, on one thread
python -m benchmarks.dynamic_tokens --sides 512 --rounds 3

Weights are random; thresholds are set for each image such that a given share of its patches runs on
behind each decision, and the decisions are taken as ever, auxiliary heads included. Budgets keep
the same shares, rounded up to 64 patches. In a batch the shares differ between images: packed (on a
CPU, in turn between one decision and the next), each has its own tokens; by the mean, as the
authors have it, all have equally many. "Blocks" are those
of the encoder and the decisions between them; "whole network" has the patch embedding before them
and Segmenter's decoder, which sees all patches, behind them.

All contestants take turns, in an order that changes from round to round; what is given is the
median over rounds of a ratio of two times of one round. On a CPU it is the CPU time of the one
thread, since others' work makes the clock's time longer; milliseconds are given on a GPU alone.
"""

import argparse
import itertools
import math
import statistics
import time

import torch

from benchmarks.merging import seconds
from benchmarks.networks import PRECISIONS, TURN
from segtrain.networks.dovit import VARIANTS, DoViT

#: Shares of the patches that run on behind decisions 1 to 3.
KEEP = ((1, 1, 1), (0.8, 0.6, 0.5), (0.6, 0.4, 0.3), (0.5, 0.25, 0.15))
#: By how much the images of a batch differ in that.
SPREAD = (1.4, 1.1, 0.9, 0.6)
CLASSES = 19
CHANNELS = 256  # of the auxiliary heads
#: Any: the thresholds are forced.
TAU = {"threshold": 0.5}


class Forced(DoViT):
    """DoViT whose thresholds are such that of each image a given share runs on."""

    shares = None  # (B,) for each decision, while thresholds are looked for

    def _decide_by_threshold(self, number, confidence, active, previous):
        if self.shares is not None:
            patches = confidence.shape[1]
            counts = (self.shares[number] * patches).round().long().clamp(1, patches)[:, None]
            counts = counts.minimum(active.sum(1, keepdim=True))
            ordered = confidence.masked_fill(~active, math.inf).sort(dim=1).values
            self.thresholds[number] = ordered.gather(1, counts - 1)
        return super()._decide_by_threshold(number, confidence, active, previous)

    def threshold(self, decision):
        return self.thresholds[decision]

    def force(self, embedded, keep, rule):
        """Set the thresholds for images and a batch rule; gives the tokens that run."""
        tokens = embedded[0]
        spread = torch.tensor(SPREAD if len(tokens) > 1 else (1.0,), device=tokens.device)
        self.batch_rule, self.thresholds = rule, {}
        self.shares = [(share * spread).clamp(max=1) for share in keep]
        with self.using(TAU):
            decisions = self.encode(embedded).decisions
        self.shares = None
        return [decision.selection.lengths for decision in decisions], self.thresholds


def create(size, side, device, precision):
    backbone, decisions = VARIANTS[size]
    network = Forced(
        CLASSES,
        backbone,
        "segmenter",
        image_size=(side, side),
        decisions=decisions,
        channels=CHANNELS,
    )
    network = network.to(device, PRECISIONS[precision]).eval()
    # What encodes images takes what they are embedded to.
    network.embed, network.encoder.embed = network.encoder.embed, lambda embedded: embedded
    return network


def macs_of_blocks(network, patches, lengths):
    """Of one image: its blocks and heads; ``lengths``: tokens that run behind each decision."""
    width, everything = network.encoder.width, patches + network.encoder.num_prefix
    running = [everything, *lengths]
    bounds = (0, *network.decisions, network.encoder.depth)
    macs = len(lengths) * patches * CHANNELS * (width + CLASSES)
    for (start, end), tokens in zip(itertools.pairwise(bounds), running, strict=True):
        macs += (end - start) * (12 * tokens * width**2 + 2 * tokens**2 * width)
    return macs


def turn(call, passes, device):
    """Seconds of one pass of a call, of as many as make a turn."""

    def run():
        for _ in range(passes):
            call()

    if device != "cpu":
        return seconds(run, device) / passes
    start = time.thread_time()
    run()
    return (time.thread_time() - start) / passes


@torch.inference_mode()
def in_turns(calls, device, rounds):
    """Seconds of each call by its name, in each round."""
    passes = {}
    for name, call in calls.items():
        turn(call, 1, device)  # kernels are chosen
        passes[name] = math.ceil(TURN / turn(call, 1, device))
    times = {name: [] for name in calls}
    names = list(calls)
    for number in range(rounds):
        first = number % len(names)
        for name in names[first:] + names[:first]:
            times[name].append(turn(calls[name], passes[name], device))
    return times


def times_faster(slow, fast):
    """Median over rounds of how many times faster, as it is shown."""
    return f"x{statistics.median(a / b for a, b in zip(slow, fast, strict=True)):.2f}"


def added(times, others):
    return [a + b for a, b in zip(times, others, strict=True)]


def milliseconds(times, device):
    return "" if device == "cpu" else f"  {statistics.median(times) * 1e3:.2f} ms"


def encoding(network, embedded, setting, thresholds=None, rule="exact"):
    """A pass of the blocks, to be called."""

    def call():
        network.thresholds, network.batch_rule = thresholds, rule
        with network.using(setting):
            network.encode(embedded)

    return call


def noise(network, batch_size, side, device):
    dtype = next(network.parameters()).dtype
    return torch.randn(batch_size, 3, side, side, device=device, dtype=dtype)


@torch.inference_mode()
def measure_one_image(network, side, device, rounds):
    """Each share against all tokens."""
    images, patches = noise(network, 1, side, device), (side // 16) ** 2
    embedded = network.embed(images)
    calls = {
        "dense": encoding(network, embedded, "full"),
        "rest": lambda: network.decoder.head(network.embed(images)[0][:, 1:]),
    }
    macs = {}
    for keep in KEEP:
        lengths, thresholds = network.force(embedded, keep, "exact")
        macs[keep] = macs_of_blocks(network, patches, [length for (length,) in lengths])
        calls[keep] = encoding(network, embedded, TAU, thresholds)
        calls["budget", keep] = encoding(network, embedded, {"keep": list(keep)})
    times = in_turns(calls, device, rounds)
    dense, rest = times["dense"], times["rest"]
    heads = len(KEEP[0]) * patches * CHANNELS * (network.encoder.width + CLASSES)
    dense_macs = macs_of_blocks(network, patches, [patches + 1] * len(KEEP[0])) - heads
    row = "    {:14} {:>8} {:>8} {:>8} {:>14}{}"
    print(row.format("kept", "blocks", "by MACs", "budget", "whole network", ""))
    print(row.format("all, dense", "x1.00", "", "", "x1.00", milliseconds(dense, device)))
    for keep in KEEP:
        cells = (
            times_faster(dense, times[keep]),
            f"x{dense_macs / macs[keep]:.2f}",
            times_faster(dense, times["budget", keep]),
            times_faster(added(dense, rest), added(times[keep], rest)),
        )
        name = "/".join(map(str, keep))
        print(row.format(name, *cells, milliseconds(times[keep], device)))


@torch.inference_mode()
def measure_batch(network, side, device, rounds):
    """Images of unequal shares: packed, one at a time, and by the mean."""
    embedded = tokens, grid, rotations = network.embed(noise(network, len(SPREAD), side, device))
    lengths, thresholds = network.force(embedded, KEEP[2], "exact")
    lengths_of_mean, of_mean = network.force(embedded, KEEP[2], "mean")
    exact, mean = (
        sum(macs_of_blocks(network, (side // 16) ** 2, image) for image in zip(*each, strict=True))
        for each in (lengths, lengths_of_mean)
    )
    alone = [
        encoding(
            network,
            (tokens[b : b + 1], grid, rotations),
            TAU,
            {decision: values[b : b + 1] for decision, values in thresholds.items()},
        )
        for b in range(len(tokens))
    ]
    calls = {
        "dense": encoding(network, embedded, "full"),
        "packed": encoding(network, embedded, TAU, thresholds),
        "one at a time": lambda: [call() for call in alone],
        "mean": encoding(network, embedded, TAU, of_mean, "mean"),
    }
    times = in_turns(calls, device, rounds)
    kept = "; ".join("/".join(map(str, length)) for length in lengths)
    print(f"    {len(tokens)} images, tokens that run: {kept}; by MACs packed x{mean / exact:.2f}")
    row = "    {:14} {:>8} over dense, {} over the mean{}"
    for name in ("packed", "one at a time", "mean"):
        over = (times_faster(times[other], times[name]) for other in ("dense", "mean"))
        print(row.format(name, *over, milliseconds(times[name], device)))


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sides", nargs="+", type=int, default=[512, 1024], help="of the images")
    parser.add_argument("--rounds", type=int, help="by default 3 on a CPU, 15 on a GPU")
    arguments = parser.parse_args(arguments)
    torch.manual_seed(0)
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    cases = [("s", side, "fp32") for side in arguments.sides]
    if on_gpu:
        torch.set_float32_matmul_precision("highest")
        larger = [("s", side) for side in arguments.sides] + [("b", 768), ("l", 768)]
        cases += [(size, side, "bf16") for size, side in larger]
    else:
        torch.set_num_threads(1)
    rounds = arguments.rounds or (15 if on_gpu else 3)
    for size, side, precision in cases:
        network = create(size, side, device, precision)
        threads = "" if on_gpu else ", 1 thread"
        name = torch.cuda.get_device_name() if on_gpu else "cpu"
        print(f"ViT-{size.upper()}, {(side // 16) ** 2} patches, {name}, {precision}{threads}")
        measure_one_image(network, side, device, rounds)
        measure_batch(network, side, device, rounds)


if __name__ == "__main__":
    main()
