from __future__ import annotations

import cv2
import numpy as np
import pytest

from callbacks.pictures import CAPTION_HEIGHT, GAP, PANEL_WIDTH, Pictures
from segtrain import UserError
from tests.callbacks.tiny import SETTINGS, TinyData, create_module, create_trainer


def panels(path):
    picture = cv2.imread(str(path))[CAPTION_HEIGHT:, :, ::-1]
    return [picture[:, i * (PANEL_WIDTH + GAP) :][:, :PANEL_WIDTH] for i in range(4)]


def test_pictures_show_image_label_and_both_predictions(tmp_path):
    module, data = create_module(), TinyData()
    create_trainer([Pictures(tmp_path, 3, ["full", "isr_2222_222"])]).validate(module, data)
    names = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert names == ["image_0.png", "image_3.png", "image_6.png"]  # spread over the set

    image, label, *predictions = panels(tmp_path / "predictions" / "image_3.png")
    sample = data.val[3]
    rows = (np.arange(len(label)) + 0.5) * 64 / len(label)
    columns = (np.arange(PANEL_WIDTH) + 0.5) * 96 / PANEL_WIDTH
    at = np.ix_(rows.astype(int), columns.astype(int))
    palette = np.zeros((256, 3), np.uint8)
    palette[:4] = data.palette
    np.testing.assert_array_equal(label, palette[sample["mask"][at]])
    whole = cv2.resize(sample["image"], (PANEL_WIDTH, len(label)), interpolation=cv2.INTER_LINEAR)
    assert np.abs(image.astype(float) - whole).mean() < 3

    module.eval()
    for setting, panel in zip(("full", "isr_2222_222"), predictions, strict=True):
        loader = data.val_dataloader()
        batch = next(data.on_after_batch_transfer(b, 0) for b in loader if 3 in b["index"])
        row = batch["index"].tolist().index(3)
        prediction = module.predict(batch, setting)[row].numpy()
        same = (panel == palette[prediction[at]]).all(axis=-1)
        assert same.mean() > 0.99


def test_settings_default_to_the_training_one_and_the_most_reduced(tmp_path):
    module, pictures = create_module(), Pictures(tmp_path, count=1)
    used = set()
    module.network.register_forward_pre_hook(lambda net, args: used.add(net.setting.name))
    create_trainer([pictures]).validate(module, TinyData())
    assert used == {"full", SETTINGS[-1]}


def test_more_pictures_than_images(tmp_path):
    create_trainer([Pictures(tmp_path, 50)], limit_val_batches=2).validate(
        create_module(), TinyData()
    )
    assert len(list((tmp_path / "predictions").iterdir())) == 4


def test_slips(tmp_path):
    with pytest.raises(UserError, match="two"):
        Pictures(tmp_path, settings=["full"])
    trainer = create_trainer([Pictures(tmp_path, settings=["full", "ful"])])
    with pytest.raises(UserError, match=r"callbacks\.pictures\.settings.*did you mean 'full'"):
        trainer.validate(create_module(), TinyData())
