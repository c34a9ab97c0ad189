"""One update of the confusion matrix against torchmetrics' Jaccard index, the fastest of many.

python -m benchmarks.confusion_matrix
"""

import time

import torch
from torchmetrics.classification import MulticlassJaccardIndex

from segtrain.metrics import ConfusionMatrix

SHAPE = (4, 512, 512)
CLASSES = 150
REPEATS = 15


def main():
    generator = torch.Generator().manual_seed(0)
    prediction = torch.randint(CLASSES, SHAPE, generator=generator)
    mask = torch.randint(CLASSES, SHAPE, generator=generator)
    mask[:, :64] = 255
    metrics = {
        "segtrain": ConfusionMatrix(CLASSES),
        "torchmetrics": MulticlassJaccardIndex(CLASSES, ignore_index=255),
    }
    times = {name: [] for name in metrics}
    for repeat in range(REPEATS + 1):
        for name, metric in metrics.items():
            start = time.perf_counter()
            metric.update(prediction, mask)
            if repeat:  # the first one warms up
                times[name].append((time.perf_counter() - start) * 1e3)
    ours, theirs = (m.matrix[0] if n == "segtrain" else m.confmat for n, m in metrics.items())
    assert torch.equal(ours, theirs), "the two count differently"

    fastest = {name: min(values) for name, values in times.items()}
    print(f"one update at {SHAPE}, {CLASSES} classes, {torch.get_num_threads()} thread(s)")
    for name, milliseconds in fastest.items():
        print(f"  {name:12} {milliseconds:8.1f} ms")
    print(f"  ratio        {fastest['torchmetrics'] / fastest['segtrain']:8.1f}")


if __name__ == "__main__":
    main()
