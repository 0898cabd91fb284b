"""Random states, and training data as a function of seed, iteration and rank."""

from __future__ import annotations

import itertools
import random

import numpy as np
import torch
from torch.utils.data import Dataset

from repr_det.detection.deterministic_loader import BatchPlan, DeterministicLoader, _SeededDataset
from repr_det.engine.randomness import RandomStream, mixed_seed


def draws():
    return random.random(), float(np.random.rand()), float(torch.rand(()))


def test_stream_is_of_its_own():
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = [draws(), draws()]
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    stream = RandomStream(5)
    seen = [draws()]
    with stream.active():
        inside = [draws()]
    seen.append(draws())
    with stream.active():
        inside.append(draws())
    assert seen == expected
    again = RandomStream(5)
    with again.active():
        assert [draws(), draws()] == inside
    assert inside[0] != inside[1]


def test_mixed_seed_tells_its_parts_apart():
    seeds = {mixed_seed(*parts) for parts in itertools.product(range(6), repeat=3)}
    assert len(seeds) == 6**3
    assert mixed_seed(-1, 2) == mixed_seed(2**32 - 1, 2)


def plan(rank=0, world_size=1, wide=None, size=10, batch_size=3, start=0):
    result = BatchPlan(wide, size, batch_size, seed=4, rank=rank, world_size=world_size)
    result.start = start
    return result


def take(iterable, count):
    return list(itertools.islice(iter(iterable), count))


def test_a_plan_goes_on_wherever_reading_begins():
    wide = [i % 3 == 0 for i in range(10)]
    whole = take(plan(wide=wide), 30)
    for start in (1, 7, 29):
        assert take(plan(wide=wide, start=start), 1)[0] == whole[start]


def test_epochs_are_permutations_dealt_out_to_ranks():
    ranks = [take(plan(rank=r, world_size=2, size=12, batch_size=2), 6) for r in (0, 1)]
    seen = [[index for batch in batches for index, _ in batch] for batches in ranks]
    for epoch in (0, 1):
        part = [rank[epoch * 6 : (epoch + 1) * 6] for rank in seen]
        assert sorted(part[0] + part[1]) == list(range(12))
    assert seen[0][:6] != seen[0][6:]


def test_batches_of_one_orientation():
    wide = [i % 3 == 0 for i in range(10)]
    for batch in take(plan(wide=wide), 20):
        assert len({wide[index] for index, _ in batch}) == 1


def test_every_image_has_a_seed_of_its_own():
    seeds = [seed for batch in take(plan(), 40) for _, seed in batch]
    assert len(set(seeds)) == len(seeds)


class Records(Dataset):
    def __len__(self):
        return 10

    def __getitem__(self, index):
        return {"index": index}


def augment(record):
    return record | {"draw": float(np.random.rand())}


def test_any_number_of_workers_gives_the_same_batches():
    dataset = _SeededDataset(Records(), augment)
    alone, helped = (take(DeterministicLoader(dataset, plan(), workers), 7) for workers in (0, 2))
    assert alone == helped
    resumed = DeterministicLoader(dataset, plan(), 0)
    resumed.set_iteration(4)
    assert take(resumed, 3) == alone[4:]


def test_loading_leaves_the_random_state_alone():
    torch.manual_seed(3), np.random.seed(3)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    take(DeterministicLoader(_SeededDataset(Records(), augment), plan(), 0), 3)
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()
