from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
from PIL import Image

from callbacks.pictures import LONGEST_SIDE, Pictures, _size_within
from segtrain import UserError
from segtrain.training import SegmentationModule
from tests.callbacks.tiny import SETTINGS, TinyData, create_module, create_trainer


def test_pictures_show_image_label_and_predictions(tmp_path):
    module, data = create_module(), TinyData()
    create_trainer([Pictures(tmp_path, 3, ["full", "isr_2222_222"])]).validate(module, data)
    folder = tmp_path / "predictions"
    names = ["image_0", "image_3", "image_6"]  # spread over the set
    files = [f"{name}.{kind}" for name in names for kind in ("jpg", "png")]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*files, "index.json"])
    index = json.loads((folder / "index.json").read_text())
    assert index["settings"] == ["full", "isr_2222_222"]
    assert index["classes"] == list(data.class_names)
    assert index["images"][1] == {"file": "image_3", "name": "image 3"}

    sample = data.val[3]
    picture = Image.open(folder / "image_3.png")
    label, *predictions = np.asarray(picture).reshape(3, *sample["mask"].shape)
    np.testing.assert_array_equal(label, sample["mask"])  # small ones stay as they are
    palette = np.array(picture.getpalette()).reshape(-1, 3)
    np.testing.assert_array_equal(palette[: len(data.palette)], data.palette)
    assert not palette[255:].any()
    image = cv2.imread(str(folder / "image_3.jpg"))[..., ::-1]
    whole = cv2.resize(sample["image"], image.shape[1::-1], interpolation=cv2.INTER_LINEAR)
    assert np.abs(cv2.blur(image, (5, 5)).astype(float) - cv2.blur(whole, (5, 5))).mean() < 4

    module.eval()
    for setting, shown in zip(("full", "isr_2222_222"), predictions, strict=True):
        loader = data.val_dataloader()
        batch = next(data.on_after_batch_transfer(b, 0) for b in loader if 3 in b["index"])
        row = batch["index"].tolist().index(3)
        prediction = module.predict(batch, setting)[row].numpy()
        assert (shown == prediction).mean() > 0.99


def test_large_images_are_made_smaller():
    assert _size_within((1024, 2048), LONGEST_SIDE) == (200, 400)
    assert _size_within((2048, 1024), LONGEST_SIDE) == (400, 200)
    assert _size_within((64, 96), LONGEST_SIDE) == (64, 96)
    assert _size_within((1, 9000), LONGEST_SIDE) == (1, 400)


def test_another_label_may_be_the_one_that_counts_nowhere(tmp_path):
    usual, data = create_module(), TinyData()
    data.val.masks = np.where(data.val.masks == 255, -1, data.val.masks.astype(np.int64))
    module = SegmentationModule(
        usual.network, usual.criterion, usual.optimizer, usual.schedule, ignore_index=-1
    )
    create_trainer([Pictures(tmp_path, 1, ["full"])]).validate(module, data)
    label = np.asarray(Image.open(tmp_path / "predictions" / "image_0.png"))[:64]
    np.testing.assert_array_equal(label == 255, data.val.masks[0] == -1)


def test_settings_default_to_all(tmp_path):
    module, pictures = create_module(), Pictures(tmp_path, count=1)
    used = set()
    module.network.register_forward_pre_hook(lambda net, args: used.add(net.setting.name))
    create_trainer([pictures]).validate(module, TinyData())
    assert used == set(SETTINGS)


def test_more_pictures_than_images(tmp_path):
    create_trainer([Pictures(tmp_path, 50)], limit_val_batches=2).validate(
        create_module(), TinyData()
    )
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 4


def test_slips(tmp_path):
    with pytest.raises(UserError, match=">= 1"):
        Pictures(tmp_path, settings=[])
    with pytest.raises(UserError, match=">= 1"):
        Pictures(tmp_path, count=0)
    trainer = create_trainer([Pictures(tmp_path, settings=["full", "ful"])])
    with pytest.raises(UserError, match=r"callbacks\.pictures\.settings.*did you mean 'full'"):
        trainer.validate(create_module(), TinyData())
