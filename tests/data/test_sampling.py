from __future__ import annotations

import itertools
import pickle

import pytest

from data.sampling import EndlessBatchSampler, RankSampler


def stream(ranks: int, batch_size: int, batches: int, start: int = 0, seed: int = 0, n: int = 10):
    """The samples of all ranks in the order of the global batches."""
    samplers = [
        EndlessBatchSampler(n, batch_size, seed=seed, start=start, rank=r, world_size=ranks)
        for r in range(ranks)
    ]
    for global_batch in itertools.islice(zip(*samplers, strict=True), batches):
        for position in range(batch_size):
            yield from (rank_batch[position] for rank_batch in global_batch)


REFERENCE = list(stream(ranks=1, batch_size=1, batches=240))


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_ranks_and_batch_size_do_not_change_the_stream(ranks, batch_size):
    batches = 240 // (ranks * batch_size)
    samples = list(stream(ranks, batch_size, batches))
    assert samples == REFERENCE[: len(samples)]


@pytest.mark.parametrize("start", [0, 1, 7, 10, 23, 60])
@pytest.mark.parametrize("ranks", [1, 3])
def test_resume_at_any_position(start, ranks):
    samples = list(stream(ranks, 4, 10, start=start))
    assert samples == REFERENCE[start : start + len(samples)]


def test_every_sample_once_per_epoch_in_another_order():
    epochs = [REFERENCE[10 * e : 10 * e + 10] for e in range(24)]
    for number, epoch in enumerate(epochs):
        assert {e for e, _ in epoch} == {number}
        assert sorted(index for _, index in epoch) == list(range(10))
    orders = [tuple(index for _, index in epoch) for epoch in epochs]
    assert len(set(orders)) == 24


def test_another_seed_gives_another_order():
    assert list(stream(1, 1, 10, seed=1)) != REFERENCE[:10]


def test_sampler_survives_pickling():
    sampler = EndlessBatchSampler(10, 4, seed=3, start=5)
    copy = pickle.loads(pickle.dumps(sampler))
    assert list(itertools.islice(copy, 5)) == list(itertools.islice(sampler, 5))


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_evaluation_split_has_no_duplicates(ranks):
    parts = [RankSampler(5, rank=r, world_size=ranks) for r in range(ranks)]
    assert sorted(itertools.chain(*parts)) == list(range(5))
    assert [len(part) for part in parts] == [len(list(part)) for part in parts]
