"""Training data whose order and augmentation are a function of seed, iteration and rank."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.data.common import DatasetFromList
from detectron2.utils import comm
from torch.utils.data import DataLoader, Dataset, Sampler

from repr_det.engine.randomness import RandomStream, mixed_seed
from repr_det.errors import UserError

Key = tuple[int, int]
"""An image to load: its index and the seed of its augmentation."""


class _SeededDataset(Dataset):
    """Maps a key to a training example; the same key gives the same example anywhere."""

    def __init__(self, records: Any, mapper: Callable[[dict], dict | None]) -> None:
        self._records, self._mapper = records, mapper

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, key: Key) -> dict:
        index, seed = key
        with RandomStream(seed).active():
            # A mapper returns None for an image that is to be skipped; the next one stands in.
            for other in range(len(self._records)):
                example = self._mapper(self._records[(index + other) % len(self._records)])
                if example is not None:
                    return example
        raise UserError("None of the training images can be read. See the warnings above.")


class BatchPlan(Sampler):
    """Which images one rank sees in each iteration, without end.

    Epochs are permutations of all images, dealt out to the ranks in turn. With aspect-ratio
    grouping a batch holds only wide or only tall images; the plan is always worked out from its
    beginning, so that an iteration's batch does not depend on where reading begins.

    Args:
        wide: by image, whether it is wider than tall; None for batches in the order of the epoch.
        size: number of images.
        batch_size: images of one iteration of this rank.
        seed: of the order and of the augmentations.
        rank: of this process.
        world_size: number of processes.
    """

    def __init__(
        self,
        wide: list[bool] | None,
        size: int,
        batch_size: int,
        *,
        seed: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._wide, self._size, self._batch_size = wide, size, batch_size
        self._seed, self._rank, self._world_size = seed, rank, world_size
        self.start = 0

    def _indices(self) -> Iterator[int]:
        position = epoch = 0
        while True:
            generator = torch.Generator().manual_seed(mixed_seed(self._seed, epoch))
            for index in torch.randperm(self._size, generator=generator).tolist():
                if position % self._world_size == self._rank:
                    yield index
                position += 1
            epoch += 1

    def _batches(self) -> Iterator[list[int]]:
        waiting: tuple[list[int], list[int]] = ([], [])
        for index in self._indices():
            bucket = waiting[self._wide is not None and self._wide[index]]
            bucket.append(index)
            if len(bucket) == self._batch_size:
                yield list(bucket)
                bucket.clear()

    def __iter__(self) -> Iterator[list[Key]]:
        for iteration, batch in enumerate(self._batches()):
            if iteration >= self.start:
                yield [
                    (index, mixed_seed(self._seed, iteration, self._rank, slot))
                    for slot, index in enumerate(batch)
                ]


class DeterministicLoader:
    """Endless training batches of one rank; the same for any number of workers.

    Args:
        dataset: maps keys of the plan to examples.
        plan: what each iteration sees.
        num_workers: processes that load.
    """

    def __init__(self, dataset: Dataset, plan: BatchPlan, num_workers: int) -> None:
        self._dataset, self._plan, self._num_workers = dataset, plan, num_workers

    def set_iteration(self, iteration: int) -> None:
        """Make the next iterator begin with this iteration."""
        self._plan = copy.copy(self._plan)
        self._plan.start = iteration

    def reopened(self) -> DeterministicLoader:
        """A loader of the same data from its beginning, which shares no state with this one."""
        own = copy.copy(self)
        own.set_iteration(0)
        return own

    def __iter__(self) -> Iterator[list[dict]]:
        # A generator of its own: the loader draws a base seed, which would shift the run's.
        yield from DataLoader(
            self._dataset,
            batch_sampler=self._plan,
            num_workers=self._num_workers,
            collate_fn=list,
            generator=torch.Generator(),
        )


def build_deterministic_loader(
    cfg: CfgNode, records: list[dict[str, Any]], mapper: Callable[[dict], dict | None]
) -> DeterministicLoader:
    """The deterministic counterpart of Detectron2's training loader.

    Args:
        cfg: a config with ``DETERMINISTIC``.
        records: of the training images, in Detectron2's format.
        mapper: makes a training example of a record, or None to skip it.

    Raises:
        UserError: a sampler other than TrainingSampler.
    """
    if cfg.DATALOADER.SAMPLER_TRAIN != "TrainingSampler":
        raise UserError(
            f"DATALOADER.SAMPLER_TRAIN is {cfg.DATALOADER.SAMPLER_TRAIN}. With DETERMINISTIC, set "
            f"TrainingSampler."
        )
    world_size = comm.get_world_size()
    grouped = cfg.DATALOADER.ASPECT_RATIO_GROUPING
    plan = BatchPlan(
        [record["width"] > record["height"] for record in records] if grouped else None,
        len(records),
        cfg.SOLVER.IMS_PER_BATCH // world_size,
        seed=cfg.SEED,
        rank=comm.get_rank(),
        world_size=world_size,
    )
    dataset = _SeededDataset(DatasetFromList(records, copy=False), mapper)
    return DeterministicLoader(dataset, plan, cfg.DATALOADER.NUM_WORKERS)
