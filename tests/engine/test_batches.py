"""RePr's own look at training data takes nothing from the run, whatever its loader is."""

from __future__ import annotations

import itertools
import threading

import pytest
import torch
from detectron2.data.common import AspectRatioGroupedDataset
from detectron2.engine import SimpleTrainer
from detectron2.layers import FrozenBatchNorm2d
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, RandomSampler

from repr_det import RePrHook, RePrSchedule
from repr_det.engine.batches import own_batches


class Buckets:
    """Batches of even and of odd numbers; what is not yet full is kept on the loader."""

    def __init__(self, numbers, kind=list):
        self.numbers = numbers
        self.gathered = [[], []] if kind is list else {0: [], 1: []}

    def __iter__(self):
        for number in self.numbers:
            bucket = self.gathered[number % 2]
            bucket.append(number)
            if len(bucket) == 3:
                yield bucket[:]
                bucket.clear()


class Wide(AspectRatioGroupedDataset):
    """A class of one's own, with something to say."""

    def __iter__(self):
        for batch in super().__iter__():
            yield ["wide", *batch]


NUMBERS = [0, 1, 1, 0, 2, 3, 5, 4, 6, 8]
RECORDS = [{"width": 2 + i % 2, "height": 2.5, "number": i} for i in NUMBERS]
LOADERS = {
    "buckets": lambda: Buckets(NUMBERS),
    "buckets by name": lambda: Buckets(NUMBERS, dict),
    "subclass": lambda: Wide(RECORDS, 3),
}


@pytest.mark.parametrize("name", LOADERS)
def test_half_full_buckets_stay_the_runs_own(name):
    undisturbed = list(LOADERS[name]())
    loader = LOADERS[name]()
    training = iter(loader)
    seen = [next(training)]
    own = next(own_batches(loader, seed=0)())
    assert type(own) is list and (name != "subclass" or own[0] == "wide")
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


def test_loader_that_can_be_opened_once_is_left_alone():
    """It is said that there are no batches, and training sees all of them."""
    read = []

    def endless():
        for number in itertools.count():
            read.append(number)
            yield torch.full((2, 3, 8, 8), float(number)), torch.zeros(2, dtype=torch.int64)

    with pytest.warns(UserWarning, match="pass batches= and loss="):
        trainer = trainer_over(endless())
    trainer.train(0, 4)
    assert read == [0, 1, 2, 3]


def test_batches_that_fail_do_so_on_registration():
    class Broken(Locked):
        def __getitem__(self, index):
            return {"image": torch.zeros(3, 8, 8)}

    with pytest.raises(
        RuntimeError, match=r"could not run the model on a training batch .*batches="
    ):
        trainer_over(DataLoader(Broken(), 4))
