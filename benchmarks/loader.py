"""Training images per second from our loader and from MMSegmentation's, on the same files.

python -m benchmarks.loader                                  # drawn files, both data sets
python -m benchmarks.loader --data ade20k --only files* --seconds 10
python -m benchmarks.loader --cityscapes-root datasets/cityscapes --images 100

MMSegmentation is the package as published, with its configurations, data sets, transforms and
loader, in an environment that is made for it once (with uv, from the package index) and uses the
PyTorch, NumPy and OpenCV of this one. Loaders take turns on the same cores with as many workers,
and each is timed once its workers are under way. Ratios are medians over rounds, with the lowest
and the highest; those by CPU time (of the process and its workers) feel less of what else runs on
the machine. Needs Linux.

Both sides hand over uint8 images. Not timed on either side is what follows on the device: there
MMSegmentation stacks, turns BGR to RGB and normalises, and segtrain normalises. Rows "/device"
leave the distortion of colours to the device as well, which is timed on a GPU if there is one.
Rows "/stock" hand batches over in PyTorch's way. "labels" and "cache" read what `python -m
data.cache` writes: the labels alone, and images too.
"""

import argparse
import contextlib
import fnmatch
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import sysconfig
import tempfile
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import torch

from benchmarks import merging
from benchmarks.loader_files import LAYOUTS, copy_files, draw_files, mean_sizes, zip_files
from benchmarks.loader_turns import Stages, measure_turn
from command_line import run_command
from data import create_data_module, dataset
from data.cache import build
from data.cached import Cache, CacheFolder
from data.colors import PhotometricDistortion
from data.files import Place
from data.geometry import RandomScaledCrop
from data.transforms import TrainingTransform
from segtrain.errors import UserError

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("mmsegmentation==1.2.2", "mmengine==0.10.7", "mmcv-lite==2.1.0")
#: What they import; of what they only name as needed, PyTorch, NumPy and OpenCV are ours.
OTHER_PACKAGES = (
    "addict==2.4.0",
    "ftfy==6.3.1",
    "prettytable==3.18.0",
    "regex==2026.11.9",
    "termcolor==3.3.0",
    "terminaltables==3.1.10",
    "wcwidth==0.9.4",
    "yapf==0.43.0",
)

BATCH_SIZES = {"ade20k": 16, "cityscapes": 4}
PEER = "mmsegmentation"
#: Row -> options of the data module; the root and the cache are those of what comes before "/".
ROWS = {
    "files": {},
    "files/stock": {"loader": "stock"},
    "files/device": {"photometric_on": "device"},
    "zips": {},
    "labels": {},
    "labels/device": {"photometric_on": "device"},
    "cache": {},
    "cache/stock": {"loader": "stock"},
    "cache/device": {"photometric_on": "device"},
    "cache/device/stock": {"photometric_on": "device", "loader": "stock"},
}
#: Source -> times MMSegmentation's speed that are to be reached.
TARGETS = {"ade20k": {"files": 4, "cache": 8}, "cityscapes": {"files": 2, "cache": 20}}

#: What belongs to which stage of ours; benchmarks/mmsegmentation_loader.py has MMSegmentation's.
FUNCTIONS = [
    (Place, "read", "read"),
    (Cache, "image", "decode image"),
    (Cache, "label", "decode label"),
    (dataset, "load_image", "decode image"),
    (dataset, "load_label", "decode label"),
    (RandomScaledCrop, "draw", "window"),
    (RandomScaledCrop, "apply", "resize"),
    (RandomScaledCrop, "apply_to_mask", "resize"),
    (cv2, "flip", "flip"),
    (PhotometricDistortion, "apply", "colour"),
    (TrainingTransform, "_pad", "pad"),
]
STAGES = (
    *("read", "decode image", "decode label", "window", "resize", "crop", "flip", "colour", "pad"),
    *("pack", "rest", "hand-over", "all"),
)


class MMSegmentation:
    """Its loader, in a process with packages of its own."""

    def __init__(self):
        self.process = subprocess.Popen(
            [find_environment() / "bin/python", "-m", "benchmarks.mmsegmentation_loader"],
            cwd=REPOSITORY,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def turn(self, loader, seconds, with_stages):
        """What `measure_turn` gives for one of its loaders.

        Raises:
            UserError: the process has ended.
        """
        order = {"loader": loader, "seconds": seconds, "with_stages": with_stages}
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(order), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise UserError("MMSegmentation's process has ended; what it printed is above")
        return json.loads(answer)


def find_environment():
    """The folder of MMSegmentation's environment, which is made where it is not there yet.

    Raises:
        UserError: it cannot be made.
    """
    version = f"{PACKAGES[0].replace('==', '-')}-python{sys.version_info[0]}.{sys.version_info[1]}"
    environment = Path(torch.hub.get_dir()) / "segtrain" / version
    packages = [*PACKAGES, *OTHER_PACKAGES]
    ours = sysconfig.get_path("purelib")
    finished = environment / "packages.txt"
    content = "\n".join([*packages, ours])
    if finished.exists() and finished.read_text() == content:
        return environment
    if shutil.which("uv") is None:
        raise UserError("MMSegmentation's environment is made with uv, which is not there")
    print(f"installing MMSegmentation in {environment}", flush=True)
    python = environment / "bin/python"
    for command in (
        ["uv", "venv", "--clear", "--python", sys.executable, environment],
        ["uv", "pip", "install", "--no-deps", "--python", python, *packages],
    ):
        done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        if done.returncode:
            raise UserError(
                f"MMSegmentation cannot be installed; this needs the package index\n{done.stderr}"
            )
    site_packages = next(environment.glob("lib/python*/site-packages"))
    (site_packages / "segtrain.pth").write_text(f"{ours}\n")
    finished.write_text(content)
    return environment


def prepare(name, folder, options):
    """Files of a data set in all forms: folders with the names files, zips, labels and cache."""
    real = {"ade20k": options.ade_root, "cityscapes": options.cityscapes_root}[name]
    number = options.images or LAYOUTS[name].images
    files, zips = folder / "files", folder / "zips"
    if real is None:
        draw_files(name, files, number)
    else:
        copy_files(name, real, files, number)
    zip_files(name, files, zips)
    split = create_data_module(name, root=files).find_split("train")
    for source, with_images in (("labels", False), ("cache", True)):
        base = folder / source
        base.mkdir(exist_ok=True)
        with contextlib.redirect_stdout(None):
            build({"train": CacheFolder(base / "train", split)}, base, with_images, options.workers)


def create_loader(name, row, folder, workers):
    """The loader of a row of the table."""
    source = row.partition("/")[0]
    options = {"photometric_on": "workers", **ROWS[row]}
    data = create_data_module(
        name,
        root=folder / ("zips" if source == "zips" else "files"),
        cache=folder / source if source in ("labels", "cache") else "none",
        batch_size=BATCH_SIZES[name],
        workers=workers,
        **options,
    )
    return data.train_dataloader()


def measure(name, row, folder, options, peer, with_stages=False):
    """A turn of one row, see `measure_turn`."""
    batch_size = BATCH_SIZES[name]
    if row == PEER:
        loader = {"name": name, "root": str(folder / "files"), "batch_size": batch_size}
        return peer.turn({**loader, "workers": options.workers}, options.seconds, with_stages)
    create = partial(create_loader, name, row, folder, options.workers)
    if not with_stages:
        return measure_turn(create, batch_size, options.seconds)
    with Stages((dataset.TrainingImages, "__getitem__"), FUNCTIONS) as stages:
        return measure_turn(create, batch_size, options.seconds, stages)


def measure_rounds(name, rows, folder, options, peer):
    """Turns of each row, one in each round."""
    turns = {row: [] for row in rows}
    for number in range(options.rounds):
        for row in rows if number % 2 else reversed(rows):
            turns[row].append(measure(name, row, folder, options, peer))
    return turns


def summarise(name, turns, cores):
    """A row of the table for each row of turns."""
    rates = {row: [t["images"] / t["seconds"] for t in turns[row]] for row in turns}
    cpu_times = {
        row: 1e3 * sum(t["cpu_seconds"] for t in turns[row]) / sum(t["images"] for t in turns[row])
        for row in turns
    }
    table = []
    for row, rate in rates.items():
        ratios = [ours / theirs for ours, theirs in zip(rate, rates[PEER], strict=True)]
        table.append(
            {
                "row": row,
                "images_per_second": statistics.median(rate),
                "per_core": statistics.median(rate) / cores,
                "cpu_milliseconds": cpu_times[row],
                "cpu_ratio": cpu_times[PEER] / cpu_times[row],
                "ratio": statistics.median(ratios),
                "lowest_ratio": min(ratios),
                "highest_ratio": max(ratios),
                "target": TARGETS[name].get(row.partition("/")[0]),
            }
        )
    return table


def verdict(ratio, target):
    return f"target {target}x: {'met' if ratio >= target else 'not met'}" if target else ""


def show(table):
    width = max(len(line["row"]) for line in table)
    print(f"  {'':{width}}                            times as fast as {PEER}")
    print(f"  {'':{width}}  images/s  per core  CPU ms  median  lowest, highest  by CPU time")
    for line in table:
        spread = f"{line['lowest_ratio']:.2f}, {line['highest_ratio']:.2f}"
        print(
            f"  {line['row']:{width}}  {line['images_per_second']:8.1f}  {line['per_core']:8.1f}"
            f"  {line['cpu_milliseconds']:6.2f}  {line['ratio']:6.2f}  {spread:>15}"
            f"  {line['cpu_ratio']:11.2f}  {verdict(line['ratio'], line['target'])}".rstrip()
        )
    ratios = {line["row"]: line["ratio"] for line in table}
    if {"files", "zips"} <= ratios.keys():
        share = ratios["zips"] / ratios["files"]
        print(f"  zips are {share:.2f} times as fast as files  {verdict(share, 0.9)}")


def stage_times(turn):
    """Milliseconds of CPU time that an image takes in each stage, "hand-over" and "all"."""
    times = {stage: 1e3 * taken for stage, taken in turn["stages"].items()}
    everything = 1e3 * turn["cpu_seconds"] / turn["images"]
    # What is left is done around samples: stacking, sending, receiving.
    return {**times, "hand-over": everything - sum(times.values()), "all": everything}


def show_stages(columns):
    print("\n  CPU ms       " + "".join(f"{row:>18}" for row in columns))
    for stage in STAGES:
        line = f"  {stage:13}"
        for times in columns.values():
            taken = times.get(stage)
            share = "" if taken is None else f"{taken:.2f} {100 * taken / times['all']:4.0f} %"
            line += f"{share:>18}"
        print(line.rstrip())


def measure_colors_on_device(name, folder):
    """Milliseconds of an image that distorting colours takes on a GPU."""
    times = []
    for place in ("device", "workers"):
        data = create_data_module(
            name,
            root=folder / "files",
            cache="none",
            batch_size=BATCH_SIZES[name],
            workers=0,
            photometric_on=place,
        )
        batch = next(iter(data.train_dataloader()))
        batch = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in batch.items()}
        call = partial(data.on_after_batch_transfer, batch, 0)
        times.append(statistics.median([merging.seconds(call, "cuda") for _ in range(50)][10:]))
    return 1e3 * (times[0] - times[1]) / BATCH_SIZES[name]


def parse(arguments):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--data", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--only", nargs="+", default=["*"], metavar="PATTERN", help="rows")
    parser.add_argument("--images", type=int, help="files of each data set, by default 200 and 24")
    parser.add_argument("--seconds", type=float, default=4, help="of a turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=2, help="and cores")
    parser.add_argument("--folder", type=Path, help="of the files, which stay there")
    parser.add_argument("--ade-root", type=Path, help="take real files from there")
    parser.add_argument("--cityscapes-root", type=Path)
    parser.add_argument("--json", type=Path, help="file for the results")
    options = parser.parse_args(arguments)
    options.rows = [row for row in ROWS if any(fnmatch.fnmatch(row, o) for o in options.only)]
    if not options.rows:
        parser.error(f"--only: no row has such a name. Have: {', '.join(ROWS)}")
    if min(options.workers, options.rounds) < 1:
        parser.error("--workers and --rounds are at least 1")
    return options


def run(arguments):
    options = parse(arguments)
    cores = sorted(os.sched_getaffinity(0))[: options.workers]
    os.sched_setaffinity(0, cores)
    result = {
        "cores": len(cores),
        "workers": options.workers,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "opencv": cv2.__version__,
        "numpy": np.__version__,
        "packages": PACKAGES,
        "data": {},
    }
    with tempfile.TemporaryDirectory() as temporary, MMSegmentation() as peer:
        for name in options.data:
            folder = (options.folder or Path(temporary)).resolve() / name
            prepare(name, folder, options)
            image, label = mean_sizes(name, folder / "files")
            print(
                f"\n{name}: images of {image / 1e3:.0f} kB, labels of {label / 1e3:.1f} kB, batches"
                f" of {BATCH_SIZES[name]}; {options.workers} workers on {len(cores)} cores,"
                f" {options.rounds} rounds of {options.seconds:g} s",
                flush=True,
            )
            turns = measure_rounds(name, [PEER, *options.rows], folder, options, peer)
            table = summarise(name, turns, len(cores))
            show(table)
            columns = {
                row: stage_times(measure(name, row, folder, options, peer, with_stages=True))
                for row in (PEER, *options.rows)
                if row in (PEER, "files", "labels", "cache")
            }
            show_stages(columns)
            if torch.cuda.is_available():
                on_device = measure_colors_on_device(name, folder)
                print(f"  colour on the device: {on_device:.3f} ms an image")
            else:
                on_device = None
                print("  colour on the device: not measured, there is no GPU")
            result["data"][name] = {
                "image_bytes": image,
                "label_bytes": label,
                "table": table,
                "turns": turns,
                "stages": columns,
                "colour_on_device_milliseconds": on_device,
            }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(run, sys.argv[1:]))
