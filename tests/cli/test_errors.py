"""Every slip gets its one clear line."""

import pickle
import shutil

import cv2
import pytest
import torch

import data
import train
from segtrain import create_network


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("schedule.stepps=10", ["schedule.stepps", "did you mean 'steps'"]),
        ("modle=edaformer_tiny", ["modle", "did you mean 'model'"]),
        ("model=edaformer_tinny", ["edaformer_tinny", "did you mean 'edaformer_tiny'"]),
        ("schedule.steps=many", ["schedule.steps", "many"]),
        ("task=fitt", ["task", "fitt"]),
        ("resume=runs/nowhere", ["runs/nowhere"]),
        ("ckpt=nowhere.ckpt", ["nowhere.ckpt", "no such file"]),
        ("task=validate", ["ckpt=FILE"]),
        ("schedule.steps=500", ["schedule.steps=500", "schedule.validate_every"]),
        ("data.photometric=pill", ["data.photometric", "did you mean 'pil'"]),
        ("data.scale_step=0", ["data.scale_step", "greater than 0"]),
    ],
)
def test_what_is_known_before_torch_is_imported(fails, argument, parts):
    message = fails(argument)
    assert message.count("\n") == 1
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("+model.drop_pth=0.1", ["drop_pth", "did you mean 'drop_path'"]),
        ("+data.crop=3", ["crop", "did you mean 'crop_size'"]),
        ("+callbacks.cost_curv={}", ["cost_curv", "did you mean 'cost_curve'"]),
        ("callbacks.cost_curve.settings=[isr_22]", ["cost_curve", "isr_22", "isr_2222_222"]),
        ("callbacks.cost_curve.settings=[{budget_gmacs: 1}]", ["1 GMACs", "no setting of EDAF"]),
        ("callbacks.cost_curve.settings=[{budget_gmacs: -1}]", ["positive number, got -1"]),
        ("criterion.class_weights=[1,2]", ["class_weights", "2 factors", "19 classes"]),
        ("criterion.hard_examples={treshold: 1}", ["hard_examples", "did you mean 'threshold'"]),
        ("+trainer.deviices=2", ["deviices", "did you mean 'devices'"]),
        ("trainer.precision=33", ["trainer", "33"]),
        ("trainer.accelerator=gpuu", ["trainer", "gpuu"]),
    ],
)
def test_what_the_parts_refuse(fails, small, argument, parts):
    message = fails(*small, argument)
    assert message.count("\n") == 1
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("argument", "parts"),
    [
        ("model.head=nvlab", ["nvlab", "did you mean 'nvlabs'"]),
        ("model.ln_eps=mixt", ["ln_eps", "mixt"]),
        ("model.training_setting=bsm_hg", ["bsm_hg", "did you mean 'bsm_hq'"]),
        ("model.training_setting={merg: bsm_hq}", ["merg", "did you mean 'merge'"]),
        ("callbacks.cost_curve.settings=[{isr: [2,2]}]", ["cost_curve", "isr", "[2, 2]"]),
        ("data.crop_size=[24,24]", ["at least 29 x 29"]),
    ],
)
def test_what_segformer_refuses(fails, small, argument, parts):
    message = fails(*small, "model=segformer_b0", argument)
    assert message.count("\n") == 1
    for part in parts:
        assert part in message


def test_shared_batch_norms_on_several_cpus(fails, small):
    processes = ("trainer.accelerator=cpu", "trainer.devices=2", "trainer.strategy=ddp")
    message = fails(*small, *processes, "trainer.sync_batchnorm=true")
    assert message.count("\n") == 1
    assert "sync_batchnorm=true works on GPUs alone" in message


def test_a_network_for_whole_images_is_not_trained_on_pixels(fails, small):
    message = fails(*small, "model=rtformer_slim", "model.head=classification")
    assert message.count("\n") == 1
    assert "rtformer_slim gives one class for each image" in message
    assert "has a class for each pixel: model.head=classification" in message


@pytest.mark.parametrize("name", ["ade20k", "cityscapes", "cocostuff"])
def test_missing_data_says_what_was_expected_found_and_how_to_get_it(fails, name):
    message = fails(f"experiment=edaformer_tiny_{name}", "data.root=nowhere")
    for part in ("nowhere", "expected:", "found:", "get it:"):
        assert part in message


@pytest.fixture
def scenes(in_folder, small):
    """A copy of the small scenes to damage, and arguments that read it as Cityscapes."""
    module = data.Scenes(
        small[0].removeprefix("data.root="),
        train_images=24,
        eval_images=5,
        image_size=(64, 128),
    )
    module.check()
    shutil.copytree(module.root / module.rendering.folder, "city")
    rendering = ("data.root", "data.train_images", "data.eval_images", "data.image_size")
    kept = [argument for argument in small if not argument.startswith(rendering)]
    return in_folder / "city", ["data=cityscapes", "data.root=city", *kept]


def test_a_truncated_image_is_named(fails, scenes):
    folder, arguments = scenes
    for image in folder.rglob("leftImg8bit/train/*/*.png"):
        image.write_bytes(image.read_bytes()[:200])
    message = fails(*arguments)
    assert "_leftImg8bit.png" in message
    assert message.count("\n") == 1


def test_a_truncated_image_in_a_loading_process_is_named(fails, scenes):
    folder, arguments = scenes
    for image in folder.rglob("leftImg8bit/train/*/*.png"):
        image.write_bytes(image.read_bytes()[:200])
    message = fails(*arguments, "data.workers=1")
    assert "_leftImg8bit.png" in message
    assert message.count("\n") == 1


def test_a_label_id_outside_the_table_is_named(fails, scenes):
    folder, arguments = scenes
    for label in folder.rglob("gtFine/train/*/*_labelIds.png"):
        mask = cv2.imread(str(label), cv2.IMREAD_UNCHANGED)
        mask[:5] = 77
        cv2.imwrite(str(label), mask)
    message = fails(*arguments)
    assert "_labelIds.png" in message
    assert "77" in message


def test_weights_of_another_network(fails, small):
    torch.save(torch.nn.Linear(3, 4).state_dict(), "other.pth")
    message = fails(*small, "weights=other.pth")
    assert "other.pth" in message
    assert "EDAFormer" in message


def test_weights_for_another_number_of_classes(fails, small):
    torch.save(create_network("edaformer_nano", num_classes=150).state_dict(), "ade.pth")
    message = fails(*small, "weights=ade.pth")
    assert "150 classes" in message


def test_a_file_that_would_run_code_is_refused_and_runs_nothing(fails, small, in_folder):
    class Harmful:
        def __reduce__(self):
            return eval, ("open('harm', 'w')",)

    (in_folder / "harmful.pth").write_bytes(pickle.dumps({"state_dict": Harmful()}))
    message = fails(*small, "weights=harmful.pth")
    assert "code" in message
    assert message.count("\n") == 1
    assert not (in_folder / "harm").exists()


def test_a_name_that_is_taken(fails, small, in_folder):
    (in_folder / "runs" / "mine").mkdir(parents=True)
    message = fails(*small, "name=mine")
    assert "resume=runs/mine" in message


def test_the_command_itself_answers_with_status_2(start):
    finished = start("schedule.stepps=10", check=False)
    assert finished.returncode == 2
    assert finished.stderr.startswith("segtrain: error: ")
    assert finished.stderr.count("\n") == 1


def test_debugging_shows_the_traceback(in_folder, monkeypatch):
    monkeypatch.setenv("SEGTRAIN_DEBUG", "1")
    with pytest.raises(ValueError, match="stepps"):
        train.main(["schedule.stepps=10"])
