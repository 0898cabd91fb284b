"""``tools/train_net.py`` on classification, as a user calls it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from repr_det.cli import main
from tests.classification.settings import needs_cifar10

ROOT = Path(__file__).parents[2]


def train_net(*arguments, datasets):
    return subprocess.run(
        [sys.executable, "tools/train_net.py", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "DETECTRON2_DATASETS": str(datasets)},
        capture_output=True,
        text=True,
    )


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.json").read_text().splitlines()]


SHORT = (
    *("SOLVER.MAX_EPOCHS", 0, "SOLVER.STEPS_EPOCHS", "()", "SOLVER.WARMUP_EPOCHS", 0),
    *("SOLVER.CHECKPOINT_EPOCHS", 0, "TEST.EVAL_EPOCHS", 0),
    *("SOLVER.STEPS", "()", "SOLVER.WARMUP_ITERS", 0),
    *("REPR.UNIT", "iteration", "REPR.S1", 2, "REPR.S2", 1, "REPR.N", 2),
)


def test_torchvision_network_on_class_folders(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        for name, colour in {"blue": (90, 90, 150), "red": (150, 90, 90)}.items():
            folder = tmp_path / "imagenet" / split / name
            folder.mkdir(parents=True)
            for index in range(4):
                pixels = (rng.integers(-60, 60, (50, 44, 3)) + colour).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    command = (
        *("--config", "imagenet_resnet18.yaml", *SHORT, "OUTPUT_DIR", tmp_path / "out"),
        *("INPUT.IMAGE_SIZE", 32, "MODEL.CLASSIFIER.NUM_CLASSES", 2, "SOLVER.IMS_PER_BATCH", 8),
        *("DATALOADER.NUM_WORKERS", 1, "SOLVER.BASE_LR", 0.01, "SOLVER.MAX_ITER", 8),
    )
    done = train_net(*command, datasets=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "model_final.pth").is_file()
    # Of eight images every one counts 12.5, and the two colours are far apart.
    assert lines(tmp_path / "out")[-1]["accuracy/top1"] in [12.5 * right for right in range(9)]


@needs_cifar10
@pytest.mark.parametrize(
    "config",
    ["cifar10_c3_32.yaml", pytest.param("cifar10_resnet20.yaml", marks=pytest.mark.slow)],
)
def test_real_cifar10_trains_evaluates_and_resumes(tmp_path, config):
    command = (
        *("--config", config, "--resume", *SHORT, "OUTPUT_DIR", tmp_path, "TEST.EVAL_PERIOD", 0),
        *("SOLVER.IMS_PER_BATCH", 32, "SOLVER.BASE_LR", 0.01, "SOLVER.CHECKPOINT_PERIOD", 8),
        *("DATASETS.HELD_OUT", 1000, "DATASETS.TEST", '("cifar10_heldout",)'),
    )
    datasets = os.environ["DETECTRON2_DATASETS"]
    for iterations in (8, 12):
        done = train_net(*command, "SOLVER.MAX_ITER", iterations, datasets=datasets)
        assert done.returncode == 0, done.stderr[-3000:]
        # Chance is 10; of 1,000 held-out images every one counts 0.1.
        top1 = lines(tmp_path)[-1]["accuracy/top1"]
        assert 0 < top1 < 60 and abs(10 * top1 - round(10 * top1)) < 1e-6
    assert "Starting training from iteration 8" in done.stdout


def test_missing_cifar10_is_one_sentence(tmp_path, monkeypatch, capsys):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr("torchvision.datasets.cifar.download_and_extract_archive", refuse)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    command = ["--config", "cifar10_c3_32.yaml", "OUTPUT_DIR", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as stopped:
        main(["train", *command])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert "cifar10 was not found" in line and not (tmp_path / "out").exists()
