"""The recipes of ECO-M2F are those of Mask2Former, with exits."""

import pytest

from tests.config.test_plain_vit_recipes import CONFIGS, values

EXITS = [f"ecom2f_swin_t_{data}" for data in ("ade20k", "cityscapes", "cocostuff")]


@pytest.mark.parametrize("name", EXITS)
def test_only_exits_differ(name):
    composed = values(f"experiment={name}")
    assert composed["model"]["exits"] == [2, 3, 4, 5, 6]
    assert composed["trainer"]["strategy"] == "ddp_find_unused_parameters_true"
    without = ["model.exits=null", "trainer.strategy=auto"]
    plain = values(f"experiment={name.replace('ecom2f', 'mask2former')}")
    assert values(f"experiment={name}", *without) == plain
    assert "Not a published recipe but ours" in (CONFIGS / f"experiment/{name}.yaml").read_text()
