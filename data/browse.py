"""Contact sheets: samples as a network is trained on them, as one picture and as a page.

python -m data.browse data=ade20k data.root=FOLDER
python -m data.browse experiment=segformer_b0_ade20k split=val count=48 output=FOLDER
"""

from __future__ import annotations

import base64
import html
import itertools
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
from PIL import Image, ImageDraw, ImageFont

from command_line import CONFIGS, read_arguments, run_command
from data import SegmentationData, create_data_module
from data.module import SplitName
from data.sampling import EndlessBatchSampler
from data.superpatches import SUPERPATCH
from pages import write_page
from segtrain.classes import Classes
from segtrain.config import compose
from segtrain.errors import UserError, did_you_mean

OPTIONS = {
    "split": "train: augmented, in the order of training (train) | val: as they are scored",
    "count": "of samples (24)",
    "first": "number of the first one (0)",
    "epoch": "of training (0)",
    "output": "folder of the picture and the page (browse)",
}
_USAGE = """\
Writes samples with their masks, as one picture and as a page that opens anywhere, offline.

usage: python -m data.browse data=NAME data.root=FOLDER [key=value ...]
"""
#: All is done in this process, and images come with their colours distorted.
_HERE = {"workers": 0, "loader": "stock", "photometric_on": "workers"}
_SCRIPT, _STYLE = (Path(__file__).with_name(f"browse.{kind}") for kind in ("js", "css"))

#: Longest side of an image on the page and on the picture, in pixels.
_PAGE_SIDE, _TILE_SIDE = 480, 240
_QUALITY = 85
_OPACITY = 0.55
#: Greys of the stripes where pixels are ignored, and how wide a stripe is.
_STRIPES, _STRIPE = np.array([[70] * 3, [150] * 3], np.uint8), 4
#: Of the picture in pixels: width at most, height of a line of text, width of a class, gaps.
_WIDTH, _LINE, _ENTRY, _GAP = 2240, 18, 210, 8


_BAR = f"""\
<div class="bar"><div class="controls">
<label>class <input id="find" type="search"></label>
<span>samples: <output id="shown"></output></span>
<label class="wide">colours <input id="opacity" type="range" min="0" max="1" step="0.05"
 value="{_OPACITY}"></label>
</div></div>"""


@dataclass(frozen=True)
class Sample:
    """What is shown of a sample.

    Attributes:
        title: its name and place in the data set.
        note: what was wrong with the file whose place it takes, or nothing.
        image: (H, W, 3) uint8 RGB.
        mask: (h, w) uint8 classes; None where an image has one class.
        shares: of the mask, by class, the largest first; what is ignored is among them.
    """

    title: str
    note: str
    image: np.ndarray
    mask: np.ndarray | None
    shares: dict[int, float]


def main(arguments: list[str]) -> int:
    """Run the command line; returns its status: 0, 2 for a user's slip, 130 if interrupted."""
    return run_command(browse, arguments)


def browse(arguments: list[str]) -> None:
    """Write the picture and the page, and print where they are.

    Raises:
        UserError: an argument is wrong, the data set is missing, or a file cannot be read.
    """
    given = read_arguments(arguments, _USAGE, OPTIONS)
    if given is None:
        return
    options: dict[str, Any] = {"split": "train", "count": 24, "first": 0, "epoch": 0}
    options |= {"output": "browse", **given.values}
    split, folder = options["split"], Path(options["output"])
    if split not in ("train", "val"):
        raise UserError(f"split={split}: {did_you_mean(str(split), ('train', 'val'))}")
    for key, least in (("count", 1), ("first", 0), ("epoch", 0)):
        if type(options[key]) is not int or options[key] < least:
            raise UserError(f"{key}={options[key]}: give a whole number, {least} or more")
    values = compose(given.overrides, CONFIGS).values["data"]
    values |= {key: value for key, value in _HERE.items() if key in values}
    data_module = create_data_module(**values)
    data_module.prepare_data()
    chosen = (options[key] for key in ("first", "count", "epoch"))
    samples = list(read_samples(data_module, split, *chosen))
    title = f"{data_module.title}, {split}"
    picture = folder / f"{values['name']}_{split}.png"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        draw_sheet(samples, data_module.classes).save(picture)
        page = write_samples(picture.with_suffix(".html"), title, samples, data_module.classes)
    except OSError as error:
        raise UserError(f"output={folder}: {error.strerror or error}") from error
    print(picture, page, sep="\n")


def read_samples(
    data_module: SegmentationData, split: SplitName, first: int, count: int, epoch: int = 0
) -> Iterator[Sample]:
    """Samples from number `first` on: of an epoch of training, or of the evaluation images.

    Raises:
        UserError: there are none, or a file cannot be read.
    """
    images: Any
    keys: Iterable[Any]
    if split == "train":
        images = data_module.train_dataloader().dataset
        start = epoch * len(images) + first
        batches = EndlessBatchSampler(len(images), 1, seed=data_module.seed, start=start)
        keys = itertools.islice(itertools.chain.from_iterable(batches), count)
    else:
        images = data_module.val_dataloader().dataset
        keys = range(first, min(first + count, len(images)))
        if not keys:
            raise UserError(f"first={first}: there are {len(images)} evaluation images")
    for key in keys:
        yield _sample(images[key], data_module)


def _sample(sample: Mapping[str, Any], data_module: SegmentationData) -> Sample:
    image, mask = sample["image"], sample["mask"]
    height, width = image.shape[:2]
    epoch = f"epoch {sample['epoch']}, " if "epoch" in sample else ""
    labels, counts = np.unique(mask, return_counts=True)
    largest_first = np.argsort(-counts, kind="stable")
    if data_module.superpatches is not None:
        mask = mask.repeat(SUPERPATCH, axis=0).repeat(SUPERPATCH, axis=1)[:height, :width]
    return Sample(
        title=f"{sample['name']} ({epoch}image {sample['index']}), {width}x{height}",
        note=sample.get("unreadable", ""),
        image=image,
        mask=None if data_module.classifies_images else mask,
        shares={int(labels[i]): float(counts[i] / counts.sum()) for i in largest_first},
    )


def legend(samples: Sequence[Sample], classes: Classes) -> list[dict[str, Any]]:
    """What occurs, the most frequent first.

    Returns:
        of each class "label", "name", "color" (None of what is ignored), "share" of the pixels and
        number of the "samples" that it is in.
    """
    shares: Counter[int] = Counter()
    found: Counter[int] = Counter()
    for sample in samples:
        shares.update({label: share / len(samples) for label, share in sample.shares.items()})
        found.update(sample.shares.keys())
    known: dict[int, tuple[str, tuple[int, int, int] | None]]
    known = dict(enumerate(zip(classes.names, classes.palette, strict=True)))
    known[classes.ignore_index] = ("ignored", None)
    return [
        {
            "label": label,
            "name": known[label][0],
            "color": known[label][1],
            "share": share,
            "samples": found[label],
        }
        for label, share in shares.most_common()
    ]


def color_mask(mask: np.ndarray, classes: Classes) -> np.ndarray:
    """(H, W) classes -> (H, W, 3) uint8 in their colours, striped in grey where ignored."""
    rows, columns = np.ogrid[: mask.shape[0], : mask.shape[1]]
    colored = _STRIPES[(rows + columns) // _STRIPE % 2]
    labelled = mask != classes.ignore_index
    colored[labelled] = np.array(classes.palette, np.uint8)[mask[labelled]]
    return colored


def _shrink(sample: Sample, longest: int) -> tuple[np.ndarray, np.ndarray | None]:
    """Image and mask at one size, with no side longer than that."""
    height, width = sample.image.shape[:2]
    factor = min(1.0, longest / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    image = cv2.resize(sample.image, size, interpolation=cv2.INTER_AREA)
    if sample.mask is None:
        return image, None
    return image, cv2.resize(sample.mask, size, interpolation=cv2.INTER_NEAREST_EXACT)


def draw_sheet(samples: Sequence[Sample], classes: Classes) -> Image.Image:
    """One picture of them all: image, mask, both on each other; below, what the colours mean.

    Args:
        samples: at least one.
        classes: that the masks hold.
    """
    tiles, texts = [], []
    for sample in samples:
        image, mask = _shrink(sample, _TILE_SIDE)
        if mask is None:
            tiles.append(image)
            texts.append(f"{legend([sample], classes)[0]['name']}: {sample.title}")
        else:
            colored = color_mask(mask, classes)
            both = cv2.addWeighted(image, 1 - _OPACITY, colored, _OPACITY, 0)
            tiles.append(np.hstack([image, colored, both]))
            texts.append(sample.title)
    height, width = (max(tile.shape[axis] for tile in tiles) for axis in (0, 1))
    cells = zip(tiles, texts, strict=True)
    parts = [_grid([_cell(*cell, (width, height + _LINE), (0, _LINE), (0, 0)) for cell in cells])]
    if samples[0].mask is not None:
        swatch = np.empty((_LINE - 6, _LINE - 6), np.uint8)
        entries = [
            (
                color_mask(np.full_like(swatch, entry["label"]), classes),
                f"{100 * entry['share']:.1f} %  {entry['name']}",
            )
            for entry in legend(samples, classes)
        ]
        parts.append(
            _grid([_cell(*entry, (_ENTRY, _LINE), (0, 3), (_LINE, 0)) for entry in entries])
        )
    sheet = Image.new("RGB", (max(p.width for p in parts), sum(p.height for p in parts)), "white")
    for number, part in enumerate(parts):
        sheet.paste(part, (0, number * parts[0].height))
    return sheet


def _cell(
    pixels: np.ndarray,
    text: str,
    size: tuple[int, int],
    pixels_at: tuple[int, int],
    text_at: tuple[int, int],
) -> Image.Image:
    cell = Image.new("RGB", size, "white")
    ImageDraw.Draw(cell).text(text_at, text, "black", ImageFont.load_default(12))
    cell.paste(Image.fromarray(pixels), pixels_at)
    return cell


def _grid(cells: Sequence[Image.Image]) -> Image.Image:
    """Cells of one size in rows that are not too wide."""
    width, height = cells[0].width + _GAP, cells[0].height + _GAP
    columns = max(1, min(len(cells), _WIDTH // width))
    size = (_GAP + columns * width, _GAP + -(-len(cells) // columns) * height)
    grid = Image.new("RGB", size, "white")
    for number, cell in enumerate(cells):
        row, column = divmod(number, columns)
        grid.paste(cell, (_GAP + column * width, _GAP + row * height))
    return grid


def write_samples(path: Path, title: str, samples: Sequence[Sample], classes: Classes) -> Path:
    """Write a page that shows samples and finds classes in them.

    Args:
        path: of the page; its folder exists.
        title: plain text.
        samples: at least one.
        classes: that the masks hold.
    """
    page = {
        "classes": legend(samples, classes),
        "ignored": classes.ignore_index,
        "stripes": _STRIPES[:, 0].tolist(),
        "samples": [_pack(sample) for sample in samples],
    }
    style, script = (file.read_text(encoding="utf-8") for file in (_STYLE, _SCRIPT))
    occur = len(page["classes"]) - any(one["color"] is None for one in page["classes"])
    sections = [
        f"<style>{style}</style><h1>{html.escape(title)}</h1>",
        f"<p>{occur} of {len(classes.names)} classes occur. Striped pixels are ignored: they are of"
        " no class, or padding. Pointing at an image names the class; a click hides the colours, or"
        " shows them again. A click on a class shows it alone.</p>",
        _BAR,
        '<div id="classes"></div><div id="samples"></div><div id="tip"></div>',
    ]
    return write_page(path, title, sections, {}, {"samples": page}, script)


def _pack(sample: Sample) -> dict[str, Any]:
    image, mask = _shrink(sample, _PAGE_SIDE)
    height, width = image.shape[:2]
    jpeg = simplejpeg.encode_jpeg(np.ascontiguousarray(image), quality=_QUALITY)
    return {
        "title": sample.title,
        "note": sample.note,
        "width": width,
        "height": height,
        "jpeg": base64.b64encode(jpeg).decode(),
        "mask": None if mask is None else base64.b64encode(zlib.compress(mask.tobytes())).decode(),
        "shares": list(sample.shares.items()),
    }


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
