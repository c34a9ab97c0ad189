"""Reading of folders and zips, and decoding that is as OpenCV's."""

from __future__ import annotations

import io
import os
import struct
import threading
import zipfile
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from data.decoding import decode_image, decode_label
from data.files import Place, write_file
from segtrain.errors import UserError

SIZE = (21, 34)
COLORS = np.random.default_rng(0).integers(0, 256, (*SIZE, 3), dtype=np.uint8)
GREYS = COLORS[..., 0].copy()


def png(pixels, mode=None, **options):
    file = io.BytesIO()
    image = Image.fromarray(pixels) if mode is None else Image.fromarray(pixels).convert(mode)
    image.save(file, "PNG", **options)
    return file.getvalue()


def with_chunk(kind, content):
    chunks = PngImagePlugin.PngInfo()
    chunks.add(kind, content)
    return {"pnginfo": chunks}


def with_transparency(grey):
    """A grey PNG of which one value is transparent."""
    return png(grey, transparency=int(grey[0, 0]))


def interlaced(pixels):
    """A PNG in Adam7's seven passes, which Pillow does not write."""
    rows = bytearray()
    starts = ((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2))
    for top, left, down, right in (*starts, (1, 0, 2, 1)):
        for row in pixels[top::down, left::right]:
            rows += b"\0" + row.tobytes()
    plain = png(pixels)
    header = plain[16:28] + b"\1"
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    return plain[:8] + b"".join(
        struct.pack(">I", len(content)) + kind + content + zlib.crc32(kind + content).to_bytes(4)
        for kind, content in chunks
    )


def animated(**options):
    file = io.BytesIO()
    frames = [Image.fromarray(np.roll(COLORS, shift, axis=0)) for shift in range(3)]
    frames[0].save(file, "PNG", save_all=True, append_images=frames[1:], **options)
    return file.getvalue()


def rotated():
    exif = Image.Exif()
    exif[0x0112] = 6
    return png(COLORS, exif=exif)


PNGS = {
    "colours": png(COLORS),
    "colours, one transparent": png(COLORS, transparency=tuple(COLORS[0, 0].tolist())),
    "colours with alpha": png(np.dstack([COLORS, GREYS])),
    "colours with gamma": png(COLORS, **with_chunk(b"gAMA", struct.pack(">I", 10000))),
    "colours with a profile": png(COLORS, icc_profile=b"no profile" * 20),
    "colours, interlaced": interlaced(COLORS),
    "colours, 16 bits": cv2.imencode(".png", COLORS.astype(np.uint16) * 200)[1].tobytes(),
    "colours, rotated by EXIF": rotated(),
    "colours, and more bytes": png(COLORS) + b"more",
    "animation": animated(),
    "animation with another first image": animated(default_image=True),
    "one pixel": png(COLORS[:1, :1]),
    "greys": png(GREYS),
    "greys, one transparent": with_transparency(GREYS),
    "greys with alpha": png(GREYS, "LA"),
    "greys, interlaced": interlaced(GREYS),
    "greys, 16 bits": png(GREYS.astype(np.uint16) * 200),
    "greys, significant bits": png(GREYS, **with_chunk(b"sBIT", b"\5")),
    "black and white": png(GREYS > 100),
    "palette": png(GREYS, "P"),
    "palette of four colours": png(GREYS % 4, "P", bits=2),
}


def by_opencv(content, flags):
    return cv2.imdecode(np.frombuffer(content, np.uint8), flags)


@pytest.mark.parametrize("kind", PNGS)
def test_images_are_those_that_opencv_decodes(kind):
    expected = by_opencv(PNGS[kind], cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION)
    image = decode_image(PNGS[kind], "x.png")
    assert image.dtype == np.uint8
    np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize("kind", PNGS)
def test_labels_are_those_that_opencv_decodes(kind):
    expected = by_opencv(PNGS[kind], cv2.IMREAD_UNCHANGED)
    if expected.ndim == 2 and expected.dtype == np.uint8:
        np.testing.assert_array_equal(decode_label(PNGS[kind], "x.png"), expected)
    else:
        with pytest.raises(UserError, match=r"x\.png: a label file has one 8-bit channel"):
            decode_label(PNGS[kind], "x.png")


def test_pngs_of_all_row_filters():
    """Encoders choose among five of them by the rows."""
    smooth = cv2.resize(COLORS, (340, 210))
    for pixels in (smooth, np.repeat(smooth[:1], 50, axis=0), smooth[:, :1]):
        for level in (0, 6):
            content = png(pixels, compress_level=level)
            np.testing.assert_array_equal(decode_image(content, "x.png"), pixels)
            content = png(pixels[..., 0], compress_level=level)
            np.testing.assert_array_equal(decode_label(content, "x.png"), pixels[..., 0])


@pytest.mark.parametrize(("kind", "decode"), [("colours", decode_image), ("greys", decode_label)])
def test_a_png_cut_short_anywhere_is_an_error(kind, decode):
    content = PNGS[kind]
    for end in (*range(0, len(content), 7), *range(len(content) - 30, len(content))):
        with pytest.raises(UserError, match=r"x\.png is damaged or cut short"):
            decode(content[:end], "x.png")


@pytest.mark.parametrize(("kind", "decode"), [("colours", decode_image), ("greys", decode_label)])
def test_a_png_with_a_wrong_byte_anywhere_is_an_error(kind, decode):
    content = PNGS[kind]
    for position in range(0, len(content) - 4, 7):  # OpenCV ignores the last checksum
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(UserError, match=r"x\.png is damaged or cut short"):
            decode(bytes(damaged), "x.png")


@pytest.mark.parametrize("content", [b"", b"\x89PNG\r\n\x1a\n", b"<html>404</html>", b"\xff\xd8"])
def test_what_is_no_picture_is_an_error(content):
    for decode in (decode_image, decode_label):
        with pytest.raises(UserError, match="damaged"):
            decode(content, "x.png")


def write_zip(path: Path, method: int = zipfile.ZIP_STORED, **contents: bytes) -> Place:
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.mkdir("folder")
        for name, content in contents.items():
            archive.writestr(f"folder/{name}", content)
    return Place(path, "folder/")


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_of_a_zip(tmp_path, method):
    contents = {"colours": PNGS["colours"], "empty": b"", "zeros": bytes(100000), "ä": b"x"}
    place = write_zip(tmp_path / "a.zip", method, **contents)
    assert place.names("") == sorted(contents)
    assert {name: place.read(name) for name in contents} == contents
    assert place.has("empty")
    assert not place.has("folder")
    assert not place.has("nothing")


def test_a_zip_with_more_than_32_bits_can_say(tmp_path, monkeypatch):
    """Sizes and offsets then are in extra fields, and the header is longer than the directory's."""
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 100)
    place = write_zip(tmp_path / "a.zip", one=PNGS["colours"], two=PNGS["greys"])
    with zipfile.ZipFile(tmp_path / "a.zip") as archive:
        assert archive.infolist()[-1].extra
    assert place.read("one") == PNGS["colours"]
    assert place.read("two") == PNGS["greys"]


def test_a_zip_behind_other_bytes(tmp_path):
    write_zip(tmp_path / "a.zip", one=b"content")
    content = (tmp_path / "a.zip").read_bytes()
    (tmp_path / "b.zip").write_bytes(b"#!/bin/sh\n" + content)
    assert Place(tmp_path / "b.zip", "folder/").read("one") == b"content"


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_damaged_member_is_named(tmp_path, method):
    place = write_zip(tmp_path / "a.zip", method, one=PNGS["colours"], two=PNGS["greys"])
    content = bytearray(place.path.read_bytes())
    header = content.index(b"folder/one")
    for position in (header - 30, header + 15, header + 1000):
        damaged = bytearray(content)
        damaged[position] ^= 0x10
        path = tmp_path / f"{position}.zip"
        path.write_bytes(damaged)
        place = Place(path, "folder/")
        with pytest.raises(UserError) as error:
            place.read("one")
        assert str(error.value) == f"{place}/one is damaged: get {path.name} again"
        assert place.read("two") == PNGS["greys"]


def test_encrypted_and_rare_members(tmp_path):
    place = write_zip(tmp_path / "a.zip", zipfile.ZIP_LZMA, one=b"content" * 100)
    with pytest.raises(UserError, match=r"one is encrypted or compressed by a rare method: unpack"):
        place.read("one")
    place = write_zip(tmp_path / "b.zip", one=b"content")
    content = bytearray(place.path.read_bytes())
    content[content.rindex(b"PK\1\2") + 8] |= 1  # the directory's flag
    place.path.write_bytes(content)
    with pytest.raises(UserError, match=r"one is encrypted or compressed by a rare method: unpack"):
        place.read("one")


@pytest.mark.parametrize("zipped", [False, True])
def test_a_missing_file(tmp_path, zipped):
    place = write_zip(tmp_path / "a.zip") if zipped else Place(tmp_path)
    with pytest.raises(UserError) as error:
        place.read("x.png")
    assert str(error.value) == f"{place}/x.png is missing: put it back from the data set's archive"


def test_a_file_that_cannot_be_read(tmp_path):
    (tmp_path / "x.png").mkdir()
    with pytest.raises(UserError, match=r"x\.png cannot be read \(Is a directory\): look at its"):
        Place(tmp_path).read("x.png")


def test_threads_read_one_zip_at_once(tmp_path):
    generator = np.random.default_rng(0)
    contents = {f"{i}": generator.bytes(20000) for i in range(30)}
    place = write_zip(tmp_path / "a.zip", **contents)
    wrong = []

    def read_all() -> None:
        for _ in range(20):
            wrong.extend(name for name in contents if place.read(name) != contents[name])

    threads = [threading.Thread(target=read_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_written_file_is_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "new/file"
    write_file(path, b"first")
    monkeypatch.setattr(Path, "replace", lambda *_: os.abort)  # killed before the end
    write_file(path, b"second")
    assert path.read_bytes() == b"first"
