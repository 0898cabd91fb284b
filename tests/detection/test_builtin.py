"""NEU-DET by its name: found, and said to be missing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog

from repr_det.detection.builtin import NEU_DET, register_builtin
from repr_det.detection.datasets import check_dataset
from repr_det.errors import UserError


@pytest.fixture(autouse=True)
def unregistered():
    """Registered anew, below the root of the test."""

    def remove():
        for name in NEU_DET:
            for catalog in (DatasetCatalog, MetadataCatalog):
                if name in catalog.list():
                    catalog.remove(name)

    remove()
    yield
    remove()


def test_a_missing_builtin_dataset_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    register_builtin()
    with pytest.raises(
        UserError,
        match=r"neu_det_train needs .*neu_det/annotations/instances_train.json, which does not "
        r"exist. Set DETECTRON2_DATASETS to the folder that holds neu_det/",
    ):
        check_dataset("neu_det_train")


@pytest.mark.skipif(
    not (Path(os.environ.get("DETECTRON2_DATASETS", "")) / "neu_det").is_dir(),
    reason="DETECTRON2_DATASETS does not lead to NEU-DET",
)
def test_the_dataset():
    register_builtin()
    sizes = {}
    for name in NEU_DET:
        check_dataset(name)
        records = DatasetCatalog.get(name)
        sizes[name] = len(records)
        assert all(Path(record["file_name"]).is_file() for record in records[::100])
        assert len(MetadataCatalog.get(name).thing_classes) == 6
    assert sizes == {"neu_det_train": 1260, "neu_det_test": 540}
