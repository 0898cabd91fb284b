from __future__ import annotations

import argparse
import hashlib
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from repr_det.classification import datasets, register_image_folder
from repr_det.classification.datasets import (
    CIFAR10,
    CIFAR100,
    ImageArrays,
    load_images,
    read_cifar,
    register_images,
    split_images,
    take_num_folders,
    use_image_folder,
    with_random_labels,
)
from repr_det.classification.trainer import ClassificationTrainer
from repr_det.cli.arguments import add_data
from repr_det.engine.data import held_out_name
from repr_det.errors import UserError
from repr_det.tasks import get_cfg, use_data
from tests.classification.settings import make_arrays, register, register_corners, small_cfg


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Downloads fail at once, as on a machine without a network."""

    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)


@pytest.fixture
def small_cifar(monkeypatch):
    monkeypatch.setattr(datasets, "CIFAR_SIZES", {"train": 30, "test": 10})
    rng = np.random.default_rng(0)
    return {
        "x_train": rng.integers(0, 256, (30, 32, 32, 3), dtype=np.uint8),
        "y_train": rng.integers(0, 10, 30),
        "x_test": rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8),
        "y_test": rng.integers(0, 10, 10),
    }


@pytest.mark.parametrize("place", ["cifar10/cifar10.npz", "cifar10.npz"])
def test_npz(tmp_path, small_cifar, place):
    (tmp_path / "cifar10").mkdir()
    np.savez(tmp_path / place, **small_cifar)
    data = read_cifar(CIFAR10, "test", tmp_path)
    assert data.images.shape == (10, 3, 32, 32) and data.images.dtype == torch.uint8
    assert data.images[3, 1, 5, 7] == small_cifar["x_test"][3, 5, 7, 1]
    assert data.labels.tolist() == small_cifar["y_test"].tolist()
    assert data.classes[3] == "cat"


def test_official_release(tmp_path, small_cifar, monkeypatch):
    """A release in the official layout: rows of red, green and blue planes, in pickles."""
    folder = tmp_path / "cifar100" / "cifar-100-python"
    folder.mkdir(parents=True)
    checksums = {}
    planes = {
        "train": small_cifar["x_train"].transpose(0, 3, 1, 2).reshape(30, -1),
        "test": small_cifar["x_test"].transpose(0, 3, 1, 2).reshape(10, -1),
    }
    contents = {
        split: {"data": rows, "fine_labels": small_cifar[f"y_{split}"].tolist()}
        for split, rows in planes.items()
    }
    contents["meta"] = {"fine_label_names": [str(i) for i in range(100)]}
    for name, content in contents.items():
        written = pickle.dumps(content)
        (folder / name).write_bytes(written)
        checksums[name] = hashlib.md5(written).hexdigest()
    reader = CIFAR100.reader
    monkeypatch.setattr(reader, "train_list", [["train", checksums["train"]]])
    monkeypatch.setattr(reader, "test_list", [["test", checksums["test"]]])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": checksums["meta"]})
    data = read_cifar(CIFAR100, "train", tmp_path)
    expected = torch.from_numpy(small_cifar["x_train"]).permute(0, 3, 1, 2)
    assert torch.equal(data.images, expected)
    assert data.labels.tolist() == small_cifar["y_train"].tolist()

    (folder / "train").write_bytes(pickle.dumps(contents["train"])[:-100])
    with pytest.raises(ValueError, match="cifar-100-python is incomplete or damaged"):
        read_cifar(CIFAR100, "train", tmp_path)


def test_missing_cifar_says_what_where_and_how(tmp_path):
    tmp_path /= "nowhere"
    with pytest.raises(UserError) as error:
        read_cifar(CIFAR10, "train", tmp_path)
    message = str(error.value)
    for part in ("cifar10.npz", "cifar-10-batches-py", str(tmp_path), "DETECTRON2_DATASETS"):
        assert part in message
    assert message.count(". ") == 1 and not tmp_path.exists()


def test_downloaded_release_is_put_in_its_place(tmp_path, small_cifar, monkeypatch):
    """The download itself is replaced by writing what it would have unpacked."""
    reader = CIFAR10.reader
    batch = pickle.dumps(
        {
            "data": small_cifar["x_train"].transpose(0, 3, 1, 2).reshape(30, -1),
            "labels": small_cifar["y_train"].tolist(),
        }
    )
    meta = pickle.dumps({"label_names": list(CIFAR10.classes)})
    monkeypatch.setattr(reader, "train_list", [["batch", hashlib.md5(batch).hexdigest()]])
    monkeypatch.setattr(reader, "test_list", [])
    monkeypatch.setattr(reader, "meta", {**reader.meta, "md5": hashlib.md5(meta).hexdigest()})

    def unpack(url, root, **_):
        folder = Path(root, "cifar-10-batches-py")
        folder.mkdir()
        (folder / "batch").write_bytes(batch)
        (folder / reader.meta["filename"]).write_bytes(meta)

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", unpack)
    root = tmp_path / "data"
    data = read_cifar(CIFAR10, "train", root)
    assert data.labels.tolist() == small_cifar["y_train"].tolist()
    assert [path.name for path in (root / "cifar10").iterdir()] == ["cifar-10-batches-py"]


def test_truncated_npz(tmp_path, small_cifar):
    path = tmp_path / "cifar10.npz"
    np.savez(path, **small_cifar)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="cannot be read"):
        read_cifar(CIFAR10, "train", tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"x_train": np.zeros((29, 32, 32, 3), np.uint8)},
        {"y_train": np.zeros(29, np.int64)},
        {"x_train": np.zeros((30, 28, 28, 3), np.uint8)},
        {"x_train": np.zeros((30, 32, 32, 3), np.float32)},
    ],
)
def test_npz_of_wrong_size(tmp_path, small_cifar, change):
    np.savez(tmp_path / "cifar10.npz", **{**small_cifar, **change})
    with pytest.raises(ValueError, match="truncated or another dataset"):
        read_cifar(CIFAR10, "train", tmp_path)


def test_npz_without_the_keys_or_with_objects(tmp_path, small_cifar):
    np.savez(tmp_path / "cifar10.npz", images=small_cifar["x_train"])
    with pytest.raises(ValueError, match="x_train"):
        read_cifar(CIFAR10, "train", tmp_path)
    # Arrays of objects are pickles, which are not opened.
    np.savez(tmp_path / "cifar10.npz", x_train=np.array([{}, {}], object), y_train=[0, 1])
    with pytest.raises(ValueError, match="cannot be read"):
        read_cifar(CIFAR10, "train", tmp_path)


def test_builtin_names_follow_the_environment(tmp_path, small_cifar, monkeypatch):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    np.savez(tmp_path / "cifar10.npz", **small_cifar)
    dicts = DatasetCatalog.get("cifar10_test")
    assert len(dicts) == 10
    assert dicts[4]["label"] == small_cifar["y_test"][4]
    assert (dicts[4]["height"], dicts[4]["width"]) == (32, 32)
    assert torch.equal(
        dicts[4]["image"], torch.from_numpy(small_cifar["x_test"][4]).permute(2, 0, 1)
    )


def test_held_out_part_is_fixed_and_nested():
    data = ImageArrays(*make_arrays(100, size=8), tuple("abcd"))
    rest, held_out = split_images(data, 10)
    assert (len(rest), len(held_out)) == (90, 10)
    together = torch.cat([rest.images, held_out.images]).flatten(1).unique(dim=0)
    assert len(together) == len(data.images.flatten(1).unique(dim=0)) == 100
    larger = split_images(data, 30)[1].images.flatten(1).tolist()
    assert all(image in larger for image in held_out.images.flatten(1).tolist())
    with pytest.raises(ValueError, match="DATASETS.HELD_OUT is 100"):
        split_images(data, 100)


def test_a_dataset_of_ones_own_may_be_called_like_a_held_out_part():
    register_corners()
    cfg = small_cfg()
    register_images("corners_heldout", MetadataCatalog.get("corners_test").read_images)
    try:
        assert len(load_images(cfg, "corners_heldout")) == 50
        cfg.DATASETS.HELD_OUT = 20
        for name in ("corners_heldout", "corners_train"):
            with pytest.raises(UserError, match="called corners_heldout is registered already"):
                load_images(cfg, name)
    finally:
        DatasetCatalog.remove("corners_heldout")
        MetadataCatalog.remove("corners_heldout")


def test_config_names_the_held_out_part():
    register_corners()
    cfg = small_cfg()
    assert held_out_name("corners_train") == "corners_heldout"
    assert len(load_images(cfg, "corners_train")) == 120
    with pytest.raises(ValueError, match="DATASETS.HELD_OUT"):
        load_images(cfg, "corners_heldout")
    cfg.DATASETS.HELD_OUT = 20
    assert len(load_images(cfg, "corners_train")) == 100
    assert len(load_images(cfg, "corners_heldout")) == 20
    assert len(load_images(cfg, "corners_test")) == 50
    # A share is one of what is left.
    cfg.DATASETS.TRAIN_SHARE = 0.25
    assert len(load_images(cfg, "corners_train")) == 25
    assert len(load_images(cfg, "corners_heldout")) == 20
    assert len(load_images(cfg, "corners_test")) == 50
    cfg.DATASETS.HELD_OUT = 0
    assert len(load_images(cfg, "corners_train")) == 30
    cfg.DATASETS.TRAIN_SHARE = 1.5
    with pytest.raises(ValueError, match="DATASETS.TRAIN_SHARE is 1.5. Set a share above 0"):
        load_images(cfg, "corners_train")


def test_random_labels_are_the_share_and_nested():
    labels = torch.zeros(20_000, dtype=torch.int64)
    some = with_random_labels(labels, 10, 0.4, seed=3)
    # 8,000 are drawn, a tenth of them the true label; four standard deviations are 107.
    assert abs(int((some != labels).sum()) - 7200) < 107
    counts = some.bincount(minlength=10)[1:]
    assert counts.min() > 680 and counts.max() < 920
    more = with_random_labels(labels, 10, 0.7, seed=3)
    assert (more[some != 0] == some[some != 0]).all()
    assert (labels == 0).all()
    assert torch.equal(with_random_labels(labels, 10, 0.0, seed=3), labels)


@pytest.mark.parametrize("label", [-1, 4])
def test_labels_out_of_range(label):
    images, labels = make_arrays(40)
    labels[7] = label
    register("corners_train", images, labels, list("abcd"))
    with pytest.raises(ValueError, match="labels from .*NUM_CLASSES is 4"):
        load_images(small_cfg(), "corners_train")


def test_empty_dataset():
    images, labels = make_arrays(4)
    register("corners_train", images[:0], labels[:0], list("abcd"))
    with pytest.raises(ValueError, match="corners_train has no images"):
        load_images(small_cfg(), "corners_train")


def test_images_of_another_size():
    register("corners_train", *make_arrays(40, size=8))
    with pytest.raises(ValueError, match="INPUT.IMAGE_SIZE"):
        load_images(small_cfg(), "corners_train")


def test_unknown_dataset():
    with pytest.raises(UserError, match="no classification dataset named 'cifar11_train'.*cifar10"):
        load_images(small_cfg(), "cifar11_train")


@pytest.mark.parametrize("names", [(), ("corners_train", "corners_test")])
def test_not_one_training_set(names):
    cfg = small_cfg()
    cfg.DATASETS.TRAIN = names
    with pytest.raises(ValueError, match="trains on one dataset"):
        ClassificationTrainer.check_to_train(cfg)
    with pytest.raises(ValueError, match="trains on one dataset"):
        load_images(cfg, "corners_train")


def test_image_folder(tmp_path):
    for name in ("dent", "scratch"):
        (tmp_path / name).mkdir()
        for index in range(3):
            Image.new("RGB", (20, 10)).save(tmp_path / name / f"{index}.jpg")
    if "steel" in DatasetCatalog:
        DatasetCatalog.remove("steel")
    register_image_folder("steel", tmp_path)
    dicts = DatasetCatalog.get("steel")
    assert [d["label"] for d in dicts] == [0, 0, 0, 1, 1, 1]
    assert dicts[5]["file_name"].endswith("scratch/2.jpg")


def test_folder_for_a_config(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (20, 10)).save(tmp_path / name / "0.jpg")
    cfg = small_cfg()
    name = f"folder_of_{tmp_path.name}"
    use_image_folder(cfg, "TRAIN", name, str(tmp_path))
    use_image_folder(cfg, "TEST", name, str(tmp_path))
    assert (name,) == cfg.DATASETS.TRAIN == cfg.DATASETS.TEST
    take_num_folders(cfg, name, [])
    assert cfg.MODEL.CLASSIFIER.NUM_CLASSES == 3
    cfg.MODEL.CLASSIFIER.NUM_CLASSES = 9
    take_num_folders(cfg, name, ["MODEL.CLASSIFIER.NUM_CLASSES", "9"])
    assert cfg.MODEL.CLASSIFIER.NUM_CLASSES == 9
    with pytest.raises(ValueError, match="registered already"):
        use_image_folder(cfg, "TEST", name, str(tmp_path / "a"))


def test_test_images_of_fewer_classes_are_said_to_be_that(tmp_path):
    for folder in ("train/a", "train/b", "train/c", "val/a", "val/b"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (40, 40)).save(tmp_path / folder / "0.jpg")
    parser = argparse.ArgumentParser()
    add_data(parser)
    sides = [(f"{s}_of_{tmp_path.name}", str(tmp_path / s)) for s in ("train", "val")]
    args = parser.parse_args(["--train-folder", *sides[0], "--test-folder", *sides[1]])
    cfg = small_cfg()
    use_data(cfg, args)
    with pytest.raises(ValueError, match=r"val_of_.* has other .* \(2 classes instead of 3\)"):
        ClassificationTrainer.check_to_train(cfg)


@pytest.mark.parametrize(
    ("words", "cfg", "sentence"),
    [
        (["--train-folder", "a", "b"], get_cfg, "--train-folder is for classifiers. Set --train-d"),
        (["--test-data", "a", "b", "c"], small_cfg, "--test-data is for detectors. Set --test-fol"),
    ],
)
def test_data_of_the_other_task_are_refused(words, cfg, sentence):
    parser = argparse.ArgumentParser()
    add_data(parser)
    with pytest.raises(UserError, match=sentence):
        use_data(cfg(), parser.parse_args(words))


@pytest.mark.parametrize("make", [[], ["empty"]])
def test_folder_without_images(tmp_path, make):
    for name in make:
        (tmp_path / name).mkdir()
    with pytest.raises(UserError, match="no folder of class folders with images"):
        datasets.read_image_folder(tmp_path)
    with pytest.raises(UserError, match="no folder of class folders with images"):
        datasets.read_image_folder(tmp_path / "nowhere")


def test_hidden_files_and_folders_are_no_classes(tmp_path, monkeypatch):
    names = ("cat/1.png", "cat/._1.png", "dog/2.jfif", "dog/.x/3.png", ".ipynb_checkpoints/4.png")
    for name in names:
        path = tmp_path / ".data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path, format="JPEG" if path.suffix == ".jfif" else "PNG")
    found = datasets.read_image_folder(tmp_path / ".data")
    assert found.classes == ("cat", "dog") and found.labels.tolist() == [0, 1]
    assert [Path(file).name for file in found.files] == ["1.png", "2.jfif"]
    monkeypatch.setenv("HOME", str(tmp_path))
    assert datasets.read_image_folder("~/.data").files == found.files
    (tmp_path / "empty" / ".git").mkdir(parents=True)
    with pytest.raises(UserError, match="no folder of class folders"):
        datasets.read_image_folder(tmp_path / "empty")
