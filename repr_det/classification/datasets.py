"""Where images and labels come from: names, folders, files and arrays.

A dataset is registered under a name in Detectron2's ``DatasetCatalog``, where generic tools find
it as a list of one dict per image. The loaders of this package take a shorter way, the function
``read_images`` in ``MetadataCatalog``. It returns the arrays or file names of the whole dataset.

Datasets are found below the folder in the environment variable ``DETECTRON2_DATASETS`` (by
default ``./datasets``), as everywhere in Detectron2.
"""

from __future__ import annotations

import functools
import os
import shutil
import socket
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from iopath.common.file_io import file_lock
from torch import Tensor

from repr_det.engine.data import (
    check_held_out_name,
    datasets_root,
    first_line,
    held_out_name,
    is_hidden,
    is_image,
    part_indices,
)
from repr_det.errors import UserError

DOWNLOAD_TIMEOUT_S = 15


@dataclass(frozen=True)
class ImageArrays:
    """A dataset in memory.

    Attributes:
        images: uint8 ``(N, 3, H, W)``, RGB.
        labels: int64 ``(N,)``.
        classes: name of each class.
    """

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> ImageArrays:
        """The part of the dataset at these positions."""
        return ImageArrays(self.images[indices], self.labels[indices], self.classes)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Detectron2's format, with the pixels in ``"image"`` (there are no files)."""
        height, width = self.images.shape[-2:]
        return [
            {"image": image, "label": label, "height": height, "width": width, "image_id": index}
            for index, (image, label) in enumerate(
                zip(self.images, self.labels.tolist(), strict=True)
            )
        ]


@dataclass(frozen=True)
class ImageFiles:
    """A dataset of image files.

    Attributes:
        files: N paths.
        labels: int64 ``(N,)``.
        classes: name of each class.
    """

    files: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def select(self, indices: Tensor) -> ImageFiles:
        """The part of the dataset at these positions."""
        files = tuple(self.files[i] for i in indices.tolist())
        return ImageFiles(files, self.labels[indices], self.classes)

    def to_dicts(self) -> list[dict[str, Any]]:
        """Detectron2's format."""
        return [
            {"file_name": file, "label": label, "image_id": index}
            for index, (file, label) in enumerate(
                zip(self.files, self.labels.tolist(), strict=True)
            )
        ]


ImageData = ImageArrays | ImageFiles


def register_images(name: str, read: Callable[[], ImageData]) -> None:
    """Register a dataset.

    Args:
        name: how ``DATASETS.TRAIN`` and ``DATASETS.TEST`` refer to it.
        read: returns the dataset; called when it is first used, and again in other processes.
    """
    DatasetCatalog.register(name, lambda: read().to_dicts())
    MetadataCatalog.get(name).set(evaluator_type="classification", read_images=read)


def register_image_arrays(
    name: str, images: Tensor, labels: Tensor, classes: Sequence[str] | None = None
) -> None:
    """Register a dataset that is in memory already.

    Args:
        name: how the config refers to it.
        images: uint8 ``(N, 3, H, W)``, RGB.
        labels: int64 ``(N,)``.
        classes: names of the classes; by default their numbers.
    """
    names = classes or [str(i) for i in range(int(labels.max()) + 1)]
    data = ImageArrays(images, labels, tuple(names))
    register_images(name, lambda: data)


def register_image_folder(name: str, folder: str | os.PathLike[str]) -> None:
    """Register a folder with one folder of images for each class.

    Args:
        name: how the config refers to it.
        folder: its subfolders' sorted names are the classes.
    """
    register_images(name, functools.lru_cache(lambda: read_image_folder(folder)))


def use_image_folder(cfg: CfgNode, split: str, name: str, folder: str) -> None:
    """Register a folder of class folders and make the config train or test on it, in place.

    Args:
        cfg: the config.
        split: ``"TRAIN"`` or ``"TEST"``.
        name: to register it under.
        folder: see :func:`register_image_folder`.

    Raises:
        UserError: no such folder, or no images in it, or a name in use.
    """
    known = MetadataCatalog.get(name)
    if name not in DatasetCatalog:
        register_image_folder(name, folder)
        known.set(image_folder=folder)
    elif known.get("image_folder") != folder:
        raise UserError(f"A dataset called {name} is registered already. Set another name.")
    known.read_images()
    cfg.DATASETS[split] = (name,)


def take_num_folders(cfg: CfgNode, name: str, overrides: Sequence[str]) -> None:
    """Set the number of classes to that of a registered folder, unless an override sets it."""
    if "MODEL.CLASSIFIER.NUM_CLASSES" not in overrides:
        cfg.MODEL.CLASSIFIER.NUM_CLASSES = len(MetadataCatalog.get(name).read_images().classes)


class _ClassFolders(torchvision.datasets.ImageFolder):
    def find_classes(self, directory: str) -> tuple[list[str], dict[str, int]]:
        """Names of the folders that are not hidden, and their numbers."""
        found = sorted(p.name for p in Path(directory).iterdir() if p.is_dir() and not is_hidden(p))
        if not found:
            raise FileNotFoundError(f"Couldn't find any class folder in {directory}.")
        return found, {name: number for number, name in enumerate(found)}


def _is_seen(path: str, folder: str | os.PathLike[str]) -> bool:
    below = Path(path).relative_to(folder)
    return is_image(below) and not any(map(is_hidden, below.parents))


def read_image_folder(folder: str | os.PathLike[str]) -> ImageFiles:
    """List the images below a folder of class folders, without hidden files and folders.

    Raises:
        UserError: no such folder, no class folders, or one without images.
    """
    folder = os.path.expanduser(folder)
    try:
        found = _ClassFolders(folder, is_valid_file=lambda path: _is_seen(path, folder))
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{folder} is no folder of class folders with images "
            f"({first_line(error).rstrip('.')}). Set the folder above the classes, or "
            f"DETECTRON2_DATASETS."
        ) from error
    files, labels = zip(*found.samples, strict=True)
    return ImageFiles(files, torch.tensor(labels), tuple(found.classes))


@dataclass(frozen=True)
class CifarRelease:
    """What is known about one of the CIFAR datasets."""

    name: str
    reader: type[torchvision.datasets.CIFAR10]
    classes: tuple[str, ...]


CIFAR_SIZES = {"train": 50_000, "test": 10_000}
CIFAR_SIDE = 32
CIFAR10 = CifarRelease(
    "cifar10",
    torchvision.datasets.CIFAR10,
    ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
)
CIFAR100 = CifarRelease(
    "cifar100", torchvision.datasets.CIFAR100, tuple(str(i) for i in range(100))
)


def read_cifar(release: CifarRelease, split: str, root: Path) -> ImageArrays:
    """Read CIFAR-10 or CIFAR-100, downloading it where it is missing and a network is there.

    Looked for below ``root``, in this order: ``<name>/<name>.npz``, ``<name>.npz`` (arrays
    ``x_train`` uint8 ``(50000, 32, 32, 3)``, ``y_train``, ``x_test``, ``y_test``), and the official
    Python release unpacked in ``<name>/`` or in ``root``. That release is made of pickles;
    torchvision compares their checksums with the published ones before it reads them.

    Args:
        release: ``CIFAR10`` or ``CIFAR100``.
        split: ``"train"`` or ``"test"``.
        root: see above.

    Raises:
        UserError: not there and not to be had, or there, but damaged or of the wrong size.
    """
    folder = root / release.name
    for npz in (folder / f"{release.name}.npz", root / f"{release.name}.npz"):
        if npz.is_file():
            images, labels = _read_npz(npz, split)
            return _cifar_arrays(release, split, images, labels, npz)
    for place in (folder, root):
        if (place / release.reader.base_folder).is_dir():
            break
    else:
        place = _download(release, folder)
    try:
        data = release.reader(place, train=split == "train")
    except (RuntimeError, EOFError, KeyError) as error:
        raise UserError(
            f"{place / release.reader.base_folder} is incomplete or damaged. Delete it, so that "
            f"it is downloaded again."
        ) from error
    return _cifar_arrays(release, split, data.data, np.asarray(data.targets), place)


def _read_npz(path: Path, split: str) -> tuple[np.ndarray, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays[f"x_{split}"], arrays[f"y_{split}"]
    except (KeyError, ValueError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise UserError(
            f"{path} cannot be read as arrays x_{split} and y_{split} ({error}). Make it again."
        ) from error


def _cifar_arrays(
    release: CifarRelease, split: str, images: np.ndarray, labels: np.ndarray, source: Path
) -> ImageArrays:
    size = CIFAR_SIZES[split]
    wanted = (size, CIFAR_SIDE, CIFAR_SIDE, 3)
    if images.shape != wanted or images.dtype != np.uint8 or labels.shape != (size,):
        raise UserError(
            f"{source} holds {images.dtype} images of shape {images.shape} and labels of shape "
            f"{labels.shape} for the {split} split instead of uint8 {wanted} and {(size,)}, so it "
            f"is truncated or another dataset. Make it again."
        )
    tensor = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return ImageArrays(tensor, torch.from_numpy(labels.astype(np.int64)), release.classes)


def _download(release: CifarRelease, folder: Path) -> Path:
    """Download the official release below ``folder``: whole or not at all, by one process."""
    target = folder / release.reader.base_folder
    timeout = socket.getdefaulttimeout()
    # In the system's temporary folder, so that nothing is written below ours without a network. The
    # files there belong to whoever makes them.
    lock = Path(tempfile.gettempdir(), f"repr_det_{os.getuid()}_{release.name}")
    with file_lock(str(lock)):
        if target.is_dir():
            return folder
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT_S)
        try:
            with tempfile.TemporaryDirectory() as aside:
                release.reader(aside, download=True)
                folder.mkdir(parents=True, exist_ok=True)
                # A copy first, since a rename is atomic only within one file system.
                partial = target.with_name(f".{target.name}.partial")
                shutil.copytree(Path(aside, target.name), partial, dirs_exist_ok=True)
                partial.rename(target)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"{release.name} was not found as {folder / release.name}.npz or in {target}, and "
                f"could not be downloaded ({type(error).__name__}). Put it there, or set "
                "DETECTRON2_DATASETS to the folder that holds it."
            ) from error
        finally:
            socket.setdefaulttimeout(timeout)
    return folder


@functools.lru_cache(maxsize=4)
def _cifar(release: CifarRelease, split: str, root: Path) -> ImageArrays:
    return read_cifar(release, split, root)


def split_images(
    data: ImageData, held_out: int = 0, share: float = 1.0
) -> tuple[ImageData, ImageData]:
    """Images to train on and held-out ones; see :func:`repr_det.engine.data.part_indices`."""
    training, rest = part_indices(len(data), held_out, share)
    return data.select(training), data.select(rest)


def _read(name: str) -> ImageData:
    read = MetadataCatalog.get(name).get("read_images") if name in DatasetCatalog else None
    if read is None:
        known = [n for n in DatasetCatalog if MetadataCatalog.get(n).get("read_images")]
        raise UserError(
            f"There is no classification dataset named {name!r}. Set one of {', '.join(known)}, "
            "or register yours with register_image_folder."
        )
    return read()


def _check(data: ImageData, name: str, cfg: CfgNode) -> ImageData:
    classes = cfg.MODEL.CLASSIFIER.NUM_CLASSES
    if not len(data):
        raise UserError(f"{name} has no images. Set another dataset.")
    low, high = int(data.labels.min()), int(data.labels.max())
    if low < 0 or high >= classes:
        raise UserError(
            f"{name} has labels from {low} to {high}, but MODEL.CLASSIFIER.NUM_CLASSES is "
            f"{classes}. Set labels from 0 to {classes - 1}, or another number of classes."
        )
    if isinstance(data, ImageArrays):
        side = cfg.INPUT.IMAGE_SIZE
        if tuple(data.images.shape[1:]) != (3, side, side):
            raise UserError(
                f"{name} has images of shape {tuple(data.images.shape[1:])}, but INPUT.IMAGE_SIZE "
                f"asks for {(3, side, side)}. Set it to the size of the images."
            )
    return data


@functools.lru_cache(maxsize=2)
def _parts(
    name: str, held_out: int, share: float, read: Callable[[], ImageData]
) -> tuple[ImageData, ImageData]:
    return split_images(read(), held_out, share)


def training_set(cfg: CfgNode) -> str:
    """The name of the dataset that a config trains on.

    Raises:
        UserError: none or several.
    """
    if len(cfg.DATASETS.TRAIN) != 1:
        raise UserError(
            f"DATASETS.TRAIN is {tuple(cfg.DATASETS.TRAIN)}, but classification trains on one "
            f"dataset. Set one that is registered, or images with --train-folder."
        )
    return cfg.DATASETS.TRAIN[0]


def load_images(cfg: CfgNode, name: str) -> ImageData:
    """A dataset that the config names, checked against the config.

    With ``DATASETS.HELD_OUT`` set, the training set comes without its held-out part, and
    :func:`repr_det.engine.data.held_out_name` of it is that part. Of what is left,
    ``DATASETS.TRAIN_SHARE`` is taken.

    Raises:
        UserError: a name that is not registered, a dataset that is missing or damaged, none or
            several training sets, a part out of range, or labels or images that do not fit the
            config.
    """
    train_name = training_set(cfg)
    count, share = cfg.DATASETS.HELD_OUT, cfg.DATASETS.TRAIN_SHARE
    held_out_part = held_out_name(train_name)
    is_users = held_out_part in DatasetCatalog.list()  # ours is not registered
    check_held_out_name(held_out_part, count, is_users=is_users, is_used=name == held_out_part)
    parted = (train_name, held_out_part) if count else (train_name,)
    if (count or share != 1) and name in parted:
        _read(train_name)
        read = MetadataCatalog.get(train_name).read_images
        training, held_out = _parts(train_name, count, share, read)
        return _check(training if name == train_name else held_out, name, cfg)
    return _check(_read(name), name, cfg)


def training_images(cfg: CfgNode) -> ImageData:
    """What a config trains on: :func:`load_images` of its training set, with its random labels.

    Raises:
        UserError: ``DATASETS.RANDOM_LABELS`` or its seed out of range; also see
            :func:`load_images`.
    """
    data = load_images(cfg, training_set(cfg))
    share, seed = cfg.DATASETS.RANDOM_LABELS, cfg.DATASETS.RANDOM_LABELS_SEED
    labels = with_random_labels(data.labels, len(data.classes), share, seed)
    return replace(data, labels=labels)


def with_random_labels(labels: Tensor, classes: int, share: float, seed: int) -> Tensor:
    """Labels of which a share is replaced by labels drawn from all classes alike.

    As the partially corrupted labels of Zhang et al., "Understanding deep learning requires
    rethinking generalization", 2017: a drawn label may be the true one, so that of 40 % random
    labels of ten classes 36 % are wrong. A function of the arguments alone, the same on every rank.

    Args:
        labels: int64 ``(N,)``; not changed.
        classes: how many there are.
        share: of the labels, those that are replaced, from 0 to 1; rounded to whole labels.
        seed: another seed, other images and labels, at least 0. With one seed, a larger share
            contains the smaller ones with their labels.

    Returns:
        int64 ``(N,)``.

    Raises:
        UserError: an argument out of range.
    """
    if not 0 <= share <= 1:
        raise UserError(f"DATASETS.RANDOM_LABELS is {share}. Set a share from 0 to 1.")
    if not 0 <= seed < 2**63:
        raise UserError(
            f"DATASETS.RANDOM_LABELS_SEED is {seed}. Set it to 0 or more, below 2 to the power of "
            "63."
        )
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(labels), generator=generator)
    drawn = torch.randint(classes, (len(labels),), generator=generator)
    replaced = order[: round(share * len(labels))]
    return labels.index_copy(0, replaced, drawn[replaced])


def register_builtin() -> None:
    """Register CIFAR-10, CIFAR-100 and ImageNet under Detectron2's dataset root."""
    for release in (CIFAR10, CIFAR100):
        for split in CIFAR_SIZES:
            register_images(
                f"{release.name}_{split}",
                lambda r=release, s=split: _cifar(r, s, datasets_root()),
            )
    for split in ("train", "val"):
        register_images(
            f"imagenet_{split}", lambda s=split: _folder(datasets_root() / "imagenet" / s)
        )


@functools.lru_cache(maxsize=4)
def _folder(folder: Path) -> ImageFiles:
    return read_image_folder(folder)


register_builtin()
