"""Label pictures, a video or what a camera sees by a trained network.

python predict.py ckpt=runs/NAME input=FOLDER
python predict.py ckpt=runs/NAME input=FOLDER setting=isr_2211_222 output=reduced
python predict.py --help
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from command_line import (
    NETWORK_OPTIONS,
    Arguments,
    open_network,
    read_arguments,
    run_command,
)
from segtrain.errors import Stopped, UserError, first_line

if TYPE_CHECKING:
    import numpy as np

    from prediction.inputs import Item
    from prediction.writing import Output
    from segtrain import TrainedNetwork

OPTIONS = {
    **NETWORK_OPTIONS,
    "input": "FOLDER | IMAGE | VIDEO | 'GLOB' | camera:0",
    "output": "folder of the results; predictions if left out",
    "overlay": "opacity of the colours on the pictures, 0.5 if left out; false: label maps alone",
    "batch_size": "pictures of one size that are labelled at a time, 8 if left out",
    "overwrite": "true: label again what is there, whatever labelled it",
}
USAGE = """\
Labels pictures, a video or what a camera sees by a trained network.

usage: predict.py ckpt=RUN input=FOLDER [setting=NAME] [output=FOLDER] [key=value ...]

For each picture NAME.jpg, in the same folders below output=:
  NAME.png          the number of the class of each pixel, with the palette; 16 bits and no palette
                    for more than 256 classes
  NAME_overlay.jpg  the picture with the colours of the classes on it
Where a.jpg and a.png are in one folder, they become a.jpg.png and a.png.png. Pictures are turned as
EXIF says, and may have any size up to 178 megapixels. A video becomes NAME.mp4, a camera
camera_0.mp4 until Ctrl-C.

Stopped or killed, the same command goes on: what is there is not labelled again, and nothing is
there in part. output/predict.json says what labelled it; another network, setting or inference is
refused there. Pictures that cannot be read are left out and named at the end, and the status is 1.
"""


def main(arguments: list[str]) -> int:
    """Run the command line.

    Returns:
        Its status: 0; 1 if some pictures could not be labelled; 2 for a user's slip; 130 if
        interrupted.
    """
    return run_command(run, arguments)


def run(arguments: list[str]) -> None:
    """Label what the arguments name."""
    given = read_arguments(arguments, USAGE, OPTIONS)
    if given is None:
        return
    values = check_values(given.values)

    from prediction.inputs import find_camera, find_items, is_video

    text, folder = values["input"], Path(values["output"]).expanduser()
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output={folder}: is a file, and has to be a folder")
    camera = find_camera(text)
    if camera is not None:
        label_one_video(camera, folder / f"camera_{camera}.mp4", given, values)
    elif is_video(text):
        video = Path(text).expanduser()
        label_one_video(video, folder / f"{video.stem}.mp4", given, values)
    else:
        items = find_items(text, folder)
        label_pictures(items, folder, open_labelling(given), values)


def check_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """The command's own options with their defaults.

    Raises:
        UserError: one is missing or cannot be.
    """
    if not values.get("input"):
        raise UserError("input= is needed: a folder, an image, a video, a pattern, or camera:0")
    checked = {"output": "predictions", "overlay": 0.5, "batch_size": 8, "overwrite": False}
    checked |= {key: value for key, value in values.items() if value is not None}
    overlay, batch_size = checked["overlay"], checked["batch_size"]
    if isinstance(overlay, bool):
        checked["overlay"] = 0.5 if overlay else None
    elif not isinstance(overlay, int | float) or not 0 < overlay <= 1:
        raise UserError(f"overlay={overlay}: false, or an opacity above 0 and up to 1")
    if not isinstance(batch_size, int) or isinstance(batch_size, bool) or batch_size < 1:
        raise UserError(f"batch_size={batch_size}: a whole number, at least 1")
    if not isinstance(checked["overwrite"], bool):
        raise UserError(f"overwrite={checked['overwrite']}: true or false")
    return checked


def open_labelling(given: Arguments) -> TrainedNetwork:
    """The network that labels.

    Raises:
        UserError: it cannot be had, or labels no pixels.
    """
    import torch

    trained = open_network(given)
    if trained.network.classifies_images:
        raise UserError("this network gives one class to a whole image: there are no label maps")
    torch.set_float32_matmul_precision(trained.config["matmul_precision"])
    return trained


def label_pictures(
    items: Sequence[Item], folder: Path, trained: TrainedNetwork, values: Mapping[str, Any]
) -> None:
    """Label those of the pictures that have no results yet.

    Raises:
        UserError: the results cannot be written, or others are there.
        Stopped: some pictures could not be labelled.
    """
    from PIL import Image

    from prediction.writing import Output, describe_results
    from progress import Progress

    warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)
    output = Output(folder, trained, values["overlay"])
    record = describe_results(trained, source(values))
    output.open(items, record, values["overwrite"])
    overlay = values["overlay"] is not None
    left = [item for item in items if not item.is_done(overlay)]
    if len(left) < len(items):
        print(f"{len(items) - len(left)} of {len(items)} pictures are labelled already")
    if len(trained.classes.names) > 256:
        print(f"{len(trained.classes.names)} classes: label maps of 16 bits, without a palette")
    # Where the cost depends on the image, pictures are scored one by one anyway.
    batch_size = 1 if trained.network.data_dependent else values["batch_size"]
    failed: dict[Item, str] = {}
    try:
        with Progress(len(left), "images") as bar:
            for count in label_all(left, output, batch_size, failed):
                bar.advance(count)
    except KeyboardInterrupt:
        raise KeyboardInterrupt("the same command goes on") from None
    finally:
        output.close()
    if left:
        print(f"{len(left) - len(failed)} pictures labelled in {folder}, {bar.speed}")
    if failed:
        lines = [f"{item.image}: {reason}" for item, reason in sorted(failed.items(), key=str)]
        raise Stopped("\n".join([f"{len(failed)} pictures not labelled", *lines]), status=1)


def label_all(
    items: Sequence[Item], output: Output, batch_size: int, failed: dict[Item, str]
) -> Iterator[int]:
    """Read, label and write side by side; yields how many pictures were done.

    Args:
        items: the pictures.
        output: where the results go.
        batch_size: pictures of one size at a time.
        failed: gets why a picture could not be labelled.
    """
    from collections import deque
    from concurrent.futures import Future, ThreadPoolExecutor

    from prediction.reading import (
        Unreadable,
        group_by_size,
        read_ahead,
        read_upright,
        reading_threads,
    )

    threads = reading_threads()

    def readable() -> Iterator[tuple[Item, np.ndarray]]:
        for item, image in read_ahead(items, lambda item: read_upright(item.image), threads):
            if isinstance(image, Unreadable):
                failed[item] = str(image)
            else:
                yield item, image

    def write(item: Item, image: np.ndarray, classes: np.ndarray) -> None:
        try:
            output.write(item, image, classes)
        except ValueError as error:  # a JPEG has at most 65500 pixels along a side
            failed[item] = f"cannot be written: {first_line(error)}"
        except OSError as error:
            raise UserError(f"cannot write {item.mask}: {error.strerror or error}") from error

    writing: deque[Future[None]] = deque()
    told = 0
    with ThreadPoolExecutor(threads, thread_name_prefix="write") as pool:
        for batch in group_by_size(readable(), batch_size):
            classes = label(output.trained, [image for _, image in batch])
            for (item, image), found in zip(batch, classes, strict=True):
                if isinstance(found, str):
                    failed[item] = found
                else:
                    writing.append(pool.submit(write, item, image, found))
            done = len(batch)
            yield done
            told += done
            while len(writing) > 2 * max(threads, batch_size):
                writing.popleft().result()
        for future in writing:
            future.result()
    yield len(items) - told  # those that could not be read


def label(trained: TrainedNetwork, images: Sequence[np.ndarray]) -> list[np.ndarray | str]:
    """The classes (H, W) of pictures of one size, or why there are none."""
    import numpy as np
    import torch

    try:
        return list(trained.predict(np.stack(images)))
    except ValueError as error:  # too small for the setting, say
        return [first_line(error)] * len(images)
    except (RuntimeError, MemoryError) as error:
        # On a CPU, torch says so in words alone.
        lacking = (torch.cuda.OutOfMemoryError, MemoryError)
        if not isinstance(error, lacking) and "allocate memory" not in str(error):
            raise
    if len(images) > 1:
        half = len(images) // 2
        return label(trained, images[:half]) + label(trained, images[half:])
    height, width = images[0].shape[:2]
    hint = "" if trained.inference.mode == "slide" else ": inference.mode=slide needs less"
    return [f"{width}x{height} pixels do not fit into the device's memory{hint}"]


def label_one_video(
    video: Path | int, path: Path, given: Arguments, values: Mapping[str, Any]
) -> None:
    """Label a video or what a camera sees, and say how fast it went.

    Args:
        video: a file, or the number of a camera.
        path: of the video that is written.
        given: names the network.
        values: the command's own options.

    Raises:
        UserError: it cannot be read or written, or a video is there.
    """
    if isinstance(video, Path):
        if not video.is_file():
            raise UserError(f"input={video}: there is no such file")
        if video.resolve() == path.resolve():
            raise UserError(f"output={values['output']}: {path} is the video to be labelled")
    if path.exists() and not values["overwrite"]:
        raise UserError(f"{path} is there: overwrite=true, or another output=")

    from prediction.video import label_video
    from prediction.writing import Output

    trained = open_labelling(given)
    output = Output(path.parent, trained, values["overlay"])
    output.prepare()
    one_by_one = isinstance(video, int) or trained.network.data_dependent
    batch_size = 1 if one_by_one else values["batch_size"]
    try:
        print(label_video(video, path, output, batch_size, values["input"]))
    except KeyboardInterrupt as interrupt:
        if isinstance(video, Path):
            raise
        print(interrupt)  # the way to end a camera's
    finally:
        output.close()


def source(values: Mapping[str, Any]) -> str:
    """What labels, as it was named."""
    return str(values.get("ckpt") or values.get("weights"))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
