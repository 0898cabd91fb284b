"""Batches: from memory on the training device, or from image files by worker processes.

What a training batch holds is a function of the seed and the iteration alone. Draws are made for
the whole batch of all processes and each takes its share, so a run on several processes sees the
images and crops that a run on one would, and a resumed run continues where it stopped.
"""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.transforms import v2

from repr_det.classification.datasets import ImageArrays, ImageFiles
from repr_det.engine.data import check_batch_size, read_image

Batch = dict[str, Tensor]


def generator_for(seed: int, purpose: str, index: int) -> torch.Generator:
    """A random generator on the CPU that is a function of its arguments."""
    digest = hashlib.blake2b(f"{seed}/{purpose}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


@dataclass(frozen=True)
class SampleOrder:
    """An endless sequence of sample indices: one permutation of all samples after the other.

    Batches do not stop at the end of an epoch, so every epoch shows every sample once and every
    batch is full.

    Attributes:
        size: number of samples N.
        batch_size: samples of one iteration, over all processes.
        seed: another seed, another order.
    """

    size: int
    batch_size: int
    seed: int

    def batch(self, iteration: int) -> Tensor:
        """The sample indices of an iteration, int64 ``(batch_size,)``."""
        begin = iteration * self.batch_size
        end = begin + self.batch_size
        parts = []
        while begin < end:
            epoch, offset = divmod(begin, self.size)
            part = _permutation(self.size, self.seed, epoch)[offset : offset + end - begin]
            parts.append(part)
            begin += len(part)
        return torch.cat(parts)


@functools.lru_cache(maxsize=4)
def _permutation(size: int, seed: int, epoch: int) -> Tensor:
    return torch.randperm(size, generator=generator_for(seed, "order", epoch))


@dataclass(frozen=True)
class Share:
    """Which part of every batch a process takes.

    Attributes:
        rank: of this process, ``0 .. world_size - 1``.
        world_size: number of processes.
    """

    rank: int = 0
    world_size: int = 1

    def of(self, batch: Tensor) -> Tensor:
        """This process's rows of ``(B, ...)``; B is a multiple of the world size."""
        size = len(batch) // self.world_size
        return batch[self.rank * size : (self.rank + 1) * size]


def crop_and_flip(
    images: Tensor, padding: int, offsets: Tensor, flips: Tensor | None = None
) -> Tensor:
    """Crop each image out of itself with a border of zeros, and mirror some.

    Args:
        images: ``(B, C, H, W)``.
        padding: width of the border in pixels.
        offsets: ``(B, 2)``, upper and left end of each crop, ``0 .. 2 * padding``.
        flips: bool ``(B,)``, which crops are mirrored left to right; None for none.

    Returns:
        ``(B, C, H, W)``, of the images' type.
    """
    size, channels, height, width = images.shape
    rows = offsets[:, :1] + torch.arange(height, device=images.device)
    columns = offsets[:, 1:] + torch.arange(width, device=images.device)
    if flips is not None:
        columns = torch.where(flips[:, None], columns.flip(1), columns)
    padded = F.pad(images, (padding,) * 4)
    # One flat index for every pixel: several times faster than indexing with four tensors.
    full = width + 2 * padding
    pixels = (rows[:, :, None] * full + columns[:, None, :]).view(size, 1, -1)
    flat = padded.view(size, channels, -1)
    return flat.gather(2, pixels.expand(-1, channels, -1)).view_as(images)


class ArrayTrainLoader:
    """Endless training batches of a dataset that is on the training device.

    Yields ``{"image": uint8 (b, 3, H, W), "label": int64 (b,)}`` on the device, with b this
    process's share of the batch. No worker processes, no copies of the dataset.

    Args:
        data: the dataset.
        batch_size: images of one iteration, over all processes.
        seed: of order and augmentation.
        device: where the batches are made.
        crop_padding: border of the random crops in pixels, 0 for no crops.
        flip: mirror half of the images.
        share: which part of each batch to yield.
        bgr: yield BGR instead of RGB.

    Raises:
        UserError: a batch size that the processes cannot share.
    """

    def __init__(
        self,
        data: ImageArrays,
        batch_size: int,
        seed: int,
        device: torch.device | str = "cpu",
        crop_padding: int = 0,
        flip: bool = False,
        share: Share = Share(),
        bgr: bool = False,
    ) -> None:
        check_batch_size(batch_size, share.world_size)
        images = data.images.flip(1) if bgr else data.images
        self.images = images.to(device)
        self.labels = data.labels.to(device)
        self.order = SampleOrder(len(data), batch_size, seed)
        self.crop_padding = crop_padding
        self.flip = flip
        self.share = share
        self.iteration = 0

    def set_iteration(self, iteration: int) -> None:
        """Let the next iterator begin with this iteration's batch."""
        self.iteration = iteration

    def reopened(self) -> ArrayTrainLoader:
        """A loader of the same data from its beginning, which shares no state with this one."""
        own = copy.copy(self)
        own.set_iteration(0)
        return own

    def batch(self, iteration: int) -> Batch:
        """This process's batch of an iteration."""
        device = self.images.device
        drawn = self._draw(iteration) if self.crop_padding or self.flip else ()
        indices, *augmentation = (
            self.share.of(part).to(device, non_blocking=True)
            for part in (self.order.batch(iteration), *drawn)
        )
        images = self.images[indices]
        if augmentation:
            offsets, flips = augmentation
            images = crop_and_flip(images, self.crop_padding, offsets, flips if self.flip else None)
        return {"image": images, "label": self.labels[indices]}

    def _draw(self, iteration: int) -> tuple[Tensor, Tensor]:
        generator = generator_for(self.order.seed, "augmentation", iteration)
        size = self.order.batch_size
        offsets = torch.randint(2 * self.crop_padding + 1, (size, 2), generator=generator)
        return offsets, torch.rand(size, generator=generator) < 0.5

    def __iter__(self) -> Iterator[Batch]:
        iteration = self.iteration
        while True:
            yield self.batch(iteration)
            iteration += 1


class ArrayTestLoader:
    """All images of a dataset in memory once, this process's part of them.

    Yields batches like :class:`ArrayTrainLoader`, in order; has a length.

    Args:
        data: the dataset.
        batch_size: images in a batch of this process.
        device: where the batches are made.
        share: the processes take consecutive parts.
        bgr: yield BGR instead of RGB.
    """

    def __init__(
        self,
        data: ImageArrays,
        batch_size: int,
        device: torch.device | str = "cpu",
        share: Share = Share(),
        bgr: bool = False,
    ) -> None:
        part = _part(len(data), share)
        images = data.images[part.start : part.stop]
        self.images = (images.flip(1) if bgr else images).to(device)
        self.labels = data.labels[part.start : part.stop].to(device)
        self.batch_size = batch_size

    def __len__(self) -> int:
        return -(-len(self.labels) // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        pairs = zip(
            self.images.split(self.batch_size), self.labels.split(self.batch_size), strict=True
        )
        for images, labels in pairs:
            if len(labels):
                yield {"image": images, "label": labels}


def _part(size: int, share: Share) -> range:
    """This process's consecutive part of ``0 .. size - 1``; parts differ by at most one."""
    begin, end = (size * rank // share.world_size for rank in (share.rank, share.rank + 1))
    return range(begin, end)


def train_transform(image_size: int, min_area: float, flip: bool) -> v2.Transform:
    """Random crop of random area and shape, resized; mirrored half of the time."""
    crop = v2.RandomResizedCrop(image_size, scale=(min_area, 1.0), antialias=True)
    return v2.Compose([crop, v2.RandomHorizontalFlip()]) if flip else crop


def test_transform(image_size: int) -> v2.Transform:
    """Resize the shorter side to 8/7 of the size (256 for 224) and crop the middle."""
    return v2.Compose(
        [v2.Resize(round(image_size * 8 / 7), antialias=True), v2.CenterCrop(image_size)]
    )


class _FileDataset(Dataset):
    """Decoded and transformed images; keys are pairs of sample index and random key."""

    def __init__(self, data: ImageFiles, transform: v2.Transform, seed: int, bgr: bool) -> None:
        self.data = data
        self.transform = transform
        self.seed = seed
        self.bgr = bgr

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        index, position = key
        image = torch.tensor(read_image(self.data.files[index])).permute(2, 0, 1)
        # The transforms draw from torch's global generator, so its state is lent to this sample.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.set_state(
                generator_for(self.seed, "augmentation", position).get_state()
            )
            image = self.transform(image)
        return image.flip(0) if self.bgr else image, int(self.data.labels[index])


class _EndlessBatches(Sampler[list[tuple[int, int]]]):
    def __init__(self, order: SampleOrder, share: Share, start: int) -> None:
        self.order = order
        self.share = share
        self.start = start

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        iteration = self.start
        size = self.order.batch_size
        while True:
            positions = torch.arange(iteration * size, (iteration + 1) * size)
            indices = self.share.of(self.order.batch(iteration))
            yield list(zip(indices.tolist(), self.share.of(positions).tolist(), strict=True))
            iteration += 1


def _collate(samples: list[tuple[Tensor, int]]) -> Batch:
    images, labels = zip(*samples, strict=True)
    return {"image": torch.stack(images), "label": torch.tensor(labels)}


class FileTrainLoader:
    """Endless training batches of image files, decoded by worker processes.

    Yields ``{"image": uint8 (b, 3, S, S), "label": int64 (b,)}`` on the CPU. The number of workers
    does not change what is yielded.

    Args:
        data: the dataset.
        batch_size: images of one iteration, over all processes.
        seed: of order and augmentation.
        transform: from a uint8 image ``(3, H, W)`` to ``(3, S, S)``; may draw from torch's
            global generator.
        num_workers: processes that decode, 0 for none.
        share: which part of each batch to yield.
        bgr: yield BGR instead of RGB.

    Raises:
        UserError: a batch size that the processes cannot share.
    """

    def __init__(
        self,
        data: ImageFiles,
        batch_size: int,
        seed: int,
        transform: v2.Transform,
        num_workers: int = 0,
        share: Share = Share(),
        bgr: bool = False,
    ) -> None:
        check_batch_size(batch_size, share.world_size)
        self.dataset = _FileDataset(data, transform, seed, bgr)
        self.order = SampleOrder(len(data), batch_size, seed)
        self.num_workers = num_workers
        self.share = share
        self.iteration = 0

    def set_iteration(self, iteration: int) -> None:
        """Let the next iterator begin with this iteration's batch."""
        self.iteration = iteration

    def reopened(self) -> FileTrainLoader:
        """A loader of the same data from its beginning, which shares no state with this one."""
        own = copy.copy(self)
        own.set_iteration(0)
        return own

    def __iter__(self) -> Iterator[Batch]:
        loader = DataLoader(
            self.dataset,
            batch_sampler=_EndlessBatches(self.order, self.share, self.iteration),
            num_workers=self.num_workers,
            collate_fn=_collate,
            pin_memory=torch.cuda.is_available(),
            # Its own: the loader draws a base seed, which would shift the run's random numbers.
            generator=torch.Generator(),
        )
        return iter(loader)


def file_test_loader(
    data: ImageFiles,
    batch_size: int,
    image_size: int,
    num_workers: int = 0,
    share: Share = Share(),
    bgr: bool = False,
) -> DataLoader:
    """All image files once, this process's consecutive part of them, middle crops in order."""
    return DataLoader(
        _FileDataset(data, test_transform(image_size), 0, bgr),
        sampler=[(index, index) for index in _part(len(data), share)],
        batch_size=batch_size,
        num_workers=num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
    )
