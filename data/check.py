"""Read every file of a data set and say what is wrong with it, and which files to get again.

python -m data.check data=ade20k data.root=FOLDER
python -m data.check data=cityscapes data.root=FOLDER --fix-list again.txt
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import simplejpeg
from rich.console import Console
from rich.table import Table

from command_line import run_command
from data.classes import IGNORE_INDEX, ClassTable
from data.decoding import decode_image, decode_raw_label
from data.every_file import for_every, open_data_set
from data.files import Place, Split
from data.module import SegmentationData, SplitName
from data.scenes import Scenes
from segtrain.errors import Stopped, UserError

OPTIONS = {
    "fix_list": "FILE for the names of the files to get again; also --fix-list FILE",
    "md5": "true: compare the archives that are still there with their official checksums",
}
_USAGE = """\
Reads every file of both splits: counts, pairs, sizes, label ids, duplicates, damage.

usage: python -m data.check data=NAME data.root=FOLDER [--fix-list FILE] [md5=true] [workers=N]

Its status is 0 if all is well, 1 if something is wrong, 2 if the data set cannot be checked.
"""
_FLAG = "--fix-list"
#: Kinds of problems that fresh copies of the files would not have.
TO_GET_AGAIN = (
    "missing",
    "unreadable",
    "image and label of different sizes",
    "not of the size of all images",
    "label of another data set",
    "archive with another checksum",
)
#: Kinds that do not make the check fail: a data set may be distributed like that.
NOTES = (
    "read in spite of errors",
    "same image twice",
    "left behind by other programs",
    "class that no label shows",
)
_NAMED = 5  # files of each kind
_LEFT_BEHIND = re.compile(r"\._.*|.*\.(tmp|part|unfinished)|\.DS_Store")
#: As `how_to_get` tells it.
_CHECKSUM = re.compile(r"(\S+\.(?:zip|tar)) \(md5 ([0-9a-f]{32})\)")


class Problem(NamedTuple):
    """What is wrong.

    Attributes:
        kind: in words.
        file: its name, or what else it is about.
        detail: what more there is to say, or "".
    """

    kind: str
    file: str
    detail: str = ""


class Inspection(NamedTuple):
    """What an image and its label hold.

    Attributes:
        size: (height, width) of the image; None if it cannot be read.
        digest: of the image's file; b"" if it cannot be read.
        counts: (256,) pixels of each raw id; None if the label cannot be read, or is a folder.
        problems: of these files.
    """

    size: tuple[int, int] | None
    digest: bytes
    counts: np.ndarray | None
    problems: list[Problem]


@dataclass(frozen=True)
class Inspector:
    """Reads an image and its label.

    Attributes:
        split: which they are of.
        root: where the names of files start.
        size: (height, width) that all images have, if there is one.
        has_labels: whether there are label files.
    """

    split: Split
    root: Path
    size: tuple[int, int] | None
    has_labels: bool

    def __call__(self, index: int) -> Inspection:
        """Inspect the files of an image."""
        _, image_name, label_name = self.split.files[index]
        problems: list[Problem] = []
        file = name_file(self.split.images, image_name, self.root)
        image, digest = self._read_image(image_name, file, problems)
        size = None if image is None else (image.shape[0], image.shape[1])
        if size and self.size and size != self.size:
            problems.append(Problem("not of the size of all images", file, _shown(size)))
        if not self.has_labels:
            return Inspection(size, digest, None, problems)
        label_file = name_file(self.split.labels, label_name, self.root)
        label = self._read_label(label_name, label_file, problems)
        if label is None:
            return Inspection(size, digest, None, problems)
        if size and label.shape != size:
            for name, shape in ((file, size), (label_file, label.shape)):
                problems.append(Problem("image and label of different sizes", name, _shown(shape)))
        counts = np.bincount(label.ravel(), minlength=256)
        outside = np.flatnonzero((counts > 0) & ~self.split.table.allowed)
        if len(outside):
            ids = ", ".join(map(str, outside[:8])) + (", ..." if len(outside) > 8 else "")
            problems.append(Problem("label of another data set", label_file, f"ids {ids}"))
        return Inspection(size, digest, counts, problems)

    def _read_image(
        self, name: str, file: str, problems: list[Problem]
    ) -> tuple[np.ndarray | None, bytes]:
        try:
            content = self.split.images.read(name)
            digest = hashlib.blake2b(content, digest_size=16).digest()
            try:
                if simplejpeg.is_jpeg(content):
                    return simplejpeg.decode_jpeg(content, "RGB"), digest
            except ValueError as error:
                image = decode_image(content, file)
                problems.append(Problem("read in spite of errors", file, str(error)))
                return image, digest
            return decode_image(content, file), digest
        except UserError:
            problems.append(Problem("unreadable", file))
            return None, b""

    def _read_label(self, name: str, file: str, problems: list[Problem]) -> np.ndarray | None:
        try:
            content = self.split.labels.read(name)
            return decode_raw_label(content, file, self.split.table.raw_colors)
        except UserError as error:
            # Of what a whole file shows the message goes on after a colon.
            _, is_whole, detail = str(error).partition(f"{file}: ")
            kind = "label of another data set" if is_whole else "unreadable"
            problems.append(Problem(kind, file, detail.partition(". ")[0]))
            return None


@dataclass
class Summary:
    """What a split holds.

    Attributes:
        images: number of pairs.
        official: number of images that it has officially.
        sizes: how many images have which (height, width).
        class_pixels, class_images: (256,) pixels of each train id, and images that show it.
        raw_ids: (256,) bool, whether a label holds a raw id.
    """

    images: int
    official: int
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    class_pixels: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    class_images: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    raw_ids: np.ndarray = field(default_factory=lambda: np.zeros(256, bool))

    def add(self, inspection: Inspection, table: ClassTable) -> None:
        """Count an image and its label."""
        if inspection.size is not None:
            self.sizes[inspection.size] += 1
        if inspection.counts is not None:
            shown = inspection.counts > 0
            self.raw_ids |= shown
            self.class_images[np.unique(table.raw_to_train[shown])] += 1
            np.add.at(self.class_pixels, table.raw_to_train, inspection.counts)


def main(arguments: list[str]) -> int:
    """Run the command line; returns its status: 0, 1 for problems, 2 for a user's slip."""
    return run_command(check, arguments)


def check(arguments: list[str]) -> None:
    """Inspect all files, and print what they hold and what is wrong with them."""
    opened = open_data_set(_join_flag(arguments), _USAGE, OPTIONS)
    if opened is None:
        return
    data_module, given = opened
    workers, with_md5 = given.values["workers"], given.values.get("md5", False)
    if not isinstance(with_md5, bool):
        raise UserError(f"md5={with_md5}: true or false")
    data_module.prepare_data()
    summaries, problems = inspect_splits(data_module, workers)
    problems += find_strangers(data_module.root)
    if with_md5:
        problems += compare_checksums(data_module, workers)

    console = Console()
    if not console.is_terminal:
        console = Console(width=120)
    console.print(splits_table(f"{data_module.title} in {data_module.root}", summaries))
    if data_module.classifies_images:
        counts = data_module.class_counts()
        print(f"{len(counts)} classes with {counts.min()} to {counts.max()} training images each")
    else:
        console.print(classes_table(data_module.table, summaries))
    for line in problem_lines(problems):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if "fix_list" in given.values:
        write_fix_list(Path(str(given.values["fix_list"])), problems)
    failing = sum(problem.kind not in NOTES for problem in problems)
    if failing:
        raise Stopped(f"{failing} problems in {data_module.title}, see above", status=1)
    print(f"{data_module.title}: all is well")


def _join_flag(arguments: Sequence[str]) -> list[str]:
    """`--fix-list FILE` as `fix_list=FILE`, the way in which all other arguments are written."""
    joined: list[str] = []
    for argument in arguments:
        if joined and joined[-1] == _FLAG:
            joined[-1] = f"fix_list={argument}"
        elif argument.startswith(f"{_FLAG}="):
            joined.append(f"fix_list={argument.removeprefix(f'{_FLAG}=')}")
        else:
            joined.append(argument)
    return joined


def inspect_splits(
    data_module: SegmentationData, workers: int
) -> tuple[dict[SplitName, Summary], list[Problem]]:
    """Read all files of both splits, and what else is in their zips.

    Raises:
        UserError: there are no files to check.
    """
    finder = data_module.reader if isinstance(data_module, Scenes) else data_module
    names: tuple[SplitName, SplitName] = ("train", "val")
    summaries, problems = {}, []
    splits = {}
    for name in names:
        finder.unpaired = []
        splits[name] = finder.find_split(name)
        problems += [
            Problem("missing", name_file(place, file, data_module.root))
            for place, file in finder.unpaired
        ]
    firsts: dict[bytes, tuple[SplitName, str]] = {}
    for (name, split), official in zip(splits.items(), data_module.official_images, strict=True):
        inspector = Inspector(
            split, data_module.root, size_of_all(data_module), not data_module.classifies_images
        )
        summary = summaries[name] = Summary(len(split.files), official)
        if summary.images != official:
            detail = f"{summary.images} images, officially {official}"
            problems.append(Problem("number of images", name, detail))
        inspections = for_every(inspector, range(summary.images), workers, f"{name} images")
        for (_, image_name, _), inspection in zip(split.files, inspections, strict=True):
            summary.add(inspection, split.table)
            problems += inspection.problems
            if not inspection.digest:
                continue
            file = name_file(split.images, image_name, data_module.root)
            first_split, first = firsts.setdefault(inspection.digest, (name, file))
            if first != file:
                kind = "same image twice" if first_split == name else "image in both splits"
                problems.append(Problem(kind, file, f"as {first}"))
        if inspector.has_labels:
            problems += judge_labels(name, split, summary)
    problems += inspect_rest(splits.values(), data_module.root, workers)
    return summaries, problems


def name_file(place: Place, name: str, root: Path) -> str:
    """A file's name from the data set's folder; of one in a zip, archive!member."""
    if place.is_zip:
        return f"{Path(os.path.relpath(place.path, root)).as_posix()}!{place.inside}{name}"
    return Path(os.path.relpath(place.path / name, root)).as_posix()


def size_of_all(data_module: SegmentationData) -> tuple[int, int] | None:
    """(height, width) of all images of a data set that says so."""
    size = data_module.nominal_image_size
    is_own = size != SegmentationData.nominal_image_size
    return size if is_own and not data_module.classifies_images else None


def judge_labels(name: SplitName, split: Split, summary: Summary) -> list[Problem]:
    """What the labels of a split show together."""
    problems = [
        Problem("class that no label shows", class_name, f"in {name}")
        for class_name, count in zip(split.table.class_names, summary.class_images, strict=False)
        if not count
    ]
    if hold_train_ids(split.table, summary.raw_ids):
        detail = "put back those of the archive"
        problems.append(Problem("labels already converted to train ids", name, detail))
    return problems


def hold_train_ids(table: ClassTable, raw_ids: np.ndarray) -> bool:
    """Whether labels that should hold raw ids hold train ids.

    Args:
        table: of the data set.
        raw_ids: (256,) bool, which ids occur.
    """
    classes = len(table.class_names)
    if raw_ids[classes:IGNORE_INDEX].any() or not raw_ids.any():
        return False
    # Converted ADE20K holds 255, which its table lacks. Of Cityscapes and COCO-Stuff several
    # classes have higher raw ids, which do not all stay away from labels that show most others.
    higher = np.flatnonzero(table.raw_to_train < classes) >= classes
    shows_most = raw_ids[:classes].mean() > 0.5
    return bool((raw_ids & ~table.allowed).any() or (higher.sum() > 1 and shows_most))


def inspect_rest(splits: Iterable[Split], root: Path, workers: int) -> list[Problem]:
    """Read what zips hold beside the files of the splits: all their checksums are to be right."""
    rest: dict[Path, set[str]] = {}
    for split in splits:
        for place, column in ((split.images, 1), (split.labels, 2)):
            if place.is_zip:
                names = rest.setdefault(place.path, set(Place(place.path).names("")))
                names.difference_update(place.inside + files[column] for files in split.files)
    members = [(path, name) for path in rest for name in sorted(rest[path])]
    results = for_every(is_whole, members, workers, "other files") if members else []
    return [
        Problem("unreadable", name_file(Place(path), name, root))
        for (path, name), whole in zip(members, results, strict=True)
        if not whole
    ]


def is_whole(member: tuple[Path, str]) -> bool:
    """Whether a member of a zip can be read."""
    path, name = member
    try:
        Place(path).read(name)
    except UserError:
        return False
    return True


def find_strangers(root: Path) -> list[Problem]:
    """Files that other programs left behind; they are never read."""
    return [
        Problem("left behind by other programs", (Path(folder) / name).relative_to(root).as_posix())
        for folder, _, names in os.walk(root)
        for name in sorted(names)
        if _LEFT_BEHIND.fullmatch(name)
    ]


def compare_checksums(data_module: SegmentationData, workers: int) -> list[Problem]:
    """Compare the archives that are there with the checksums that are known."""
    root = data_module.root
    official = dict(_CHECKSUM.findall(data_module.how_to_get))
    archives = [
        Path(folder) / name
        for folder, _, names in os.walk(root)
        for name in names
        if name in official
    ]
    if not archives:
        print(f"md5=true: no archive with a known checksum in {root}: {', '.join(official)}")
        return []
    checksums = for_every(md5, archives, workers, "archives")
    return [
        Problem("archive with another checksum", path.relative_to(root).as_posix(), checksum)
        for path, checksum in zip(archives, checksums, strict=True)
        if checksum != official[path.name]
    ]


def md5(path: Path) -> str:
    """The checksum of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "md5").hexdigest()


def splits_table(title: str, summaries: dict[SplitName, Summary]) -> Table:
    """Counts and sizes."""
    table = Table("split", title=title, title_justify="left")
    for column in ("images", "officially", "smallest", "median", "largest", "most common"):
        table.add_column(column, justify="right")
    for name, summary in summaries.items():
        sizes = sorted(summary.sizes.elements(), key=lambda size: size[0] * size[1])
        row = [name, str(summary.images), str(summary.official)]
        if sizes:
            row += [_shown(sizes[i]) for i in (0, len(sizes) // 2, -1)]
            size, count = summary.sizes.most_common(1)[0]
            row.append(f"{_shown(size)} ({count / len(sizes):.0%})")
        table.add_row(*row)
    table.caption = "sizes: width x height in pixels, by area"
    return table


def classes_table(classes: ClassTable, summaries: dict[SplitName, Summary]) -> Table:
    """How many images show a class, and the share of it in all pixels."""
    table = Table("class", title="labels", title_justify="left")
    for name in summaries:
        table.add_column(f"{name} images", justify="right")
        table.add_column("pixels, %", justify="right")
    rows = [*enumerate(classes.class_names), (IGNORE_INDEX, "(ignored)")]
    for train_id, class_name in rows:
        cells = []
        for summary in summaries.values():
            share = summary.class_pixels[train_id] / max(1, summary.class_pixels.sum())
            cells += [str(summary.class_images[train_id]), f"{100 * share:.3f}"]
        table.add_row(class_name, *cells)
    return table


def problem_lines(problems: Iterable[Problem]) -> list[str]:
    """Each kind of problem with the first files that have it; notes come last."""
    by_kind: dict[str, list[Problem]] = defaultdict(list)
    for problem in problems:
        by_kind[problem.kind].append(problem)
    lines = []
    for kind in sorted(by_kind, key=lambda kind: kind in NOTES):
        of_kind = by_kind[kind]
        lines.append(f"{'note: ' if kind in NOTES else ''}{kind}: {len(of_kind)}")
        for problem in of_kind[:_NAMED]:
            lines.append(f"  {problem.file}" + (f" ({problem.detail})" if problem.detail else ""))
        if len(of_kind) > _NAMED:
            lines.append(f"  and {len(of_kind) - _NAMED} more")
    return lines


def write_fix_list(path: Path, problems: Iterable[Problem]) -> None:
    """Write the names of the files to get again, one in a line."""
    files = sorted({problem.file for problem in problems if problem.kind in TO_GET_AGAIN})
    try:
        path.write_text("".join(f"{file}\n" for file in files), encoding="utf-8")
    except OSError as error:
        raise UserError(f"--fix-list {path} cannot be written: {error.strerror}") from None
    print(f"{path} names {len(files)} files to get again")


def _shown(size: Sequence[int]) -> str:
    height, width = size
    return f"{width}x{height}"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
