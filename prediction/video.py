"""A video, or what a camera sees, with the classes' colours on it, as a video."""

from __future__ import annotations

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np

from prediction.writing import Output, blend
from progress import Progress
from segtrain.errors import UserError

#: MPEG-4 part 2, which OpenCV writes wherever it is installed; H.264 it often cannot.
_CODEC = "mp4v"
_USUAL_RATE = 25.0  # frames per second, where a source does not say


def label_video(source: Path | int, path: Path, output: Output, batch_size: int, named: str) -> str:
    """Label the frames of a video or of a camera, until it ends or Ctrl-C.

    Args:
        source: the video, or the number of the camera.
        path: of the video that is written; whole once it is there, also after Ctrl-C.
        output: has the network and the opacity.
        batch_size: frames at a time.
        named: the source in messages.

    Returns:
        What was done, as a line.

    Raises:
        UserError: the source cannot be read, or the video not be written.
        KeyboardInterrupt: after the video was finished; the message is the line.
    """
    capture = cv2.VideoCapture(source if isinstance(source, int) else str(source))
    try:
        if not capture.isOpened():
            raise UserError(f"input={named}: no video can be read there")
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if math.isfinite(rate) and 0 < rate < 1000 else _USUAL_RATE
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if isinstance(source, Path) else 0
        temporary = output.file_in_progress(path.name)
        with _Writer(temporary, rate) as writer, Progress(max(count, 0) or None, "frames") as bar:
            interrupted = False
            try:
                for frames in _batches(capture, batch_size):
                    classes = output.trained.predict(frames)
                    for frame, labels in zip(frames, classes, strict=True):
                        color = output.trained.color(labels)
                        writer.write(blend(frame, color, output.overlay or 1.0))
                    bar.advance(len(frames))
            except KeyboardInterrupt:
                interrupted = True
    finally:
        capture.release()
    if bar.done == 0:
        raise UserError(f"input={named}: holds no frame that can be read")
    output.finish(temporary, path)
    line = f"{bar.done} frames labelled in {path}, {bar.speed}"
    if interrupted:
        raise KeyboardInterrupt(line)
    if bar.done < count:
        line += f"; {named} says that it has {count}"
    return line


def _batches(capture: cv2.VideoCapture, size: int) -> Iterator[np.ndarray]:
    """(B, H, W, 3) uint8 RGB; the next ones are read while these are labelled."""
    with ThreadPoolExecutor(1, thread_name_prefix="read") as pool:
        reading: Future[list[np.ndarray]] = pool.submit(_read, capture, size)
        while frames := reading.result():
            reading = pool.submit(_read, capture, size)
            yield np.stack(frames)


def _read(capture: cv2.VideoCapture, size: int) -> list[np.ndarray]:
    frames: list[np.ndarray] = []
    while len(frames) < size:
        there, frame = capture.read()
        if not there:
            break
        frames.append(cv2.cvtColor(frame, cv2.COLOR_BGR2RGB))
    return frames


class _Writer:
    """A video file that is opened at the first frame, and closed whatever happens."""

    def __init__(self, path: Path, rate: float) -> None:
        self.path = path
        self.rate = rate
        self._writer: cv2.VideoWriter | None = None

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        if self._writer is not None:
            self._writer.release()

    def write(self, frame: np.ndarray) -> None:
        """Add a frame, (H, W, 3) uint8 RGB."""
        if self._writer is None:
            codec = cv2.VideoWriter.fourcc(*_CODEC)
            size = frame.shape[1], frame.shape[0]
            self._writer = cv2.VideoWriter(str(self.path), codec, self.rate, size)
            if not self._writer.isOpened():
                raise UserError(f"{self.path}: this OpenCV writes no video ({_CODEC})")
        self._writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
