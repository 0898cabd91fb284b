"""What is recorded is what the rows of the tables ask for today."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experiments.__main__ import RESULTS
from experiments.runs import differences, row_cfg, settings_of
from experiments.tables import TABLES
from repr_det.classification import resolve_epochs
from repr_det.engine.config import config_path
from repr_det.tasks import DETECTION, task_of

RECORDS = [path for name in TABLES for path in sorted((RESULTS / name).glob("*/seed_*.json"))]


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: "-".join(path.parts[-3:]))
def test_a_record_has_the_settings_of_its_row(path):
    """Also where it names a config that is gone."""
    record = json.loads(path.read_text())
    assert (record["table"], record["row"]) == path.parts[-3:-1]
    row = TABLES[record["table"]].row(record["row"])
    assert Path(config_path(row.config)).is_file()
    cfg = row_cfg(row, record["seed"])
    if task_of(cfg) != DETECTION:
        cfg = resolve_epochs(cfg, record["training_images"])
    assert differences(record["settings"], settings_of(cfg)) == {}


def test_every_table_that_is_recorded_has_rows():
    assert len(RECORDS) >= 96
