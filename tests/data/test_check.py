"""The check of data sets finds what is wrong with files, and nothing else."""

from __future__ import annotations

import functools
import hashlib
import os
import shutil
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest

import data
from data import check
from data.classes import load_class_table
from data.every_file import for_every
from segtrain.errors import UserError
from tests.data.layouts import (
    SIZE,
    WRITERS,
    random_ids,
    random_image,
    write_ade20k,
    write_imagenet,
    write_segnet_camvid,
    zip_dataset,
)

CLASSES = {
    "ade20k": data.ADE20K,
    "camvid": data.CamVid,
    "cityscapes": data.Cityscapes,
    "cocostuff": data.COCOStuff,
    "imagenet": data.ImageNet,
}


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command on the data set in tmp_path; returns its status and what it printed.

    Its five and three images are all that there are officially.
    """

    def run(name, *arguments, official=(5, 3)):
        kind, *variant = name.split()
        module = CLASSES[kind]
        given = module.__init__

        @functools.wraps(given)
        def create(self, *args, **options):
            given(self, *args, **options)
            self.official_images = official
            if self.nominal_image_size != (512, 512) and not self.classifies_images:
                self.nominal_image_size = SIZE

        monkeypatch.setattr(module, "__init__", create)
        arguments = [f"data={kind}", f"data.root={tmp_path}", "workers=0", *arguments]
        status = check.main([*arguments, *(f"data.variant={v}" for v in variant)])
        monkeypatch.setattr(module, "__init__", given)
        told = capsys.readouterr()
        assert status != 2, told.err
        return status, told.out

    return run


def problems(printed):
    """Kind -> files, of what the command printed; kinds that are notes begin with a word for it."""
    found, files = {}, []
    for line in printed.splitlines():
        if line.startswith("  ") and found:
            files.append(line.strip())
        elif (kind := line.rpartition(": ")[0]) and line.rpartition(": ")[2].isdigit():
            files = found[kind] = []
    return {k: v for k, v in found.items() if k != "note: class that no label shows"}


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("name", WRITERS)
def test_sound_data_sets(run, tmp_path, name, zipped):
    WRITERS[name](tmp_path)
    if zipped:
        zip_dataset(name, tmp_path)
    status, printed = run(name)
    # Images of both splits are drawn alike, but not in the 10k subset.
    assert problems(printed).keys() == (set() if name.endswith("10k") else {"image in both splits"})
    assert "60x40 (100%)" in printed
    assert status == (0 if name.endswith("10k") else 1)


def test_sound_data_set_without_a_shared_image(run, tmp_path):
    write_ade20k(tmp_path)
    recolor(tmp_path / "ADEChallengeData2016/images/validation")
    status, printed = run("ade20k")
    assert status == 0
    assert problems(printed) == {}
    assert "all is well" in printed


def recolor(folder: Path) -> None:
    """Other images of the same sizes."""
    for number, path in enumerate(sorted(folder.rglob("*.jpg"))):
        assert cv2.imwrite(str(path), random_image(100 + number))


@pytest.fixture
def ade20k(tmp_path):
    """A sound data set; its folder."""
    write_ade20k(tmp_path)
    base = tmp_path / "ADEChallengeData2016"
    recolor(base / "images/validation")
    return base


def test_counts_and_pairs(run, ade20k, tmp_path):
    (ade20k / "images/training/ADE_train_00000002.jpg").unlink()
    (ade20k / "annotations/validation/ADE_val_00000001.png").unlink()
    (ade20k / "annotations/validation/ADE_val_00000003.png").unlink()
    status, printed = run("ade20k", "--fix-list", str(tmp_path / "again.txt"))
    assert status == 1
    missing = [
        "ADEChallengeData2016/annotations/validation/ADE_val_00000001.png",
        "ADEChallengeData2016/annotations/validation/ADE_val_00000003.png",
        "ADEChallengeData2016/images/training/ADE_train_00000002.jpg",
    ]
    found = problems(printed)
    assert sorted(found.pop("missing")) == missing
    assert found == {
        "number of images": ["train (4 images, officially 5)", "val (1 images, officially 3)"]
    }
    assert (tmp_path / "again.txt").read_text().splitlines() == missing


def test_damaged_files_and_foreign_labels(run, ade20k, tmp_path):
    image = ade20k / "images/training/ADE_train_00000001.jpg"
    image.write_bytes(image.read_bytes()[:-200])
    label = ade20k / "annotations/training/ADE_train_00000002.png"
    label.write_bytes(label.read_bytes()[:-20])
    (ade20k / "images/training/ADE_train_00000003.jpg").write_bytes(b"")
    other = ade20k / "annotations/training/ADE_train_00000004.png"
    assert cv2.imwrite(str(other), random_ids(3, [1, 150, 151, 200]))
    colored = ade20k / "annotations/training/ADE_train_00000005.png"
    assert cv2.imwrite(str(colored), random_image(0))
    narrow = ade20k / "annotations/validation/ADE_val_00000002.png"
    assert cv2.imwrite(str(narrow), random_ids(1, [1, 2], (40, 59)))
    status, printed = run("ade20k", f"fix_list={tmp_path / 'again.txt'}")
    assert status == 1
    found = problems(printed)
    assert found["unreadable"] == [
        f"ADEChallengeData2016/{path}"
        for path in (
            "images/training/ADE_train_00000001.jpg",
            "annotations/training/ADE_train_00000002.png",
            "images/training/ADE_train_00000003.jpg",
        )
    ]
    foreign, painted = found["label of another data set"]
    assert foreign.endswith("training/ADE_train_00000004.png (ids 151, 200)")
    assert "ADE_train_00000005.png (a label file has one 8-bit channel" in painted
    image, label = found["image and label of different sizes"]
    assert image.endswith("images/validation/ADE_val_00000002.jpg (60x40)")
    assert label.endswith("annotations/validation/ADE_val_00000002.png (59x40)")
    assert len((tmp_path / "again.txt").read_text().splitlines()) == 7


def test_duplicates_and_what_is_left_behind(run, ade20k):
    training = ade20k / "images/training"
    shutil.copy(training / "ADE_train_00000001.jpg", training / "ADE_train_00000004.jpg")
    leak = ade20k / "images/validation/ADE_val_00000002.jpg"
    shutil.copy(training / "ADE_train_00000002.jpg", leak)
    for name in ("._ADE_train_00000001.jpg", "x.jpg.tmp", "notes.txt"):
        (training / name).write_bytes(b"")
    status, printed = run("ade20k")
    assert status == 1
    folder = "ADEChallengeData2016/images"
    assert problems(printed) == {
        "image in both splits": [
            f"{folder}/validation/ADE_val_00000002.jpg"
            f" (as {folder}/training/ADE_train_00000002.jpg)"
        ],
        "note: same image twice": [
            f"{folder}/training/ADE_train_00000004.jpg"
            f" (as {folder}/training/ADE_train_00000001.jpg)"
        ],
        "note: left behind by other programs": [
            f"{folder}/training/._ADE_train_00000001.jpg",
            f"{folder}/training/x.jpg.tmp",
        ],
    }
    leak.unlink()
    shutil.copy(ade20k / "images/validation/ADE_val_00000001.jpg", leak)
    status, printed = run("ade20k")
    assert status == 0  # of which no note is a fault
    assert len(problems(printed)["note: same image twice"]) == 2


def test_errors_that_decoders_put_up_with(run, ade20k):
    path = ade20k / "images/training/ADE_train_00000001.jpg"
    path.write_bytes(path.read_bytes()[:-2] + bytes(40) + b"\xff\xd9")
    status, printed = run("ade20k")
    assert status == 0
    (note,) = problems(printed)["note: read in spite of errors"]
    assert note.startswith("ADEChallengeData2016/images/training/ADE_train_00000001.jpg (Corrupt")


def test_many_problems_are_counted_and_a_few_named(run, ade20k):
    for path in (ade20k / "annotations").rglob("*.png"):
        path.write_bytes(path.read_bytes()[:-1])
    _, printed = run("ade20k")
    unreadable = problems(printed)["unreadable"]
    assert len(unreadable) == 6
    assert unreadable[-1] == "and 3 more"
    assert "unreadable: 8" in printed


@pytest.mark.parametrize("compressed", [False, True])
def test_checksums_in_zips(run, ade20k, tmp_path, compressed):
    """Of files that are read and of those that are not."""
    (ade20k / "objectInfo150.txt").write_text("classes" * 50)
    zip_dataset("ade20k", tmp_path)
    archive = tmp_path / "ADEChallengeData2016.zip"
    if compressed:
        packed = tmp_path / "packed.zip"
        with zipfile.ZipFile(archive) as a, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as b:
            for name in a.namelist():
                b.writestr(name, a.read(name))
        packed.replace(archive)
    assert run("ade20k")[0] == 0
    content = bytearray(archive.read_bytes())
    for name in (b"images/training/ADE_train_00000001.jpg", b"objectInfo150.txt"):
        content[content.index(name) + len(name) + 5] ^= 0xFF
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged/ADEChallengeData2016.zip").write_bytes(content)
    status, printed = run(
        "ade20k", f"data.root={tmp_path / 'damaged'}", f"fix_list={tmp_path / 'again.txt'}"
    )
    assert status == 1
    members = [
        "ADEChallengeData2016.zip!ADEChallengeData2016/images/training/ADE_train_00000001.jpg",
        "ADEChallengeData2016.zip!ADEChallengeData2016/objectInfo150.txt",
    ]
    assert problems(printed) == {"unreadable": members}
    assert (tmp_path / "again.txt").read_text().splitlines() == members


def test_checksums_of_archives(run, ade20k, tmp_path, monkeypatch):
    _, printed = run("ade20k", "md5=true")
    assert "no archive with a known checksum" in printed
    zip_dataset("ade20k", tmp_path)
    archive = tmp_path / "ADEChallengeData2016.zip"
    status, printed = run("ade20k", "md5=true")
    digest = hashlib.md5(archive.read_bytes()).hexdigest()
    assert status == 1
    assert problems(printed) == {
        "archive with another checksum": [f"ADEChallengeData2016.zip ({digest})"]
    }
    monkeypatch.setattr(
        data.ADE20K,
        "how_to_get",
        data.ADE20K.how_to_get.replace("7328b3957e407ddae1d3cbf487f149ef", digest),
    )
    assert run("ade20k", "md5=true")[0] == 0


def test_labels_that_were_converted(run, ade20k, tmp_path):
    for path in (ade20k / "annotations/training").iterdir():
        label = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
        assert cv2.imwrite(str(path), label - np.uint8(1))
    status, printed = run("ade20k")
    assert status == 1
    assert problems(printed)["labels already converted to train ids"] == [
        "train (put back those of the archive)"
    ]


def test_cityscapes_labels_that_were_converted(run, tmp_path):
    WRITERS["cityscapes"](tmp_path)
    assert "labels already converted to train ids" not in problems(run("cityscapes")[1])
    for number, path in enumerate(tmp_path.rglob("*_labelIds.png")):
        # No id tells alone.
        assert cv2.imwrite(str(path), random_ids(number, list(range(19))))
    found = problems(run("cityscapes")[1])
    assert [line.split()[0] for line in found["labels already converted to train ids"]] == [
        "train",
        "val",
    ]


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "cocostuff"])
def test_raw_ids_and_train_ids_are_told_apart(name):
    table = load_class_table(name)
    raw, converted = (np.zeros(256, bool) for _ in range(2))
    raw[table.allowed] = True
    converted[: len(table.class_names)] = True
    converted[255] = True
    assert check.hold_train_ids(table, converted)
    assert not check.hold_train_ids(table, raw)
    assert not check.hold_train_ids(table.for_converted_labels(), converted)
    assert not check.hold_train_ids(table, np.zeros(256, bool))


def test_images_of_another_size(run, tmp_path):
    WRITERS["cityscapes"](tmp_path)
    stem = "val/lindau/lindau_000001_000019"
    image = tmp_path / f"leftImg8bit/{stem}_leftImg8bit.png"
    assert cv2.imwrite(str(image), random_image(7, (20, 30)))
    label = tmp_path / f"gtFine/{stem}_gtFine_labelIds.png"
    assert cv2.imwrite(str(label), random_ids(7, [7], (20, 30)))
    _, printed = run("cityscapes")
    assert problems(printed)["not of the size of all images"] == [
        f"leftImg8bit/{stem}_leftImg8bit.png (30x20)"
    ]
    assert "30x20" in printed.split("labels")[0]


def test_pixels_and_images_of_classes(run, ade20k):
    for folder, ids in (("training", [0, 150]), ("validation", [1])):
        for path in (ade20k / "annotations" / folder).iterdir():
            label = np.full(SIZE, ids[-1], np.uint8)
            label[:10] = ids[0]
            assert cv2.imwrite(str(path), label)
    _, printed = run("ade20k")
    rows = [line.strip("│ ").split("│") for line in printed.splitlines() if "│" in line]
    cells = {row[0].strip(): [cell.strip() for cell in row[1:]] for row in rows}
    assert cells["flag"] == ["5", "75.000", "0", "0.000"]
    assert cells["wall"] == ["0", "0.000", "3", "100.000"]
    assert cells["(ignored)"] == ["5", "25.000", "0", "0.000"]
    assert "note: class that no label shows: 298" in printed


def test_several_folders_and_colours(run, tmp_path):
    write_segnet_camvid(tmp_path)
    (tmp_path / "trainannot/train_1.png").unlink()
    (tmp_path / "valannot/val_0.png").unlink()
    assert problems(run("camvid")[1])["missing"] == ["trainannot/train_1.png", "valannot/val_0.png"]


def test_a_colour_of_no_class(run, tmp_path):
    WRITERS["camvid"](tmp_path)
    path = tmp_path / "LabeledApproved_full/0001TP_008550_L.png"
    label = cv2.imread(str(path))
    label[3, 4] = (66, 128, 64)
    assert cv2.imwrite(str(path), label)
    assert problems(run("camvid")[1])["label of another data set"] == [
        "LabeledApproved_full/0001TP_008550_L.png (no class has the colour (64, 128, 66))"
    ]


def test_imagenet(run, tmp_path):
    write_imagenet(tmp_path)
    path = tmp_path / "train/n00000001/n00000001_train_1.JPEG"
    path.write_bytes(path.read_bytes()[:300])
    status, printed = run("imagenet", official=(8, 4))
    assert status == 1
    assert problems(printed)["unreadable"] == ["train/n00000001/n00000001_train_1.JPEG"]
    assert "4 classes with 2 to 2 training images each" in printed


def test_scenes_are_rendered_and_sound(tmp_path, capsys):
    options = ["data.train_images=4", "data.eval_images=2", "data.image_size=[32,64]"]
    status = check.main(["data=scenes", f"data.root={tmp_path}", "workers=0", *options])
    printed = capsys.readouterr().out
    assert (status, problems(printed)) == (0, {})


def test_what_cannot_be_checked(tmp_path, capsys):
    for arguments, message in (
        (["data=ade20k", f"data.root={tmp_path}"], "ADE20K is missing or incomplete"),
        (["data=ade20k", "--fix-list"], "unknown flag '--fix-list'"),
        (["data=ade20k", "worker=1"], "did you mean 'workers'"),
        (["data=ade20k", "workers=many"], "workers=many: give a number of processes"),
        (["data=ade20k", "md5=yes please"], "md5=yes please: true or false"),
    ):
        assert check.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert check.main(["--help"]) == 0
    assert "fix_list=" in capsys.readouterr().out


def test_processes(run, ade20k):
    (ade20k / "images/training/ADE_train_00000001.jpg").write_bytes(b"")
    status, printed = run("ade20k", "workers=2")
    assert status == 1
    assert problems(printed) == {
        "unreadable": ["ADEChallengeData2016/images/training/ADE_train_00000001.jpg"]
    }


def kill(item):
    if item == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def test_a_process_that_is_killed_is_one_line():
    with pytest.raises(UserError, match=r"a process was killed after \d of 20 images"):
        list(for_every(kill, range(20), 2, "images"))


@pytest.mark.slow
def test_the_command(ade20k, tmp_path):
    (ade20k / "images/training/ADE_train_00000001.jpg").write_bytes(b"")
    command = [sys.executable, "-m", "data.check", "data=ade20k", f"data.root={tmp_path}"]
    options = ["workers=2", f"--fix-list={tmp_path / 'again.txt'}"]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert problems(done.stdout)["unreadable"] == [
        "ADEChallengeData2016/images/training/ADE_train_00000001.jpg"
    ]
    assert done.stderr == "segtrain: 3 problems in ADE20K, see above\n"  # two of them counts
    again = (tmp_path / "again.txt").read_text()
    assert again == "ADEChallengeData2016/images/training/ADE_train_00000001.jpg\n"
