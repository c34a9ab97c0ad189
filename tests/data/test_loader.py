"""Loading in workers: batches are PyTorch's own, whichever way they travel and however it ends."""

from __future__ import annotations

import itertools
import os
import platform
import resource
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, default_collate

import data
import data.slots
from data.loader import SegmentationLoader, copy_ahead, prepare_worker
from data.slots import SlotPool
from segtrain.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore:.*(officially|many workers|this process is multi)")

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


class Samples(Dataset):
    """Samples of every kind that data sets give, and some that they may."""

    def __init__(self, count: int = 24) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        generator = np.random.default_rng(index)
        return {
            "image": generator.integers(0, 256, (6, 6, 3), dtype=np.uint8),
            "name": f"image {index}",
            "mask": np.full((1, 1), index, np.int64),
            "distortion": generator.random(11, dtype=np.float32),
            "flipped": torch.arange(12).reshape(3, 4).T + index,
            "empty": np.zeros((0, 4), np.float32),
            "valid": np.array(index % 2 == 0),
            "scale": index / 3,
            "nested": {"segments": np.full((2, 2), index, np.int32)},
            "index": index,
        }


class Failing(Samples):
    """Sample 5 ends otherwise."""

    def __init__(self, fault: str) -> None:
        super().__init__()
        self.fault = fault

    def __getitem__(self, index: int) -> dict:
        if index == 5 and self.fault == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if index == 5 and self.fault == "damaged":
            raise UserError("a.jpg is damaged\n  replace it")
        if index == 5 and self.fault == "full":
            raise RuntimeError(
                "unable to allocate shared memory(shm) for file </torch_1_0>: No space left on "
                "device (28)"
            )
        return {"index": index}


@pytest.fixture
def opened(monkeypatch):
    """The slots of batches that arrived in one, in order."""
    opened, open_slot = [], SlotPool.open

    def record(self: SlotPool, slot: int, batch: dict) -> dict:
        opened.append(slot)
        return open_slot(self, slot, batch)

    monkeypatch.setattr(SlotPool, "open", record)
    return opened


def load(dataset: Dataset, workers: int = 1, **options) -> SegmentationLoader:
    options = {"batch_size": 2, "persistent_workers": workers > 0} | options
    return SegmentationLoader(
        dataset, num_workers=workers, worker_init_fn=prepare_worker, **options
    )


def assert_same(batches: list[dict], expected: list[dict]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        assert list(batch) == list(other)
        for value, other_value in zip(batch.values(), other.values(), strict=True):
            assert type(value) is type(other_value)
            if isinstance(value, dict):
                assert_same([value], [other_value])
            elif isinstance(value, torch.Tensor):
                assert value.dtype == other_value.dtype
                assert value.is_contiguous() == other_value.is_contiguous()
                assert torch.equal(value, other_value)
            else:
                assert value == other_value


@pytest.mark.parametrize("world_size", [1, 2])
def test_any_number_of_workers_and_either_way_give_the_same_batches(
    tmp_path, monkeypatch, opened, world_size
):
    def take(rank: int, **options) -> list[dict]:
        scenes = data.Scenes(
            tmp_path,
            train_images=5,
            eval_images=3,
            image_size=(32, 64),
            crop_size=(24, 24),
            train_scale=(64, 32),
            **{"batch_size": 4 // world_size} | options,
        )
        scenes.prepare_data()
        monkeypatch.setattr(scenes, "_rank_and_world_size", lambda: (rank, world_size))
        training = itertools.islice(scenes.train_dataloader(), 7)
        return [*training, *scenes.val_dataloader()]

    for rank in range(world_size):
        expected = take(rank, loader="stock", workers=0)
        assert_same(take(rank, loader="stock", workers=1), expected)
        assert_same(take(rank, workers=0), expected)
        assert not opened
        for workers in (1, 2, 4):
            assert_same(take(rank, workers=workers), expected)
            assert len(opened) >= len(expected)
            opened.clear()


def test_samples_of_any_kind_travel(opened):
    assert_same(list(load(Samples(), 2)), list(load(Samples(), 2, stock=True)))
    assert len(opened) == 12


def transposed(samples: list[dict]) -> dict:
    batch = default_collate(samples)
    return {**batch, "image": batch["image"].transpose(1, 2), "mask": batch["mask"][1:]}


def test_what_is_made_of_a_batch_travels(opened):
    loaders = [load(Samples(), workers, collate_fn=transposed) for workers in (2, 0)]
    for batch, expected in zip(*loaders, strict=True):
        assert torch.equal(batch["image"], expected["image"])
        assert torch.equal(batch["mask"], expected["mask"])
    assert len(opened) == 12


def test_what_does_not_fit_into_a_slot_travels_otherwise(opened, monkeypatch):
    expected = list(load(Samples(), 0))
    for room in (64, 128, 320, 2**12):
        monkeypatch.setattr(data.slots, "_SLOT_BYTES", room)
        assert_same(list(load(Samples(), 2)), expected)
        assert len(opened) == 12
        opened.clear()


def test_batches_that_are_kept_stay_as_they_are(opened):
    """More of them than there are slots; those let go are used again."""
    loader = load(Samples(60))
    kept = list(loader)
    assert len(set(opened)) == len(opened) < 30
    assert_same(kept, list(load(Samples(60), 0)))

    del kept
    opened.clear()
    for batch, expected in zip(loader, load(Samples(60), 0), strict=True):
        assert_same([batch], [expected])
    assert len(opened) == 30


def test_a_slot_is_taken_while_a_part_of_its_batch_is_in_use():
    batches = iter(load(Samples(60)))
    part = next(batches)["image"][1, :, 2]
    expected = part.clone()
    for _ in batches:
        assert torch.equal(part, expected)


@pytest.mark.parametrize("persistent", [True, False])
def test_loaders_that_are_left_early_lose_no_slots(opened, persistent):
    loader = load(Samples(), 2, persistent_workers=persistent)
    for _ in range(12):
        next(iter(loader))
    opened.clear()
    assert_same(list(loader), list(load(Samples(), 0)))
    assert len(opened) >= 12


def test_two_loaders_at_once(opened):
    expected = list(load(Samples(), 0))
    for batch, other, same in zip(load(Samples()), load(Samples()), expected, strict=True):
        assert_same([batch, other], [same, same])
    assert len(opened) == 24


def test_tensors_outlive_their_loader():
    batch = next(iter(load(Samples())))
    assert_same([batch], [next(iter(load(Samples(), 0)))])
    batch["image"] += 1


def test_a_forked_process_frees_no_slot_of_its_parent():
    pool = SlotPool(1, 1)
    pool.take(0)
    tensors = pool.open(0, {"image": data.slots._Array(torch.uint8, torch.Size((3,)), 64)})
    child = os.fork()
    if not child:
        tensors.clear()
        os._exit(0)
    os.waitpid(child, 0)
    assert pool.find_free(0) is None
    tensors.clear()
    assert pool.find_free(0) == 0


@pytest.mark.slow  # imports all there is
def test_workers_that_are_not_forked(opened):
    loader = load(Samples(12), multiprocessing_context="spawn")
    assert_same(list(loader), list(load(Samples(12), 0)))
    assert len(opened) == 6


def test_a_system_without_such_memory(opened, monkeypatch):
    def fail(size: int) -> int:
        raise OSError("no such system call")

    monkeypatch.setattr(data.slots, "_create_file", fail)
    with pytest.warns(UserWarning, match="no such system call.*room in /dev/shm"):
        assert_same(list(load(Samples())), list(load(Samples(), 0)))
    assert not opened


@pytest.mark.parametrize("stock", [True, False])
def test_what_is_wrong_with_a_sample_arrives_as_it_was_raised(stock):
    with pytest.raises(UserError, match=r"\Aa.jpg is damaged\n  replace it\Z"):
        list(load(Failing("damaged"), stock=stock))


def test_a_full_shared_memory_is_named():
    with pytest.raises(UserError, match=r"/dev/shm is full.*--shm-size"):
        list(load(Failing("full"), stock=True))


def test_a_killed_worker_ends_the_loop():
    # PyTorch's way fails in others, too: tensors on the way are lost with the worker.
    with pytest.raises(RuntimeError, match=r"DataLoader worker .* (killed by signal|exited)"):
        list(load(Failing("killed")))


@pytest.mark.slow  # imports all there is
def test_a_process_ends_with_batches_and_workers_left():
    script = """
        from tests.data.test_loader import Samples, load
        loader = load(Samples(), 2)
        batches = iter(loader)
        kept = [next(batches) for _ in range(3)]
        print(sum(int(batch["index"].sum()) for batch in kept))
    """
    shared_memory = set(Path("/dev/shm").iterdir()) if Path("/dev/shm").is_dir() else set()
    result = subprocess.run(
        [sys.executable, "-c", "\n".join(line.strip() for line in script.splitlines())],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "15\n", "")
    assert not shared_memory or set(Path("/dev/shm").iterdir()) <= shared_memory


class PageFaults(Dataset):
    """How many pages a worker has to be given for images after the first."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> dict:
        for image in range(3):
            if image == 1:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            # Not more than glibc keeps together outside of the main thread.
            arrays = [np.ones(8 * 2**20, np.uint8) for _ in range(5)]
            del arrays
        return {"faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before}


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator")
def test_workers_keep_the_memory_that_they_freed():
    (batch,) = SegmentationLoader(PageFaults(), num_workers=1, worker_init_fn=prepare_worker)
    assert batch["faults"] < 100  # of thousands


def test_copies_to_a_device_are_one_batch_ahead(monkeypatch):
    """And each is waited for where it is used, not the copy that follows it."""
    events = []

    class Stream:
        def __init__(self, *_: object) -> None:
            self.copies = 0

        def __enter__(self) -> None: ...

        def __exit__(self, *_: object) -> None: ...

        def record_event(self) -> int:
            self.copies += 1
            events.append(f"copy {self.copies}")
            return self.copies

        def wait_event(self, copy: int) -> None:
            events.append(f"wait {copy}")

    current = Stream()
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: stream)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current)
    recorded = []
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: recorded.append((int(self), stream))
    )
    batches = ({"image": torch.tensor(number), "name": str(number)} for number in (1, 2, 3))
    for batch in copy_ahead(batches, torch.device("cpu")):
        events.append(f"use {batch['name']}")
    assert events == [
        *("copy 1", "copy 2", "wait 1", "use 1"),
        *("copy 3", "wait 2", "use 2", "wait 3", "use 3"),
    ]
    assert recorded == [(1, current), (2, current), (3, current)]
    assert list(copy_ahead([], torch.device("cpu"))) == []


@pytest.mark.gpu
@needs_cuda
def test_batches_arrive_on_the_device_and_stay_as_they_are():
    """While the steps before keep the device busy, and with memory that is used again."""
    device = torch.device("cuda", torch.cuda.current_device())
    loader = load(Samples(60), 2, device=device, pin_memory=True)
    work = torch.randn(2048, 2048, device=device)
    sums = []
    for batch in loader:
        assert batch["image"].device == batch["index"].device == device
        for _ in range(20):
            work = (work @ work).tanh()
        sums.append(batch["image"].sum())
    expected = [batch["image"].sum() for batch in load(Samples(60), 0)]
    assert torch.equal(torch.stack(sums).cpu(), torch.stack(expected))
