"""A table small enough for tests: seconds instead of hours."""

from __future__ import annotations

import re

from experiments.tables import Row, Table
from tests.classification.settings import make_arrays, register

CONFIG = """
MODEL:
  META_ARCHITECTURE: ImageClassifier
  PIXEL_MEAN: [100.0, 100.0, 100.0]
  PIXEL_STD: [50.0, 50.0, 50.0]
  CLASSIFIER: {NAME: c3_8, NUM_CLASSES: 4}
INPUT: {FORMAT: RGB, IMAGE_SIZE: 16, RANDOM_FLIP: none}
DATASETS:
  TRAIN: ("small_train",)
  TEST: ("small_test",)
  HELD_OUT: 24
SOLVER:
  IMS_PER_BATCH: 4
  BASE_LR: 0.01
  STEPS: ()
  WARMUP_ITERS: 0
  MAX_EPOCHS: 3
  CHECKPOINT_EPOCHS: 1
TEST: {EVAL_EPOCHS: 1, IMS_PER_BATCH: 32}
REPR: {ENABLED: True, UNIT: epoch, S1: 1, S2: 1, N: 1}
VERSION: 2
"""
IMAGES, HELD_OUT, EPOCH, LENGTH = 120, 24, 24, 72


def squeezed(markdown: str) -> str:
    """A table without the padding of its cells."""
    return re.sub(r" +", " ", re.sub(r":?-{2,}:?", "---", markdown))


def small_table(tmp_path, **changes) -> Table:
    """Standard, RePr, and RePr taught by the standard network; registers the data."""
    register("small_train", *make_arrays(IMAGES), list("abcd"))
    register("small_test", *make_arrays(40, seed=1), list("abcd"))
    config = tmp_path / "small.yaml"
    config.write_text(CONFIG)
    off = {"REPR.ENABLED": False}
    taught = {"DISTILL.TEACHER": "c3_8"}
    rows = (
        Row("standard", "Standard", 70.0, str(config), off),
        Row("repr", "RePr", 74.0, str(config), {}, "standard"),
        Row("taught", "RePr, taught", None, str(config), taught, "standard", "standard"),
    )
    return Table(**{"name": "small", "title": "A small table", "rows": rows, **changes})
