"""Label maps of folders, files and videos by the command line, killed, damaged and misspelt."""

import io
import itertools
import json
import os
import re
import signal
import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
import simplejpeg
import torch
from PIL import Image, ImageOps

import predict
import train
from prediction import writing
from prediction.inputs import find_items
from prediction.reading import group_by_size, read_upright
from segtrain import from_run
from segtrain.trained import TrainedNetwork
from segtrain.training import SegmentationModule
from tests.micro_run import CLASSES, MODEL, write_checkpoint, write_run

SIZES = [(40, 72), (33, 47), (64, 48)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture
def label(run, in_folder, capsys):
    """Run the command line, by the network of `run` on the CPU; gives its status and its texts."""

    def label(*arguments, ckpt=run):
        status = predict.main([f"ckpt={ckpt}", "device=cpu", *arguments])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return label


@pytest.fixture
def fails(label):
    """Run the command line and give back its one line of error."""

    def fails(*arguments, **options):
        status, _, error = label(*arguments, **options)
        assert status == 2
        assert error.startswith("segtrain: error: ")
        assert error.count("\n") == 1
        return error

    return fails


def pixels(number):
    """Blocks of colours, of one of three sizes."""
    height, width = SIZES[number % len(SIZES)]
    blocks = np.random.default_rng(number).integers(0, 256, (5, 5, 3), dtype=np.uint8)
    return np.kron(blocks, np.ones((16, 16, 1), np.uint8))[:height, :width].copy()


def write_pictures(folder, count):
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        content = simplejpeg.encode_jpeg(pixels(number), quality=95)
        (folder / f"{number:03d}.jpg").write_bytes(content)
    return folder


def results(folder):
    """All files of a folder by their names in it."""
    files = {
        path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()
    }
    files.pop("predict.json")
    return files


def assert_whole(folder, count):
    """So many label maps and overlays, each of its picture, and nothing else."""
    assert set(results(folder)) == {
        f"{number:03d}{end}" for number in range(count) for end in (".png", "_overlay.jpg")
    }
    for number in range(count):
        height, width = SIZES[number % len(SIZES)]
        with Image.open(folder / f"{number:03d}.png") as mask:
            mask.load()
            assert (mask.mode, mask.size) == ("P", (width, height))
        overlay = (folder / f"{number:03d}_overlay.jpg").read_bytes()
        assert simplejpeg.decode_jpeg(overlay).shape == (height, width, 3)
    assert not [path for path in folder.iterdir() if path.is_dir()]


def test_a_folder_becomes_label_maps_and_overlays(label, run, in_folder):
    write_pictures(in_folder / "in", 7)
    write_pictures(in_folder / "in" / "deep" / "er", 1)
    status, printed, _ = label("input=in")
    assert status == 0
    assert re.fullmatch(r"8 pictures labelled in predictions, [\d.]+ images/s\n", printed)
    written = results(in_folder / "predictions")
    assert len(written) == 16
    assert {"deep/er/000.png", "deep/er/000_overlay.jpg"} <= set(written)
    trained = from_run(run, device="cpu")
    for number in range(7):
        image = read_upright(in_folder / f"in/{number:03d}.jpg")
        mask = Image.open(written[f"{number:03d}.png"])
        expected = trained.predict(image)
        assert (np.asarray(mask) == expected).mean() > 0.999  # another batch
        assert mask.getpalette()[: 3 * 19] == list(itertools.chain(*CLASSES["palette"]))
        overlay = simplejpeg.decode_jpeg(written[f"{number:03d}_overlay.jpg"].read_bytes())
        blended = (image.astype(float) + trained.color(expected)) / 2
        assert np.abs(overlay - blended).mean() < 6  # of JPEG
    record = json.loads((in_folder / "predictions/predict.json").read_text())
    assert (record["source"], record["step"]) == (str(run), 3)
    assert record["results"]["setting"]["name"] == "full"


def test_predictions_are_those_of_the_validation(small, in_folder, monkeypatch):
    """Also where the run scores an average of its weights."""
    validated = {}
    validation_step = SegmentationModule.validation_step

    def step(self, batch, batch_index):
        outputs = validation_step(self, batch, batch_index)
        validated[batch["name"][0]] = outputs["prediction"][0].cpu().numpy()
        return outputs

    monkeypatch.setattr(SegmentationModule, "validation_step", step)
    arguments = [*small, "data.eval_batch_size=1", "callbacks.ema={decay: 0.5}", "name=run"]
    arguments += ["~callbacks.cost_curve", "~callbacks.report", "~callbacks.pictures"]
    assert train.main(arguments) == 0
    assert len(validated) == 5
    scenes = Path(small[0].removeprefix("data.root="))
    found = sorted(scenes.glob("cityscapes-64x128-24-5-v1/leftImg8bit/val/*/*.png"))
    assert len(found) == 5
    trained = from_run("runs/run", "last", device="cpu")
    assert trained.classes.names[:2] == ("road", "sidewalk")
    for path in found:
        name = path.name.removesuffix("_leftImg8bit.png")
        assert (trained.predict(read_upright(path)) == validated[name]).all()

    resized = [*arguments, "data.eval_scale=[96,48]", "data.size_divisor=32"]
    assert train.main([*resized, "name=resized"]) == 0
    trained = from_run("runs/resized", "last", device="cpu")
    for path in found:
        name = path.name.removesuffix("_leftImg8bit.png")
        assert (trained.predict(read_upright(path)) == validated[name]).mean() > 0.97


def test_names_of_results_never_meet(in_folder):
    folder = in_folder / "in"
    folder.mkdir()
    names = ["a.jpg", "a.png", "A.bmp", "a.jpg.png", "b.jpg", "b_overlay.jpg", "c.d.jpg"]
    for name in names:
        (folder / name).touch()
    items = find_items("in", Path("out"))
    masks = {item.image.name: item.mask.name for item in items}
    assert masks == {
        "A.bmp": "A.bmp.png",
        "a.jpg": "a.jpg.png",
        "a.jpg.png": "a.jpg.png.png",
        "a.png": "a.png.png",
        "b.jpg": "b.png",
        "b_overlay.jpg": "b_overlay.png",
        "c.d.jpg": "c.d.png",
    }
    written = [path for item in items for path in (item.mask, item.overlay)]
    assert len(set(written)) == 2 * len(names)


def test_a_file_a_pattern_and_a_folder_of_links(label, in_folder):
    write_pictures(in_folder / "in", 3)
    (in_folder / "links").mkdir()
    (in_folder / "links" / "more").symlink_to(in_folder / "in")
    (in_folder / "in" / "loop").symlink_to(in_folder / "in")
    assert label("input=in/001.jpg", "output=one", "overlay=false")[0] == 0
    assert set(results(in_folder / "one")) == {"001.png"}
    assert label("input=in/*[02].jpg", "output=two", "overlay=0.2")[0] == 0
    assert len(results(in_folder / "two")) == 4
    assert label("input=**/00?.jpg", "output=three", "overlay=false")[0] == 0
    assert {"in/000.png", "in/001.png", "in/002.png"} <= set(results(in_folder / "three"))
    assert label("input=links", "output=four", "overlay=false")[0] == 0
    assert set(results(in_folder / "four")) == {f"more/00{n}.png" for n in range(3)}


def test_results_are_not_read_as_pictures(label, fails, in_folder):
    write_pictures(in_folder / "in", 2)
    for _ in range(2):
        assert label("input=in", "output=in/out")[0] == 0
        assert len(results(in_folder / "in/out")) == 4
    assert label("input=in/**/*", "output=in/out")[0] == 0
    assert len(results(in_folder / "in/out")) == 4
    assert "output=in is where the pictures are" in fails("input=in", "output=in")
    assert "output=in is where the pictures are" in fails("input=in/*.jpg", "output=in")
    Image.fromarray(pixels(0)).save(in_folder / "in" / "p.png")
    line = fails("input=in/p.png", "output=in")
    assert "in/p.png is a picture to be labelled; choose another folder" in line


def test_what_cannot_be_read_is_named_and_left_out(label, in_folder, monkeypatch):
    folder = write_pictures(in_folder / "in", 2)
    whole = (folder / "000.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "text.jpg").write_text("no picture")
    (folder / "empty.png").touch()
    (folder / "bomb.png").write_bytes(bomb(20000, 20000))
    png = io.BytesIO()
    Image.fromarray(pixels(0)).save(png, "PNG")
    (folder / "cut.png").write_bytes(png.getvalue()[:-200])
    (folder / "gone.jpg").symlink_to("nowhere")
    status, printed, error = label("input=in")
    assert status == 1
    assert printed.startswith("2 pictures labelled in predictions")
    assert error.splitlines() == [
        "segtrain: 5 pictures not labelled",
        "in/bomb.png: more than 178 megapixels",
        "in/cut.jpg: damaged, cut short or no picture",
        "in/cut.png: damaged, cut short or no picture",
        "in/empty.png: empty",
        "in/text.jpg: damaged, cut short or no picture",
    ]
    assert len(results(in_folder / "predictions")) == 4
    # Mended, they are labelled, and the others not again.
    for path in folder.iterdir():
        if path.name not in ("000.jpg", "001.jpg"):
            path.unlink()
    (folder / "cut.jpg").write_bytes(whole)
    status, printed, _ = label("input=in")
    assert status == 0
    assert printed.startswith("2 of 3 pictures are labelled already\n1 pictures labelled")


def bomb(width, height):
    """A small PNG that says it is large."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(c)) + kind + c + struct.pack(">I", zlib.crc32(kind + c))
        for kind, c in chunks
    )


@pytest.mark.parametrize("orientation", range(1, 9))
def test_pictures_are_turned_upright(tmp_path, orientation):
    image = pixels(0)
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(image).save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert (read_upright(tmp_path / "a.png") == expected).all()
    Image.fromarray(image).save(tmp_path / "a.jpg", exif=exif, quality=95)
    turned = read_upright(tmp_path / "a.jpg")
    assert turned.shape == expected.shape
    assert np.abs(turned.astype(int) - expected).mean() < 10


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "I;16", "CMYK"])
def test_pictures_of_all_kinds(label, in_folder, mode):
    (in_folder / "in").mkdir()
    if mode == "I;16":
        image = Image.fromarray(pixels(0)[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(pixels(0)).convert(mode)
    image.save(in_folder / "in" / ("a.jpg" if mode == "CMYK" else "a.png"))
    assert label("input=in")[0] == 0
    assert Image.open(in_folder / "predictions/a.png").size == (72, 40)


def test_any_size(label, in_folder):
    (in_folder / "in").mkdir()
    for width, height in [(1, 1), (3, 200), (701, 5)]:
        size = f"{width}x{height}"
        Image.new("RGB", (width, height), "red").save(in_folder / "in" / f"{size}.png")
        assert label(f"input=in/{size}.png")[0] == 0
        assert Image.open(in_folder / f"predictions/{size}.png").size == (width, height)


def test_batches_are_of_one_size_and_none_is_lost(monkeypatch):
    images = [(number, pixels(number)) for number in range(20)]
    batches = list(group_by_size(images, 4))
    assert sorted(key for batch in batches for key, _ in batch) == list(range(20))
    assert all(len({image.shape for _, image in batch}) == 1 for batch in batches)
    assert [len(batch) for batch in batches] == [4, 4, 4, 3, 3, 2]
    monkeypatch.setattr("prediction.reading.MOST_PIXELS", 40 * 72 * 2)
    assert max(len(batch) for batch in group_by_size(images, 4)) == 3
    monkeypatch.setattr("prediction.reading.MOST_WAITING", 40 * 72 * 2)
    early = list(group_by_size(images, 100))
    assert sorted(key for batch in early for key, _ in batch) == list(range(20))


def test_more_than_256_classes_have_16_bits_and_no_palette():
    classes = np.array([[0, 299], [256, 7]])
    palette = [(n % 256, 0, 0) for n in range(300)]
    image = Image.open(io.BytesIO(writing.index_png(classes, palette)))
    assert image.mode.startswith("I;16")
    assert (np.asarray(image) == classes).all()
    assert image.getpalette() is None


def test_another_network_or_setting_does_not_mix(label, fails, run, in_folder):
    write_pictures(in_folder / "in", 3)
    assert label("input=in")[0] == 0
    before = {name: path.read_bytes() for name, path in results(in_folder / "predictions").items()}
    line = fails("input=in", "setting=isr_2211_222")
    assert "holds results of another setting" in line
    assert "setting full, not isr_2211_222): choose another folder, or overwrite=true" in line
    assert "another weights" in fails("input=in", ckpt=run / "checkpoints/last.ckpt")
    changed = ["inference.mode=slide", "inference.window=[32,32]", "inference.stride=[16,16]"]
    assert "another inference" in fails("input=in", *changed)
    # The same weights by another way.
    status, printed, _ = label("input=in", ckpt=run / "checkpoints/best.ckpt")
    assert (status, printed) == (0, "3 of 3 pictures are labelled already\n")
    last = run / "checkpoints/last.ckpt"
    assert label("input=in", "overwrite=true", ckpt=last)[0] == 0
    after = {name: path.read_bytes() for name, path in results(in_folder / "predictions").items()}
    assert before.keys() == after.keys()
    assert before != after
    assert "another weights" in fails("input=in")


def test_files_of_somebody_else_are_left_alone(fails, in_folder):
    write_pictures(in_folder / "in", 2)
    (in_folder / "mine").mkdir()
    (in_folder / "mine/001.png").write_text("mine")
    line = fails("input=in", "output=mine")
    assert "mine/001.png is there, and output=mine has no predict.json" in line
    assert (in_folder / "mine/001.png").read_text() == "mine"


def killed(arguments, finishes):
    """Run in a fork that is killed while its n-th file is about to get its name."""
    pid = os.fork()
    if pid == 0:
        finish, left = writing.Output.finish, finishes

        def die(self, temporary, path):
            nonlocal left
            left -= 1
            if left <= 0:
                temporary.write_bytes(temporary.read_bytes()[:10])
                os.kill(os.getpid(), signal.SIGKILL)
            finish(self, temporary, path)

        writing.Output.finish = die
        try:
            predict.main(arguments)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def check_kill(label, run, in_folder, count, kills):
    write_pictures(in_folder / "in", count)
    folder = in_folder / "predictions"
    before = {}
    for finishes in kills:
        killed([f"ckpt={run}", "device=cpu", "input=in", "batch_size=3"], finishes)
        done = {p: p.stat().st_mtime_ns for p in folder.glob("*.png")}
        assert before.items() <= done.items()
        before = done
    assert 0 < len(before) < count
    status, printed, _ = label("input=in", "batch_size=3")
    assert status == 0
    assert printed.startswith(f"{len(before)} of {count} pictures are labelled already\n")
    assert f"{count - len(before)} pictures labelled in predictions" in printed
    assert {path: path.stat().st_mtime_ns for path in before} == before  # each once
    assert_whole(folder, count)


def test_killed_and_started_again_each_is_labelled_once(label, run, in_folder):
    check_kill(label, run, in_folder, count=40, kills=[20, 31])


@pytest.mark.slow
def test_500_pictures_killed_and_started_again(label, run, in_folder):
    check_kill(label, run, in_folder, count=500, kills=[150, 351, 1])


def test_two_at_once_leave_whole_results(label, run, in_folder):
    write_pictures(in_folder / "in", 30)
    pid = os.fork()
    if pid == 0:
        status = 9
        try:
            status = predict.main([f"ckpt={run}", "device=cpu", "input=in"])
        finally:
            os._exit(status)
    status, _, _ = label("input=in")
    assert status == 0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert_whole(in_folder / "predictions", 30)


def test_a_disk_that_is_full_is_one_line(fails, in_folder, monkeypatch):
    write_pictures(in_folder / "in", 5)

    def full(self, temporary, path):
        if path.suffix == ".png":
            raise OSError(28, "No space left on device")
        temporary.replace(path)

    monkeypatch.setattr(writing.Output, "finish", full)
    assert re.search(r"cannot write predictions/00\d.png: No space left", fails("input=in"))
    assert not list((in_folder / "predictions").glob(".*"))


def test_ctrl_c_says_how_to_go_on(label, in_folder, monkeypatch):
    write_pictures(in_folder / "in", 12)
    interrupt_after(2, monkeypatch)
    status, _, error = label("input=in", "batch_size=2")
    assert status == 130
    assert error == "segtrain: interrupted; the same command goes on\n"
    monkeypatch.undo()


def interrupt_after(calls, monkeypatch):
    original, count = TrainedNetwork.predict, 0

    def interrupted(self, images):
        nonlocal count
        count += 1
        if count > calls:
            raise KeyboardInterrupt
        return original(self, images)

    monkeypatch.setattr(TrainedNetwork, "predict", interrupted)


def test_batches_that_do_not_fit_are_halved(label, in_folder, monkeypatch):
    write_pictures(in_folder / "in", 12)
    original = TrainedNetwork.predict

    def small(self, images):
        if len(images) * images.shape[1] > 80:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return original(self, images)

    monkeypatch.setattr(TrainedNetwork, "predict", small)
    assert label("input=in")[0] == 0
    assert_whole(in_folder / "predictions", 12)
    Image.new("RGB", (20, 90)).save(in_folder / "in/tall.png")
    status, _, error = label("input=in")
    assert status == 1
    assert error.endswith(
        "in/tall.png: 20x90 pixels do not fit into the device's memory: inference.mode=slide needs "
        "less\n"
    )


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ([], "input= is needed: a folder, an image, a video"),
        (["input=nowhere"], "input=nowhere: there is no such file or folder"),
        (["input=nowhere.mp4"], "input=nowhere.mp4: there is no such file"),
        (["input=empty"], "input=empty: no pictures there; they end in .jpg"),
        (["input=empty/*.jpg"], "no pictures there"),
        (["inptu=in"], "unknown argument 'inptu=in': did you mean 'input'"),
        (["input=in", "setting=isr_2211_22"], "did you mean 'isr_2211_222'"),
        (["input=in", "overlay=2"], "overlay=2: false, or an opacity"),
        (["input=in", "batch_size=none"], "batch_size=none: a whole number"),
        (["input=in", "overwrite=2"], "overwrite=2: true or false"),
        (["input=in", "device=gpu"], "device=gpu: "),
        (["input=in", "output=in/000.jpg"], "output=in/000.jpg: "),
        (["input=in", "weights=in/000.jpg"], "give ckpt=runs/NAME, or weights=FILE"),
    ],
)
def test_slips_are_one_line(fails, in_folder, arguments, part):
    (in_folder / "empty").mkdir()
    write_pictures(in_folder / "in", 1)
    assert part in fails(*arguments)
    assert not (in_folder / "predictions").exists()


def test_help_says_what_is_written(capsys):
    assert predict.main(["--help"]) == 0
    text = capsys.readouterr().out
    for part in ("NAME_overlay.jpg", "ckpt=", "overwrite=", "EXIF", "the status is 1"):
        assert part in text


def test_weights_with_a_network_and_a_data_set(run, in_folder, capsys):
    write_checkpoint(in_folder / "weights.pth", config=None)
    write_pictures(in_folder / "in", 1)
    sizes = [f"+model.{key}={value}" for key, value in MODEL.items() if key != "name"]
    arguments = ["weights=weights.pth", "model=edaformer_nano", "device=cpu", "input=in"]
    assert predict.main([*arguments, "data=scenes", *sizes]) == 0
    palette = Image.open(in_folder / "predictions/000.png").getpalette()
    assert palette[:3] == [128, 64, 128]  # of roads
    assert predict.main([*arguments, *sizes]) == 2
    assert "needs model=NAME data=NAME, or experiment=NAME" in capsys.readouterr().err


def test_a_checkpoint_of_before_takes_the_names_from_its_data(label, in_folder):
    write_checkpoint(in_folder / "a.ckpt", classes=None)
    write_pictures(in_folder / "in", 1)
    assert label("input=in", ckpt="a.ckpt")[0] == 0
    assert Image.open(in_folder / "predictions/000.png").getpalette()[:3] == [128, 64, 128]


def test_lines_of_progress_where_there_is_no_terminal(label, in_folder, monkeypatch):
    from progress import Progress

    write_pictures(in_folder / "in", 6)
    monkeypatch.setattr(Progress.__init__, "__defaults__", (0,))
    printed = label("input=in", "batch_size=1")[1].splitlines()
    assert re.fullmatch(r"images 1/6  [\d.]+ images/s", printed[0])
    assert printed[-1].startswith("6 pictures labelled")


def write_video(path, frames=11, size=(36, 64), rate=12.0):
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"mp4v"), rate, size[::-1])
    assert writer.isOpened()
    for number in range(frames):
        writer.write(np.full((*size, 3), 20 * number, np.uint8))
    writer.release()


def read_video(path):
    capture = cv2.VideoCapture(str(path))
    frames = []
    while True:
        there, frame = capture.read()
        if not there:
            return frames, capture.get(cv2.CAP_PROP_FPS)
        frames.append(frame)


def test_a_video_becomes_a_video(label, fails, in_folder):
    write_video(in_folder / "clip.mp4")
    status, printed, _ = label("input=clip.mp4", "batch_size=4")
    assert status == 0
    line = r"11 frames labelled in predictions/clip.mp4, [\d.]+ frames/s\n"
    assert re.fullmatch(line, printed)
    frames, rate = read_video(in_folder / "predictions/clip.mp4")
    assert len(frames) == 11
    assert frames[0].shape == (36, 64, 3)
    assert rate == pytest.approx(12)
    assert [path.name for path in (in_folder / "predictions").iterdir()] == ["clip.mp4"]
    assert "predictions/clip.mp4 is there: overwrite=true" in fails("input=clip.mp4")
    assert label("input=clip.mp4", "overwrite=true")[0] == 0
    assert "clip.mp4 is the video to be labelled" in fails("input=clip.mp4", "output=.")


def test_a_video_that_is_interrupted_can_be_watched(label, in_folder, monkeypatch):
    write_video(in_folder / "clip.mp4")
    interrupt_after(2, monkeypatch)
    status, _, error = label("input=clip.mp4", "batch_size=3")
    assert status == 130
    assert error.startswith("segtrain: interrupted; 6 frames labelled in predictions/clip.mp4")
    assert len(read_video(in_folder / "predictions/clip.mp4")[0]) == 6


def test_a_camera_ends_with_ctrl_c(label, fails, in_folder, monkeypatch):
    write_video(in_folder / "clip.mp4", frames=5)
    opened, capture = [], cv2.VideoCapture

    def camera(source):
        opened.append(source)
        return capture(str(in_folder / "clip.mp4"))

    monkeypatch.setattr(cv2, "VideoCapture", camera)
    interrupt_after(3, monkeypatch)
    assert label("input=0", "output=a")[:1] == (0,)
    monkeypatch.undo()
    monkeypatch.chdir(in_folder)
    assert opened == [0]
    assert len(read_video(in_folder / "a/camera_0.mp4")[0]) == 3
    assert "input=camera:77: no video can be read there" in fails("input=camera:77")


def test_a_video_that_is_none(fails, in_folder):
    (in_folder / "clip.mp4").write_text("no video")
    assert "input=clip.mp4: no video can be read there" in fails("input=clip.mp4")
