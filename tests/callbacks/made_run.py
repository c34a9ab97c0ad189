"""A run's folder as a training of 150 classes with nine settings leaves it, made at once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from callbacks.confusion import CONFUSION, Confusion, write_confusion
from callbacks.jsonl import CURVE, METRICS, append_rows
from callbacks.pictures import IGNORED, INDEX, PREDICTIONS

SETTINGS = ["full", *(f"isr_{n}" for n in range(1, 9))]


def make_run(
    folder: Path,
    classes: int = 150,
    images: int = 200,
    validations: int = 20,
    size: tuple[int, int] = (300, 400),
) -> Path:
    """Curve, metrics, configuration, confusion and pictures, the same at every call."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(0)
    names = [f"class <{number}> & co" for number in range(classes)]
    (folder / "config.yaml").write_text(
        "model:\n  name: edaformer_tiny\ndata:\n  name: ade20k\nnote: </script><b>\n"
    )
    (folder / "run.json").write_text('{"git_commit": "0123456789"}\n')
    for step in range(1000, 1000 * validations + 1, 1000):
        append_rows(folder / CURVE, [_row(step, n, names, random) for n in range(len(SETTINGS))])
    append_rows(
        folder / METRICS,
        [
            {"step": step, "time": step, "train/loss": 2 + 3 / step, "train/learning_rate": 1e-4}
            for step in range(50, 1000 * validations, 50)
        ],
    )
    counts = random.integers(0, 60, (len(SETTINGS), classes, classes))
    counts[:, np.arange(classes), np.arange(classes)] = random.integers(0, 20000, classes)
    counts[:, 7] = 0  # a class without labels
    write_confusion(
        folder / CONFUSION, Confusion(1000 * validations, SETTINGS, names, counts.astype(np.int64))
    )
    make_pictures(folder, names, images, 1000 * validations, size, random)
    return folder


def _row(step, number, names, random):
    accuracy = 0.42 - 0.2 * 900 / step - 0.0015 * number**2 + 0.002 * random.random()
    iou = np.clip(accuracy + 0.25 * random.standard_normal(len(names)), 0, 1).tolist()
    iou[7] = None
    cost = {"parameters": 4900000, "gmacs": 5.6 - 0.3 * number, "latency_ms": 30.0 - 2 * number}
    cost |= {"latency_low_ms": 29.0 - 2 * number, "latency_high_ms": 31.5 - 2 * number}
    cost |= {"peak_memory_mib": 300.0, "image_size": [512, 512], "device": "cpu"}
    if number in (3, 4):
        cost |= {"gmacs_std": 0.2, "gmacs_worst": 6.0}
    return {
        "step": step,
        "setting": SETTINGS[number],
        "values": {"encoder": [8, 4, 2, number]},
        "mIoU": accuracy,
        "pixel_accuracy": accuracy + 0.3,
        "IoU": dict(zip(names, iou, strict=True)),
        "images": 2000,
        "on_front": True,
        "cost": cost,
    }


def make_pictures(folder, names, images, step, size, random, distinct=4):
    """Photographs of noise; regions around points, which every setting shifts a little further."""
    pictures = folder / PREDICTIONS
    pictures.mkdir()
    palette = random.integers(0, 256, (len(names), 3), dtype=np.uint8)
    height, width = size
    rows, columns = np.mgrid[:height, :width]
    for number in range(min(images, distinct)):
        places = random.random((25, 2)) * size
        classes = random.integers(0, len(names), 25).astype(np.uint8)
        maps = []
        for shift in (0, *(6 + 1.5 * number for number in range(len(SETTINGS)))):
            moved = places + shift * random.standard_normal(places.shape)
            far = np.stack([(rows - y) ** 2 + (columns - x) ** 2 for y, x in moved])
            maps.append(classes[far.argmin(axis=0)])
        maps[0] = np.where(rows < 8, IGNORED, maps[0]).astype(np.uint8)
        picture = Image.fromarray(np.vstack(maps), mode="P")
        picture.putpalette(palette.tobytes())
        picture.save(pictures / f"{number}.png")
        photograph = sum(
            cv2.resize(
                random.standard_normal((2 + height // scale, 2 + width // scale, 3)),
                (width, height),
                interpolation=cv2.INTER_CUBIC,
            )
            * strength
            for scale, strength in ((100, 40), (30, 20), (10, 12), (3, 7))
        )
        photograph = np.clip(photograph + 120, 0, 255).astype(np.uint8)
        cv2.imwrite(str(pictures / f"{number}.jpg"), photograph)
    for number in range(distinct, images):
        for kind in ("png", "jpg"):
            shutil.copy(pictures / f"{number % distinct}.{kind}", pictures / f"{number}.{kind}")
    index = {
        "step": step,
        "settings": SETTINGS,
        "classes": names,
        "palette": palette.tolist(),
        "images": [{"file": f"{n}", "name": f"validation/image {n}"} for n in range(images)],
    }
    (pictures / INDEX).write_text(json.dumps(index))
