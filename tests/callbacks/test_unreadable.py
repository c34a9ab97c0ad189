"""Files that cannot be read are named once, and the samples that they cost are counted."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import torch
from lightning.pytorch import Callback

from callbacks.jsonl import METRICS, JsonLinesLogger, read_rows
from callbacks.unreadable import Unreadable
from tests.callbacks.tiny import Images, TinyData, create_module, create_trainer

KEY = "data/unreadable_samples"
NAMED = [f"images/{index}.jpg is damaged; another image takes its place" for index in (2, 5)]


class Damaged(Images):
    """Others take the places of images 2 and 5."""

    def __getitem__(self, index):
        unreadable = f"images/{index}.jpg is damaged" if index in (2, 5) else ""
        return {**super().__getitem__(index), "unreadable": unreadable}


class DamagedData(TinyData):
    """Two images a step: 2 and 5 are in steps 2 and 3, then in 5 and 7."""

    def __init__(self):
        super().__init__()
        self.train, self.val = Damaged(0), Damaged(1)


class SaveAt(Callback):
    def __init__(self, step, path):
        self.step, self.path = step, path

    def on_train_batch_end(self, trainer, *arguments):
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def fit(folder, data, callbacks=(), resume=None, **more):
    """Train, with metrics every second step; returns what was warned of, and what was counted."""
    folder.mkdir(exist_ok=True)
    loggers = [JsonLinesLogger(folder)]
    trainer = create_trainer([Unreadable(), *callbacks], loggers, **more)
    module = create_module()
    module.log_every = 2
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, data, ckpt_path=resume, weights_only=True)
    rows = read_rows(folder / METRICS)
    return (
        [str(w.message) for w in caught if w.filename.endswith("unreadable.py")],
        [(row["step"], row[KEY]) for row in rows if KEY in row],
    )


def test_files_are_named_once_and_samples_counted_in_training_and_validation(tmp_path):
    said, counts = fit(tmp_path, DamagedData(), steps=7, validate_every=4, num_sanity_val_steps=1)
    *named, total = said
    assert named == NAMED
    assert total.startswith("6 samples were replaced, for files that cannot be read (2)")
    assert counts == [(2, 1), (4, 2), (4, 4), (6, 5), (7, 6)]


def test_gradients_that_accumulate_count_every_batch_once(tmp_path):
    _, counts = fit(tmp_path, DamagedData(), steps=4, accumulate=2, limit_val_batches=0)
    assert counts == [(2, 2), (4, 4)]


def test_a_run_that_goes_on_names_nothing_twice_and_goes_on_counting(tmp_path):
    path = tmp_path / "saved.ckpt"
    # Between two rows of metrics: what was found since the first belongs to the state.
    options = {"limit_val_batches": 0}
    fit(tmp_path / "first", DamagedData(), [SaveAt(3, path)], steps=3, **options)
    said, counts = fit(tmp_path / "second", DamagedData(), resume=path, steps=7, **options)
    assert counts == [(6, 3), (7, 4)]
    assert len(said) == 1
    assert said[0].startswith("4 samples were replaced, for files that cannot be read (2)")


def test_nothing_is_said_or_logged_where_all_can_be_read(tmp_path):
    assert fit(tmp_path, TinyData(), steps=2) == ([], [])


def test_rank_zero_names_the_files_of_all_and_counts_their_samples(monkeypatch):
    gathers = iter([["c", "c"], []])

    def gather(found, own):
        found[:] = [own, next(gathers)]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    rows = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: rows.append((step, metrics[KEY])))
    trainer = SimpleNamespace(
        world_size=2, is_global_zero=True, loggers=[logger], accumulate_grad_batches=1
    )
    module = SimpleNamespace(log_every=2)
    callback = Unreadable()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step, messages in enumerate((["", "a"], ["b", ""], ["a", ""]), start=1):
            trainer.global_step = step
            callback.on_train_batch_end(trainer, module, None, {"unreadable": messages}, step - 1)
        callback.on_train_end(trainer, module)
    *named, total = (str(w.message).partition(";")[0] for w in caught)
    assert named == ["a", "b", "c"]
    assert total.startswith("5 samples were replaced, for files that cannot be read (3)")
    assert rows == [(2, 4), (3, 5)]


def test_other_ranks_say_nothing():
    trainer = SimpleNamespace(
        is_global_zero=False, accumulate_grad_batches=1, global_step=1, world_size=1, loggers=[]
    )
    callback = Unreadable()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batch = {"unreadable": ["a"]}
        callback.on_train_batch_end(trainer, SimpleNamespace(log_every=1), None, batch, 0)
        callback.on_train_end(trainer, SimpleNamespace())
    assert callback.samples == 1
