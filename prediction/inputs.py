"""Which pictures to label, and what their label maps are called."""

from __future__ import annotations

import glob
import os
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from segtrain.errors import UserError

IMAGES = (
    *(".jpg", ".jpeg", ".jpe", ".png", ".bmp", ".tif", ".tiff", ".webp", ".jp2", ".gif"),
    *(".ppm", ".pgm", ".pnm", ".avif"),
)
VIDEOS = (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv")
_CAMERA = re.compile(r"(?:camera:)?(\d+)")
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Item:
    """A picture and what is written of it.

    Attributes:
        image: the file.
        mask: its label map.
        overlay: the picture with the classes' colours on it.
    """

    image: Path
    mask: Path
    overlay: Path

    def is_done(self, overlay: bool) -> bool:
        """Whether all that is wanted of it is there; files are whole or not there."""
        return self.mask.exists() and (self.overlay.exists() or not overlay)


def find_camera(text: str) -> int | None:
    """The number of the camera that ``camera:0``, or ``0`` where no file is called so, means."""
    match = _CAMERA.fullmatch(text)
    return int(match[1]) if match and not Path(text).exists() else None


def is_video(text: str) -> bool:
    """Whether a path is that of one video."""
    return Path(text).suffix.lower() in VIDEOS and not _WILDCARD.search(text)


def find_items(text: str, output: Path) -> list[Item]:
    """The pictures that a folder, a file or a pattern names, below `output` in the same folders.

    What lies in `output` is no picture to be labelled. ``a.jpg`` becomes ``a.png`` and
    ``a_overlay.jpg``; where another picture of its folder has the same name but for the ending,
    ``a.jpg.png`` and ``a.jpg_overlay.jpg``.

    Raises:
        UserError: there are none, or their label maps would take the place of pictures.
    """
    base, files = _find_files(text)
    place, inside = base.resolve(), output.resolve()
    several = files != [Path(text).expanduser()]
    if several and place == inside:
        raise UserError(
            f"output={output} is where the pictures are: the results would be read as pictures the "
            "next time; choose another folder, which may be in it"
        )
    if several and inside.is_relative_to(place):
        files = [file for file in files if not file.resolve().is_relative_to(inside)]
    if not files:
        raise UserError(
            f"input={text}: no pictures there; they end in {', '.join(IMAGES)}, and those in "
            f"output={output} do not count"
        )
    items = _name_outputs(files, base, output)
    pictures = {file.resolve() for file in files}
    for item in items:
        for written in (item.mask, item.overlay):
            if inside / written.relative_to(output) in pictures:
                raise UserError(
                    f"output={output}: {written} is a picture to be labelled; choose another folder"
                )
    return items


def _find_files(text: str) -> tuple[Path, list[Path]]:
    """The folder from which the pictures are named, and the pictures."""
    path = Path(text).expanduser()
    if path.is_dir():
        return path, sorted(_walk(path, {path.resolve()}))
    if path.is_file():
        return path.parent, [path]
    if not _WILDCARD.search(text):
        raise UserError(f"input={text}: there is no such file or folder")
    parts = path.parts
    first = next(i for i, part in enumerate(parts) if _WILDCARD.search(part))
    found = (Path(name) for name in glob.glob(str(path), recursive=True))  # noqa: PTH207
    return Path(*parts[:first]), sorted(file for file in found if _is_image(file))


def _walk(folder: Path, visited: set[Path]) -> Iterator[Path]:
    """All pictures below a folder, also behind links to folders, each folder once."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError as error:
        raise UserError(f"input={folder}: {error.strerror}") from error
    for entry in entries:
        path = Path(entry.path)
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            place = path.resolve()
            if place not in visited:
                yield from _walk(path, visited | {place})
                visited.add(place)
        elif _is_image(path):
            yield path


def _is_image(path: Path) -> bool:
    return path.suffix.lower() in IMAGES and path.is_file()


def _name_outputs(files: Sequence[Path], base: Path, output: Path) -> list[Item]:
    relative = [file.relative_to(base) for file in files]
    names = [place.with_suffix("").as_posix() for place in relative]
    while True:
        # Some file systems take A and a for the same.
        count = Counter(name.casefold() for name in names)
        full = [
            place.as_posix() if count[name.casefold()] > 1 else name
            for place, name in zip(relative, names, strict=True)
        ]
        if full == names:
            break
        names = full
    return [
        Item(file, output / f"{name}.png", output / f"{name}_overlay.jpg")
        for file, name in zip(files, names, strict=True)
    ]
