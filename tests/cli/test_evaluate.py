"""The command line of repr-det eval."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from repr_det.cli import main
from repr_det.detection.coco_results import BBOX, METRICS, SEGM
from repr_det.detection.datasets import use_coco_data
from repr_det.detection.trainer import DetectionTrainer
from tests.coco_files import direct, make_results, make_truth
from tests.detectors import make_run
from tests.images import written_in_many_ways


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A small run, its dataset registered as its config calls it, as a user's own code does."""
    made = make_run(tmp_path_factory.mktemp("small"))
    use_coco_data(made.cfg, "TEST", "small_run", str(made.annotations), str(made.images))
    yield made
    for name in ("small_run", "other_name"):
        if name in DatasetCatalog.list():
            DatasetCatalog.remove(name)
            MetadataCatalog.remove(name)


@pytest.fixture
def files(tmp_path):
    """Made-up annotations and results."""
    content = make_truth()
    results = make_results(content, 1)
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps(results))
    return content, results


def test_a_results_file(files, tmp_path, capsys):
    content, results = files
    out = tmp_path / "out.json"
    arguments = ["--results", tmp_path / "results.json", "--annotations", tmp_path / "val.json"]
    assert main(["eval", *map(str, arguments), "--json", str(out)]) == 0
    printed = capsys.readouterr()
    record = json.loads(out.read_text())["datasets"]["val"]
    assert record["images"] == 12 and record["detections"] == len(results)
    for iou_type in (BBOX, SEGM):
        expected = 100 * direct(content, results, iou_type)
        rows = [record[iou_type]["overall"], *record[iou_type]["classes"].values()]
        for row, values in zip(rows, expected, strict=True):
            for metric, value in zip(METRICS, values, strict=True):
                if math.isnan(value):
                    assert row[metric] is None
                else:
                    assert row[metric] == pytest.approx(value, abs=1e-9)
    assert "| Boxes, val" in printed.out and "| Masks, val" in printed.out
    row = next(line for line in printed.out.splitlines() if line.startswith("| all classes"))
    cells = [cell.strip() for cell in row.split("|")[2:-1]]
    assert cells == [f"{v:.2f}" for v in 100 * direct(content, results, BBOX)[0]]
    assert "Evaluating Boxes" in printed.err


def test_a_run_as_its_trainer_evaluates_it(run, tmp_path):
    """Detectron2's evaluator, called by the trainer, says and writes the same."""
    model = DetectionTrainer.build_model(run.cfg)
    model.load_state_dict(torch.load(run.cfg.MODEL.WEIGHTS, weights_only=True)["model"])
    expected = DetectionTrainer.test(run.cfg, model)
    out, saved = tmp_path / "out.json", tmp_path / "saved.json"
    options = ["--json", str(out), "--save-results", str(saved)]
    assert main(["eval", str(run.folder), *options]) == 0
    written = run.folder / "inference" / "coco_instances_results.json"
    assert json.loads(saved.read_text()) == json.loads(written.read_text())
    record = json.loads(out.read_text())["datasets"]["small_run"]
    assert 5 < expected["bbox"]["AP"] < 95
    for iou_type in (BBOX, SEGM):
        for metric in METRICS:
            value = expected[iou_type][metric]
            found = record[iou_type]["overall"][metric]
            assert (found is None) if math.isnan(value) else found == pytest.approx(value, abs=1e-9)
        for name in ("nut", "bolt", "washer"):
            value = record[iou_type]["classes"][name]["AP"]
            assert value == pytest.approx(expected[iou_type][f"AP-{name}"], abs=1e-9)
    # The file's own evaluation is the same as well, and so is the run's by files and weights.
    again = tmp_path / "again.json"
    on = ["--test-data", "other_name", str(run.annotations), str(run.images)]
    assert main(["eval", "--results", str(run.folder), *on, "--json", str(again)]) == 0
    assert json.loads(again.read_text())["datasets"]["other_name"][BBOX] == record[BBOX]
    config = ["--config", str(run.folder / "config.yaml"), *on, "--iou-type", "bbox"]
    config += ["--json", str(again), "MODEL.WEIGHTS", run.cfg.MODEL.WEIGHTS]
    assert main(["eval", *config]) == 0
    other = json.loads(again.read_text())["datasets"]["other_name"]
    assert other[BBOX] == record[BBOX] and SEGM not in other


def test_a_turned_image_gives_what_the_upright_one_does(run, tmp_path):
    with Image.open(run.images / "0.png") as image:
        written = written_in_many_ways(tmp_path, np.asarray(image))
    ((path, seen),) = [image for image in written if image.path.name == "turned_6.jpg"]
    upright = tmp_path / "upright.png"
    Image.fromarray(seen).save(upright)
    first = next(image for image in run.truth["images"] if image["file_name"] == "0.png")
    objects = [a for a in run.truth["annotations"] if a["image_id"] == first["id"]]
    found, out, outcomes = tmp_path / "found.json", tmp_path / "out.json", []
    for file in (path, upright):
        content = {"images": [{**first, "file_name": file.name}], "annotations": objects}
        content["categories"] = run.truth["categories"]
        annotations = file.with_suffix(".json")
        annotations.write_text(json.dumps(content))
        data = ["--test-data", file.stem, annotations, tmp_path]
        options = [run.folder, *data, "--save-results", found, "--json", out]
        try:
            assert main(["eval", *map(str, options)]) == 0
        finally:
            DatasetCatalog.remove(file.stem)
            MetadataCatalog.remove(file.stem)
        record = json.loads(out.read_text())["datasets"][file.stem]
        outcomes.append((json.loads(found.read_text()), record[BBOX], record[SEGM]))
    assert outcomes[0] == outcomes[1]
    assert len(outcomes[0][0]) > 0 and outcomes[0][1]["overall"]["AP"] > 0.05


def refused(capsys, *arguments):
    assert main(["eval", *map(str, arguments)]) == 2
    error = capsys.readouterr().err.splitlines()
    (line,) = [line for line in error if line.startswith("repr-det eval: error: ")]
    assert line == error[-1]
    return line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("--results", "results.json"), "--results needs annotations. Set --annotations JSON"),
        (("--results", "no.json", "--annotations", "val.json"), "Results no.json do not exist"),
        (("--results", "results.json", "--annotations", "no.json"), "no.json does not exist"),
        (("--results", "val.json", "--annotations", "val.json"), "not a COCO results file"),
        (
            ("--results", "results.json", "--annotations", "val.json", "SEED", "1"),
            "--results has no config that SEED could override",
        ),
        (
            ("--results", "results.json", "--annotations", "val.json", "--json", "no/out.json"),
            "Folder no of --json does not exist",
        ),
        (("--results", "results.json", "--dataset", "nobody"), "Dataset nobody is not registered"),
        (("nowhere",), "nowhere holds no run"),
        (("--config", "no_such.yaml"), "'no_such.yaml' is neither a file nor a name in configs/"),
        (("--config", "val.json"), "Non-existent config key: images"),
        (("--config", "results.json"), "cannot be read"),
        (("--config", "cifar10_c3_32.yaml"), "This is a classifier, not a detector"),
        (("--config", "repr_faster_rcnn.yaml", "NO.KEY", "1"), "Non-existent key: NO.KEY"),
        (("--config", "repr_faster_rcnn.yaml", "SEED"), "must be KEY VALUE pairs"),
        (
            ("--config", "repr_faster_rcnn.yaml", "--annotations", "val.json"),
            "A model needs images",
        ),
        (("--config", "repr_faster_rcnn.yaml", "--dataset", "nobody"), "nobody is not registered"),
        (
            ("--config", "repr_faster_rcnn.yaml", "DATASETS.TEST", "()"),
            "names no dataset to test on",
        ),
        (
            (
                *("--config", "repr_faster_rcnn.yaml", "--save-results", "out.json"),
                *("DATASETS.TEST", "('one', 'two')"),
            ),
            "--save-results is for the detections of one dataset",
        ),
    ],
)
def test_mistakes_are_told_in_one_sentence(files, tmp_path, monkeypatch, capsys, options, sentence):
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert sentence in refused(capsys, *options)
    assert set(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    "outputs",
    [
        ["--json", "val.json"],
        ["--json", "results.json"],
        ["--save-results", "val.json"],
        ["--save-results", "results.json"],
        ["--json", "new.json", "--save-results", "new.json"],
    ],
)
def test_no_output_replaces_what_is_read(files, tmp_path, monkeypatch, capsys, outputs):
    monkeypatch.chdir(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["eval", "--results", "results.json", "--annotations", "val.json", *outputs]) == 2
    assert f"{outputs[1]} is a file that this command also reads" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_boxes_against_masks(files, tmp_path, capsys):
    content, results = files
    for entry in content["annotations"]:
        del entry["segmentation"]
    for entry in results:
        del entry["bbox"]
    (tmp_path / "val.json").write_text(json.dumps(content))
    (tmp_path / "results.json").write_text(json.dumps(results))
    arguments = ["--results", tmp_path / "results.json", "--annotations", tmp_path / "val.json"]
    assert "of val share neither boxes nor masks" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (("MODEL.WEIGHTS", ""), "MODEL.WEIGHTS is empty. Set the checkpoint"),
        (("MODEL.WEIGHTS", "/no/such.pth"), "MODEL.WEIGHTS /no/such.pth does not exist"),
        (("MODEL.WEIGHTS", __file__), "is damaged or is no checkpoint"),
        (("MODEL.ROI_HEADS.NUM_CLASSES", "4"), "is of another architecture"),
        (("--dataset", "shapes_val", "--save-results", "no/x.json"), "Folder no of --save-results"),
        (("--dataset", "shapes_val"), "NUM_CLASSES is 3, but dataset shapes_val has 6 classes"),
        pytest.param(
            ("MODEL.DEVICE", "cuda"),
            "MODEL.DEVICE is cuda, but there is no GPU",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
    ],
)
def test_models_that_do_not_fit(run, monkeypatch, capsys, tmp_path, options, sentence):
    monkeypatch.setenv("REPR_DET_CACHE", str(tmp_path))
    assert sentence in refused(capsys, run.folder, *options)


def test_masks_of_a_detector_of_boxes_are_refused_first(run, capsys):
    options = (run.folder, "--iou-type", "segm", "MODEL.MASK_ON", "False")
    assert "finds no masks" in refused(capsys, *options)


def test_a_damaged_image_is_named(run, tmp_path, capsys):
    """Also by a loader's process, whose errors arrive as tracebacks."""
    images = tmp_path / "images"
    images.mkdir()
    for path in run.images.iterdir():
        (images / path.name).write_bytes(path.read_bytes())
    (images / "1.png").write_bytes((images / "1.png").read_bytes()[:100])
    out = tmp_path / "out.json"
    arguments = [run.folder, "--test-data", "damaged", run.annotations, images]
    for workers in (0, 1):
        text = refused(capsys, *arguments, "--json", out, "DATALOADER.NUM_WORKERS", workers)
        assert f"Image {images / '1.png'} cannot be read" in text and "Traceback" not in text
    assert not Path(out).exists()
    DatasetCatalog.remove("damaged")
    MetadataCatalog.remove("damaged")
