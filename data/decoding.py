"""From the bytes of a file to pixels."""

from __future__ import annotations

import io

import cv2
import imagecodecs
import numpy as np
import simplejpeg

from segtrain.errors import UserError

# It would write a line of its own about a damaged file, for which there is one error here.
cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_ERROR)

_JPEG_START = b"\xff\xd8"
_PNG_START = b"\x89PNG\r\n\x1a\n"
_PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# Of a PNG: grey values or colours, and where its header says so with 8 bits and no interlacing.
_GREY, _COLOR = 0, 2
_PIXEL_FORMAT = slice(24, 29)


def decode_image(content: bytes, where: str) -> np.ndarray:
    """Decode a JPEG or PNG to (H, W, 3) uint8 RGB. EXIF rotation is ignored: labels have none.

    Raises:
        UserError: the file is damaged; `where` names it.
    """
    if content.startswith(_JPEG_START):
        try:
            return simplejpeg.decode_jpeg(content, "RGB")
        except ValueError as error:
            if "Premature end" in str(error):
                raise _damaged(where) from None
            # Odd but complete files (unusual subsampling, stray bytes) are left to OpenCV.
    image = _decode_plain_png(content, _COLOR)
    if image is None:
        image = _decode(content, cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    if image is None:
        raise _damaged(where)
    return image


def decode_raw_label(content: bytes, where: str, colors: np.ndarray | None) -> np.ndarray:
    """Decode a label file of any kind to raw ids (H, W) uint8.

    Args:
        content: of the file.
        where: names it; a .mat file by its ending.
        colors: (N, 3) uint8 RGB of the raw ids 0..N-1 where label files show them.

    Raises:
        UserError: the file is damaged, or not a label of this kind.
    """
    if colors is not None:
        return decode_colored_label(content, where, colors)
    return (decode_matlab_label if where.endswith(".mat") else decode_label)(content, where)


def decode_label(content: bytes, where: str) -> np.ndarray:
    """Decode a label PNG to raw ids (H, W) uint8.

    Raises:
        UserError: the file is damaged or not one 8-bit channel; `where` names it.
    """
    label = _decode_plain_png(content, _GREY)
    if label is None:
        label = _decode(content, cv2.IMREAD_UNCHANGED)
    if label is None:
        raise _damaged(where)
    if label.ndim != 2 or label.dtype != np.uint8:
        raise UserError(
            f"{where}: a label file has one 8-bit channel, this one has shape {label.shape} of"
            f" {label.dtype}. Is it a coloured copy? Use the label files as distributed"
        )
    return label


def decode_colored_label(content: bytes, where: str, colors: np.ndarray) -> np.ndarray:
    """Decode a label PNG that shows each class in a colour of its own.

    Args:
        content: of the file.
        where: names it.
        colors: (N, 3) uint8 RGB of the raw ids 0..N-1.

    Returns:
        raw ids, (H, W) uint8.

    Raises:
        UserError: the file is damaged, or shows another colour.
    """
    label = decode_image(content, where)
    codes, known = _color_codes(label), _color_codes(colors)
    order = np.argsort(known)
    ids = order[np.searchsorted(known, codes, sorter=order).clip(max=len(colors) - 1)]
    other = known[ids] != codes
    if other.any():
        color = tuple(label[other][0].tolist())
        raise UserError(
            f"{where}: no class has the colour {color}. Put back the label files as distributed:"
            " resized, converted or repainted ones do not fit"
        )
    return ids.astype(np.uint8)


def _color_codes(colors: np.ndarray) -> np.ndarray:
    """One number for each colour: (..., 3) uint8 -> (...) int32."""
    red, green, blue = np.moveaxis(colors.astype(np.int32), -1, 0)
    return red << 16 | green << 8 | blue


def decode_matlab_label(content: bytes, where: str) -> np.ndarray:
    """Decode the label map `S` of a COCO-Stuff 10k .mat file to the ids of the 164k PNGs.

    A .mat file holds COCO ids with 0 = unlabelled, a PNG holds the COCO id minus one with
    255 = unlabelled: one less in 8-bit arithmetic.

    Returns:
        (H, W) uint8.

    Raises:
        UserError: the file is damaged or has no `S`; `where` names it.
    """
    # Only this one data set needs SciPy, whose import is slow.
    import scipy.io

    try:
        label = scipy.io.loadmat(io.BytesIO(content), variable_names=["S"])["S"]
    except Exception as error:  # SciPy raises many kinds for damaged files
        raise _damaged(where) from error
    return label.astype(np.uint8) - np.uint8(1)


def _decode_plain_png(content: bytes, color_type: int) -> np.ndarray | None:
    """Decode a PNG of the common kind in 3/5 of OpenCV's time; None leaves a file to OpenCV.

    Args:
        content: of the file.
        color_type: `_GREY` for (H, W) uint8, `_COLOR` for (H, W, 3) uint8 RGB.
    """
    header = content[: content.find(b"IDAT")]
    if (
        not header.startswith(_PNG_START)
        or header[_PIXEL_FORMAT] != bytes([8, color_type, 0, 0, 0])
        or b"tRNS" in header  # would become a channel
        or b"acTL" in header  # of an animation, the first frame may be another than the first image
        or not content.endswith(_PNG_END)  # imagecodecs does not miss it
    ):
        return None
    try:
        return imagecodecs.png_decode(content)
    except (imagecodecs.PngError, UnicodeDecodeError):  # a message may quote the file
        return None


def _decode(content: bytes, flags: int) -> np.ndarray | None:
    """None where OpenCV finds no complete image."""
    return cv2.imdecode(np.frombuffer(content, np.uint8), flags) if content else None


def _damaged(where: str) -> UserError:
    return UserError(
        f"{where} is damaged or cut short: replace it by a fresh copy from the data set's archive"
    )
