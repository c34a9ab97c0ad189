"""Files for the benchmark of loaders: drawn ones in the layouts and sizes of the real ones.

A drawn image is noise whose spectrum falls like that of photographs, with plain regions, their
edges, and a camera's grain: it takes as many bytes, and a decoder as long, as a real one. Nothing
can be learnt from it.
"""

import io
import zipfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from PIL import Image

from data import create_data_module


@dataclass(frozen=True)
class Layout:
    """What is drawn for one data set, and where it goes.

    Attributes:
        names: of an image and its label below the root, with a place for a number.
        images: how many are drawn by default.
        archives: zip file -> the folder it holds, both below the root.
        size: (height, width) of an image.
        ids: how many raw ids labels hold.
        regions: how many an image has.
        steepness: the exponent by which the amplitude of the noise falls with frequency.
        contrast: standard deviation of the noise, of 255.
        grain: that of the grain.
    """

    names: tuple[str, str]
    images: int
    archives: dict[str, str]
    size: tuple[int, int]
    ids: int
    regions: int
    steepness: float
    contrast: float
    grain: float


# The sizes of files that these numbers give: 51 and 5 kB; 2.4 MB and 21 kB.
LAYOUTS = {
    "ade20k": Layout(
        names=(
            "ADEChallengeData2016/images/training/ADE_train_{:08}.jpg",
            "ADEChallengeData2016/annotations/training/ADE_train_{:08}.png",
        ),
        images=200,
        archives={"ADEChallengeData2016.zip": "ADEChallengeData2016"},
        size=(512, 683),
        ids=151,
        regions=12,
        steepness=1.4,
        contrast=45,
        grain=0,
    ),
    "cityscapes": Layout(
        names=(
            "leftImg8bit/train/aachen/aachen_{:06}_000019_leftImg8bit.png",
            "gtFine/train/aachen/aachen_{:06}_000019_gtFine_labelIds.png",
        ),
        images=24,
        archives={
            "leftImg8bit_trainvaltest.zip": "leftImg8bit",
            "gtFine_trainvaltest.zip": "gtFine",
        },
        size=(1024, 2048),
        ids=34,
        regions=24,
        steepness=1.5,
        contrast=40,
        grain=0.7,
    ),
}


def draw_files(name, root, number, layout=None):
    """Draw training images and labels of a data set into `root`, the same whenever it is called.

    Args:
        name: of the data set, ade20k or cityscapes.
        root: folder.
        number: of images.
        layout: by default that of LAYOUTS.
    """
    draw = partial(_draw_pair, layout or LAYOUTS[name], root)
    with ProcessPoolExecutor() as pool:
        list(pool.map(draw, range(1, number + 1)))


def copy_files(name, source, root, number):
    """Copy the first training images and labels of a data set, as distributed, into `root`."""
    split = create_data_module(name, root=source).find_split("train")
    for index, (_, *names) in enumerate(split.files[:number], start=1):
        for place, file, target in zip(
            (split.images, split.labels), names, LAYOUTS[name].names, strict=True
        ):
            _write(root / target.format(index), place.read(file))


def zip_files(name, root, zipped):
    """Put a data set's files into archives as they are distributed, in the folder `zipped`."""
    zipped.mkdir(parents=True, exist_ok=True)
    for archive, folder in LAYOUTS[name].archives.items():
        with zipfile.ZipFile(zipped / archive, "w", zipfile.ZIP_DEFLATED) as file:
            for path in sorted((root / folder).rglob("*.*")):
                file.write(path, path.relative_to(root))


def mean_sizes(name, root):
    """Bytes of an image and of a label on average."""
    means = []
    for pattern in LAYOUTS[name].names:
        path = root / pattern.format(1)
        means.append(np.mean([p.stat().st_size for p in path.parent.glob(f"*{path.suffix}")]))
    return tuple(means)


def _draw_pair(layout, root, number):
    random = np.random.default_rng(number)
    label = _draw_label(layout, random)
    image = _draw_image(layout, label, random)
    for name, pixels in zip(layout.names, (image, label), strict=True):
        _write(root / name.format(number), _encode(pixels, Path(name).suffix))


def _draw_label(layout, random):
    height, width = layout.size
    borders = np.sort(random.uniform(0.2, 0.8, 2)) * height
    rows = np.searchsorted(borders, np.arange(height))
    label = np.repeat(random.integers(1, layout.ids, 3)[rows, None], width, 1).astype(np.uint8)
    for _ in range(layout.regions):
        corners = random.integers(5, 14)
        angles = np.sort(random.uniform(0, 2 * np.pi, corners))
        radii = random.uniform(0.01, 0.25) * width * random.uniform(0.4, 1, corners)
        directions = np.stack((np.cos(angles), np.sin(angles) * random.uniform(0.4, 1)), 1)
        centre = random.uniform(size=2) * (width, height)
        polygon = (centre + radii[:, None] * directions).astype(np.int32)
        cv2.fillPoly(label, [polygon], int(random.integers(layout.ids)))
    return label


def _draw_image(layout, label, random):
    light = _noise(layout, random)
    channels = [light + 0.25 * _noise(layout, random) for _ in range(3)]
    colors = random.uniform(0, 128, (256, 3))
    image = layout.contrast * np.stack(channels, axis=-1) + colors[label] + 60
    image = cv2.GaussianBlur(image, (0, 0), 0.6)  # as a lens does
    image += layout.grain * random.standard_normal((*layout.size, 1))
    return image.clip(0, 255).astype(np.uint8)


def _noise(layout, random):
    height, width = layout.size
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf  # no mean
    spectrum = np.fft.rfft2(random.standard_normal(layout.size)) / frequency**layout.steepness
    noise = np.fft.irfft2(spectrum, s=layout.size)
    return noise / noise.std()


def _encode(pixels, suffix):
    if suffix == ".jpg":
        return simplejpeg.encode_jpeg(pixels, quality=75, colorsubsampling="420")
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, "PNG")  # chooses a filter for each row, as usual
    return content.getvalue()


def _write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
