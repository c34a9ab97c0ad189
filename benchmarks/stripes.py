"""Scores to a label map in stripes of rows, against upsampling them whole and then the argmax.

python -m benchmarks.stripes

Each runs in a process of its own, so that the peak memory of one does not hide the other's.
"""

import multiprocessing
import resource
import statistics
import time

import torch
from torch import nn

from segtrain.inference import Inference
from segtrain.networks.blocks import resize

CLASSES, SIZE, STRIDE = 150, (1024, 2048), 8
REPEATS = 3


class GivenScores(nn.Module):
    """Stands for a network that takes no time."""

    def __init__(self, scores):
        super().__init__()
        self.scores = scores

    def forward(self, images):
        return self.scores


def whole(network, images):
    return resize(network(images), images.shape[2:]).argmax(dim=1)


def stripes(network, images):
    return Inference()(network, images, images.shape[2:])


@torch.inference_mode()
def measure(label):
    """Median seconds, MiB that the labelling added to the process, and the labels."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(1, CLASSES, *(n // STRIDE for n in SIZE), generator=generator)
    images = torch.empty(1, 3, *SIZE)
    label(GivenScores(scores[:, :, :4, :4]), images[:, :, :32, :32])  # warms up
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        labels = label(GivenScores(scores), images)
        times.append(time.perf_counter() - start)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    return statistics.median(times), added / 1024, labels.numpy()


def main():
    context = multiprocessing.get_context("spawn")
    results = {}
    for label in (whole, stripes):
        with context.Pool(1) as pool:
            results[label.__name__] = pool.apply(measure, (label,))
    print(f"{CLASSES} classes, 1x{SIZE[0]}x{SIZE[1]}, {torch.get_num_threads()} thread(s)")
    for name, (seconds, mebibytes, _) in results.items():
        print(f"  {name:8} {seconds:7.2f} s {mebibytes:8.0f} MiB")
    (slow, large, expected), (fast, small, found) = results["whole"], results["stripes"]
    print(f"  ratio    {slow / fast:7.1f} {large / small:10.1f}")
    print(f"  labels that agree: {100 * (expected == found).mean():.4f} %")


if __name__ == "__main__":
    main()
