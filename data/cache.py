"""Write a cache of decoded images and compressed labels, from which training loads faster.

python -m data.cache data=cityscapes data.root=FOLDER
python -m data.cache data=ade20k data.root=FOLDER only=labels
"""

from __future__ import annotations

import ctypes
import multiprocessing
import signal
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import wait
from multiprocessing.sharedctypes import Synchronized
from pathlib import Path
from shutil import disk_usage

import cv2
from filelock import FileLock, Timeout
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from command_line import run_command
from data.cached import CacheFolder, Part, encode, read_part
from data.every_file import open_data_set
from data.module import SegmentationData, SplitName
from progress import Progress
from segtrain.errors import UserError

OPTIONS = {"only": "labels: leave out the images, which takes about a hundredth of the space"}
_USAGE = """\
Writes decoded images and labels of both splits into data.root/segtrain_cache, or data.cache=FOLDER;
training reads them from there. What is up to date stays, so an interrupted command goes on.

usage: python -m data.cache data=NAME data.root=FOLDER [only=labels] [workers=N] [key=value ...]
"""
#: Images whose bytes are counted to tell how much space all will take.
_SAMPLES = 16


def main(arguments: list[str]) -> int:
    """Run the command line; returns its status: 0, 2 for a user's slip, 130 if interrupted."""
    return run_command(cache, arguments)


def cache(arguments: list[str]) -> None:
    """Write what is missing or out of date."""
    opened = open_data_set(arguments, _USAGE, OPTIONS)
    if opened is None:
        return
    data_module, given = opened
    only, workers = given.values.get("only"), max(1, given.values["workers"])
    if only not in (None, "labels"):
        raise UserError(f"only={only}: the one choice is only=labels")
    folders, base = find_folders(data_module), data_module.cache_folder
    try:
        base.mkdir(parents=True, exist_ok=True)
        with _locked(base):
            parts = build(folders, base, only is None, workers)
    except OSError as error:
        raise UserError(
            f"{error.filename or base} cannot be written to: {error.strerror}. data.cache=FOLDER"
            " puts the cache elsewhere, for training as well"
        ) from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on where this one stopped") from None
    print(f"{data_module.title} is cached in {base}", flush=True)
    Console().print(sizes_table(parts))


def find_folders(data_module: SegmentationData) -> dict[SplitName, CacheFolder]:
    """Where the caches of both splits belong.

    Raises:
        UserError: the data set is not there, or has none.
    """
    if data_module.classifies_images:
        raise UserError(
            f"{data_module.title} has no label files, and its images are only read as they are:"
            " there is nothing to cache"
        )
    if data_module.cache == "none":
        raise UserError("data.cache=none: leave it out, or give the folder to write to")
    data_module.prepare_data()
    names: tuple[SplitName, SplitName] = ("train", "val")
    return {
        name: CacheFolder(data_module.cache_folder / name, data_module.find_split(name))
        for name in names
    }


@contextmanager
def _locked(base: Path) -> Iterator[None]:
    """One command at a time; those that come later find its work done."""
    lock = FileLock(base / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        print(f"another process writes to {base}: waiting for it", flush=True)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def build(
    folders: Mapping[SplitName, CacheFolder], base: Path, with_images: bool, workers: int
) -> dict[SplitName, list[Part]]:
    """Bring the caches of splits up to date.

    Args:
        folders: where they belong.
        base: the folder around these.
        with_images: whether to have images beside the labels.
        workers: processes.

    Returns:
        all parts of each.

    Raises:
        UserError: there is too little space, or files cannot be read.
    """
    missing = [(folder, find_missing(folder, with_images)) for folder in folders.values()]
    if any(numbers for _, numbers in missing):
        check_space(missing, base, with_images)
        try:
            unreadable = write_parts(missing, with_images, workers)
        finally:
            for folder in folders.values():
                _remove_unfinished(folder)
        if unreadable:
            lines = "\n  ".join(sorted(unreadable))
            raise UserError(
                f"{len(unreadable)} files cannot be read:\n  {lines}\n"
                "  Put them back and run the command again: it goes on where it stopped"
            )
    return {
        name: [read_part(folder.part(number)) for number in range(len(folder.ranges))]
        for name, folder in folders.items()
    }


def find_missing(folder: CacheFolder, with_images: bool) -> list[int]:
    """The parts that are missing. Those that are out of date are removed first, as is all else.

    Labels that are up to date stay until there are images beside them.
    """
    folder.path.mkdir(exist_ok=True)
    _remove_unfinished(folder)
    paths = {folder.part(number): number for number in range(len(folder.ranges))}
    missing = set(paths.values())
    for path in folder.path.glob("part-*.bin"):
        try:
            part = read_part(path)
            is_current = path in paths and folder.difference(paths[path], part) is None
        except UserError:
            is_current = False
        if not is_current:
            path.unlink()
        elif part.about["has_images"] or not with_images:
            missing.remove(paths[path])
    return sorted(missing)


def _remove_unfinished(folder: CacheFolder) -> None:
    for path in folder.path.glob("*.unfinished"):
        path.unlink()


def check_space(
    missing: Sequence[tuple[CacheFolder, list[int]]], base: Path, with_images: bool
) -> None:
    """Say how much space is needed, and how much is free.

    Raises:
        UserError: it is not enough.
    """
    images, needed = 0, 0.0
    for folder, numbers in missing:
        indices = [index for number in numbers for index in folder.ranges[number]]
        sizes = []
        for index in indices[:: max(1, len(indices) // _SAMPLES)]:
            try:
                image, _, label = encode(folder.split, index, with_images)
            except UserError:
                continue  # all of these are named later
            sizes.append(len(label) + (0 if image is None else image.nbytes))
        images += len(indices)
        needed += sum(sizes) / max(1, len(sizes)) * len(indices)
    free = disk_usage(base).free
    print(
        f"{images} images: about {decimal(round(needed))} in {base}, {decimal(free)} are free",
        flush=True,
    )
    if needed > free:
        raise UserError(
            f"{base} has too little space: make room, put the cache elsewhere (data.cache=FOLDER,"
            " for training as well), or cache the labels alone (only=labels)"
        )


def write_parts(
    missing: Sequence[tuple[CacheFolder, list[int]]], with_images: bool, workers: int
) -> list[str]:
    """Write parts by several processes.

    Returns:
        what is wrong with which files.

    Raises:
        UserError: a part cannot be written, or a process was killed.
    """
    work = [(folder, number) for folder, numbers in missing for number in numbers]
    workers = min(workers, len(work))
    taken = multiprocessing.Value(ctypes.c_int64, 0)
    # Each process counts for itself: one that is killed leaves no lock behind that is waited for.
    done = multiprocessing.RawArray(ctypes.c_int64, workers)
    reports: multiprocessing.SimpleQueue[list[str] | UserError] = multiprocessing.SimpleQueue()
    processes: list[multiprocessing.Process] = []
    unreadable: list[str] = []
    try:
        # Processes inherit the mask, so an interrupt is left to this one.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        for worker in range(workers):
            arguments = (worker, work, with_images, taken, done, reports)
            process = multiprocessing.Process(target=_work, args=arguments)
            process.start()
            processes.append(process)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        with Progress(sum(len(folder.ranges[number]) for folder, number in work), "images") as bar:
            while processes:
                wait([process.sentinel for process in processes], timeout=0.2)
                ended = [process for process in processes if process.exitcode is not None]
                bar.advance(sum(done) - bar.done)
                while not reports.empty():
                    report = reports.get()
                    if isinstance(report, UserError):
                        raise report
                    unreadable += report
                for process in ended:
                    processes.remove(process)
                    if process.exitcode:
                        raise UserError(
                            f"a process ended with status {process.exitcode}; if it was killed"
                            " (-9), most likely for memory: use fewer (workers=1)"
                        )
    finally:
        for process in processes:
            process.terminate()
            process.join()
    return unreadable


def _work(
    worker: int,
    work: Sequence[tuple[CacheFolder, int]],
    with_images: bool,
    taken: Synchronized[int],
    done: ctypes.Array[ctypes.c_int64],
    reports: multiprocessing.SimpleQueue[list[str] | UserError],
) -> None:
    """Write one part after the other until none is left, or the command was killed."""
    cv2.setNumThreads(0)
    command = multiprocessing.parent_process()

    def advance() -> None:
        done[worker] += 1
        if command is not None and not command.is_alive():
            sys.exit()

    while True:
        with taken.get_lock():
            next_one = taken.value
            taken.value += 1
        if next_one >= len(work):
            return
        folder, number = work[next_one]
        try:
            reports.put(folder.write(number, with_images, advance))
        except OSError as error:
            path = folder.part(number)
            reports.put(UserError(f"{path} could not be written: {error.strerror or error}"))


def sizes_table(parts: Mapping[SplitName, Sequence[Part]]) -> Table:
    """What is printed at the end."""
    table = Table("split")
    for column in ("images", "parts", "pixels", "labels", "on disk"):
        table.add_column(column, justify="right")
    for name, of_split in parts.items():
        pixels = labels = 0
        for part in of_split:
            entries = part.entries
            labels += int(entries["label_bytes"].sum())
            if part.about["has_images"]:
                pixels += 3 * int(entries["height"].astype("u8") @ entries["width"].astype("u8"))
        sizes = pixels, labels, sum(part.path.stat().st_size for part in of_split)
        images = sum(len(part.entries) for part in of_split)
        table.add_row(name, str(images), str(len(of_split)), *map(decimal, sizes))
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
