"""What the classes of a run are called is compared wherever the run is used."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from repr_det.engine.class_names import recorded_names
from tests.cli.programs import program


def folder_of(path, classes):
    rng = np.random.default_rng(0)
    for name in classes:
        (path / name).mkdir(parents=True)
        for index in range(4):
            pixels = rng.integers(0, 255, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / name / f"{index}.png")
    return path


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in ("names_train", "names_test", "names_other"):
            if name in catalog.list():
                catalog.remove(name)


def train(out, data, *flags, iterations=2):
    split, name, folder = data
    return program(
        "train", "--config-file", "imagenet_resnet18.yaml", f"--{split}-folder", name, folder,
        *flags, "OUTPUT_DIR", out, "INPUT.IMAGE_SIZE", 32, "SOLVER.IMS_PER_BATCH", 4,
        "SOLVER.MAX_ITER", iterations, "SOLVER.MAX_EPOCHS", 0, "SOLVER.STEPS", "()",
        "SOLVER.WARMUP_ITERS", 0, "REPR.ENABLED", False, "MODEL.DEVICE", "cpu",
        "DATALOADER.NUM_WORKERS", 0, "DATASETS.TEST", "()" if split == "train" else f"('{name}',)",
    )  # fmt: skip


def test_names_are_recorded_and_compared(tmp_path, capsys):
    right = folder_of(tmp_path / "right", ["blue", "red"])
    other = folder_of(tmp_path / "other", ["blue", "green"])
    out = tmp_path / "out"
    assert train(out, ("train", "names_train", right)) == 0
    assert recorded_names(out / "model_final.pth") == ["blue", "red"]
    evaluate = ("--eval-only", "--resume")
    assert train(out, ("test", "names_test", right), *evaluate) == 0
    capsys.readouterr()
    for data, flags in (
        (("test", "names_other", other), evaluate),
        (("train", "names_other", other), ("--resume",)),
    ):
        assert train(out, data, *flags, iterations=3) == 2
        error = capsys.readouterr().err
        assert "Dataset names_other has other classes than the run was trained on" in error
        assert 'class 1 is "green" instead of "red"' in error
