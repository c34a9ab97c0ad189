"""MMSegmentation's side of the benchmark of loaders, run by it with a Python of its own.

Configurations, data sets, transforms and the function that builds loaders are those of the
packages as published. Orders come as lines of JSON, and so do the answers.
"""

import json
import sys
import types
import warnings
from functools import partial
from pathlib import Path

from benchmarks.loader_turns import Stages, measure_turn

CONFIGS = {"ade20k": "ade20k.py", "cityscapes": "cityscapes_1024x1024.py"}
#: Changes to a configuration's data set: the folder below the root; labels as distributed, which
#: MMSegmentation otherwise wants converted.
CHANGES = {
    "ade20k": ("ADEChallengeData2016", {}),
    "cityscapes": (".", {"seg_map_suffix": "_gtFine_labelIds.png"}),
}


class MissingOperators(types.ModuleType):
    """Stands for `mmcv.ops`: compiled layers of networks, which mmcv-lite is published without."""

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


sys.modules["mmcv.ops"] = MissingOperators("mmcv.ops")
warnings.simplefilter("ignore")  # about the missing operators, and options to come

import mmengine.fileio  # noqa: E402
import mmseg.datasets  # noqa: E402
from mmcv.transforms import LoadImageFromFile, RandomFlip, RandomResize  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.dataset import BaseDataset  # noqa: E402
from mmengine.registry import init_default_scope  # noqa: E402
from mmengine.runner import Runner  # noqa: E402
from mmengine.utils.dl_utils import set_multi_processing  # noqa: E402
from mmseg.datasets.transforms import (  # noqa: E402
    LoadAnnotations,
    PackSegInputs,
    PhotoMetricDistortion,
    RandomCrop,
)

FUNCTIONS = [
    (mmengine.fileio, "get", "read"),
    (LoadImageFromFile, "transform", "decode image"),
    (LoadAnnotations, "transform", "decode label"),
    (vars(RandomCrop)["crop_bbox"], "func", "window"),
    (RandomCrop, "transform", "crop"),
    (RandomResize, "transform", "resize"),
    (RandomFlip, "transform", "flip"),
    (PhotoMetricDistortion, "transform", "colour"),
    (PackSegInputs, "transform", "pack"),
]


def create_loader(name, root, batch_size, workers):
    folder, changes = CHANGES[name]
    configs = Path(mmseg.__file__).parent / ".mim/configs/_base_"
    config = Config.fromfile(configs / "datasets" / CONFIGS[name]).train_dataloader
    config.dataset.update(data_root=str(Path(root) / folder), **changes)
    config.update(batch_size=batch_size, num_workers=workers)
    return Runner.build_dataloader(config, seed=0)


def main():
    answers, sys.stdout = sys.stdout, sys.stderr
    init_default_scope("mmseg")
    set_multi_processing(mp_start_method="fork", opencv_num_threads=0)  # as its runner does
    for line in sys.stdin:
        order = json.loads(line)
        create = partial(create_loader, **order["loader"])
        turn = (create, order["loader"]["batch_size"], order["seconds"])
        if order["with_stages"]:
            with Stages((BaseDataset, "__getitem__"), FUNCTIONS) as stages:
                answer = measure_turn(*turn, stages)
        else:
            answer = measure_turn(*turn)
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
