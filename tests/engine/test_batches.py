"""RePr's own look at training data takes nothing from the run, whatever its loader is."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset, _MapIterableDataset
from detectron2.engine import SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn import functional as F
from torch.utils.data import (
    ChainDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
)

from repr_det import RePrHook, RePrSchedule
from repr_det.engine.batches import own_batches
from repr_det.errors import UserError

NUMBERS = [0, 1, 1, 0, 2, 3, 5, 4, 6, 8]
RECORDS = [{"width": 2 + i % 2, "height": 2.5, "number": i} for i in NUMBERS]


def test_half_full_buckets_stay_the_runs_own():
    undisturbed = list(AspectRatioGroupedDataset(RECORDS, 3))
    loader = AspectRatioGroupedDataset(RECORDS, 3)
    training = iter(loader)
    seen = [next(training)]
    assert len(next(own_batches(loader, seed=0)())) == 3
    assert seen + list(training) == undisturbed


class Locked(Dataset):
    """Cannot be copied, as an open file or database cannot."""

    def __init__(self):
        self.lock = threading.Lock()

    def __len__(self):
        return 16

    def __getitem__(self, index):
        return torch.full((3, 8, 8), float(index)), index % 4


def test_dataset_is_not_copied_with_its_sampler():
    data = Locked()
    loader = DataLoader(data, 4, sampler=RandomSampler(data, replacement=True, num_samples=100))
    assert len(list(own_batches(loader, seed=0)())) == 25


class Net(nn.Module):
    """A norm whose statistics never train, so returned channels need batches."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), FrozenBatchNorm2d(8), nn.ReLU()
        )
        self.classes = nn.Linear(8, 4)

    def forward(self, batch):
        if isinstance(batch, torch.Tensor):
            return self.classes(self.features(batch).mean((2, 3)))
        images, labels = batch
        return {"loss": F.cross_entropy(self(images), labels)}


def trainer_over(loader, **arguments):
    model = Net()
    trainer = SimpleTrainer(model, loader, torch.optim.SGD(model.parameters(), lr=0.01))
    trainer.register_hooks([RePrHook(RePrSchedule(1, 1, 1), **arguments)])
    return trainer


READ: list[int] = []


def examples():
    """Batches without end that write down which of them were read."""
    for number in itertools.count():
        READ.append(number)
        yield torch.full((2, 3, 8, 8), float(number)), torch.zeros(2, dtype=torch.int64)


def images():
    return (images for images, _ in examples())


def labels():
    return itertools.repeat(torch.zeros(2, dtype=torch.int64))


class Running:
    """Keeps a running iterator, as loaders that prefetch do."""

    def __init__(self):
        self.iterator = examples()

    def __iter__(self):
        return self.iterator


class OfItself(Running):
    """Is its own iterator."""

    def __iter__(self):
        return self

    def __next__(self):
        return next(self.iterator)


class Stream(IterableDataset):
    """Can be read once."""

    def __init__(self):
        self.iterator = examples()

    def __iter__(self):
        return self.iterator


class Kept(DataLoader):
    """As timm's and Ultralytics' loaders, which keep their workers and iterator over epochs."""

    def __init__(self):
        super().__init__(Numbers())
        self.__dict__["iterator"] = examples()

    def __iter__(self):
        return self.iterator


class Numbers(Dataset):
    def __len__(self):
        return 64

    def __getitem__(self, index):
        READ.append(index)
        return torch.full((3, 8, 8), float(index)), 0


class Order(Sampler):
    """A sampler whose every iterator is the same one."""

    shared = itertools.count()

    def __iter__(self):
        return Order.shared


class Buckets:
    """What is not yet full is kept on the loader."""

    def __init__(self):
        self.gathered = []

    def __iter__(self):
        for example in examples():
            self.gathered.append(example)
            if len(self.gathered) == 1:
                yield self.gathered.pop()


LOADERS = {
    "generator": examples,
    "map": lambda: map(lambda example: example, examples()),
    "zip": lambda: zip(images(), labels(), strict=False),
    "running": Running,
    "iterator": OfItself,
    "stream": lambda: DataLoader(Stream(), batch_size=None),
    "chained streams": lambda: DataLoader(ChainDataset([Stream()]), batch_size=None),
    "subclass": Kept,
    "mapped": lambda: _MapIterableDataset(Stream(), lambda example: example),
    "buckets": Buckets,
}


@pytest.mark.parametrize("name", LOADERS)
def test_a_loader_of_unknown_kind_is_left_alone(name):
    """RePr says that there are no batches, and training sees all of them."""
    READ.clear()
    with pytest.warns(UserWarning, match="Pass batches= and loss="):
        trainer = trainer_over(LOADERS[name]())
    trainer.train(0, 4)
    assert READ[:4] == [0, 1, 2, 3] and len(READ) <= 5


def test_a_sampler_that_is_running_is_left_alone():
    READ.clear()
    Order.shared = itertools.count()
    loader = DataLoader(Numbers(), 2, sampler=Order())
    with pytest.warns(UserWarning, match="Pass batches= and loss="):
        trainer = trainer_over(loader)
    trainer.train(0, 4)
    assert READ[:8] == list(range(8))


def test_a_criterion_that_needs_batches_asks_for_them():
    READ.clear()
    with pytest.raises(UserError, match="'apoz' looks at training batches. Pass batches="):
        trainer_over(examples(), criterion="apoz")
    assert READ == []


def test_batches_that_are_passed_are_used():
    """Also where the training loader may not be touched."""
    READ.clear()
    own = [(torch.rand(2, 3, 8, 8), torch.zeros(2, dtype=torch.int64))]
    trainer = trainer_over(examples(), criterion="apoz", batches=lambda: iter(own))
    trainer.train(0, 4)
    assert READ[:4] == [0, 1, 2, 3]


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_persistent_workers_go_on():
    """To iterate over such a loader a second time begins the running iterator again."""
    numbers = Numbers()
    loader = DataLoader(numbers, 2, num_workers=1, persistent_workers=True)
    training = iter(loader)
    seen = [next(training)[0][:, 0, 0, 0]]
    assert len(list(own_batches(loader, seed=0)())) == 32
    seen += [images[:, 0, 0, 0] for images, _ in training]
    assert torch.cat(seen).tolist() == list(range(64))


def test_batches_that_fail_do_so_on_registration():
    class Broken(Locked):
        def __getitem__(self, index):
            return {"image": torch.zeros(3, 8, 8)}

    with pytest.raises(
        RuntimeError, match=r"could not run the model on a training batch .*batches="
    ):
        trainer_over(DataLoader(Broken(), 4))
