"""What the tools do with bad input: the table of docs/reliability.md, row by row."""

from __future__ import annotations

import io
import json
import math
import multiprocessing
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from repr_det.cli import parse
from repr_det.detection.prediction import labels_for
from repr_det.detection.trainer import DetectionTrainer
from repr_det.errors import UserError
from repr_det.report.compare import matches_of
from repr_det.report.run import RunFolder
from repr_det.tasks import configure, get_cfg
from tests.cli.programs import program
from tests.coco_damage import SIZES, damaged, damages, meant, sound, sound_results
from tests.coco_files import direct
from tests.detectors import shrink
from tests.documents import ROOT

NAME = "bad_input"
DOCS = ROOT / "docs" / "reliability.md"
TOOLS = ("train", "eval", "compare", "predict", "report")
SMALL = ["MODEL.DEVICE", "cpu", "MODEL.WEIGHTS", "", "DATALOADER.NUM_WORKERS", "0"]

# pycocotools and numpy 2, in mask.decode
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


class Row(NamedTuple):
    """A row of the table.

    Attributes:
        words: what is wrong, as the docs have it.
        change: makes a sound file so.
        masks: the model has masks.
        refused: part of the sentence; empty where the file is read.
        labels: part of the sentence where only names are read (``predict``).
        by_evaluation: read by what evaluates a results file, which opens no images.
    """

    words: str
    change: Callable[[dict[str, Any]], Any]
    refused: str = ""
    masks: bool = False
    labels: str = ""
    by_evaluation: bool = False


def each(part, **values):
    def change(content):
        for entry in content[part]:
            entry.update(values)

    return change


def first(part="annotations", **values):
    return lambda content: content[part][0].update(values)


def without(part, key):
    return lambda content: content[part][0].pop(key)


POLYGON = "annotation 100 has the polygon"
TEXT = "Set a text"
ROWS = [
    Row("`iscrowd` missing or null", each("annotations", iscrowd=None)),
    Row("`iscrowd` true, 1.0 or `\"1\"`", first(iscrowd="1")),
    Row("`iscrowd` anything else", first(iscrowd="no"), "annotation 100 has the iscrowd \"no\""),
    Row("`area` missing, null, text or NaN", first(area=math.nan)),
    Row("all objects are crowds", each("annotations", iscrowd=1), "all 10 annotations are crowds"),
    Row("a damaged polygon, model of boxes", first(segmentation=[[1, 2], [3, 4], [5, 6]])),
    Row("a damaged polygon, model of masks", first(segmentation=[[1, 2, 3, 4]]), POLYGON, True),
    Row("all polygons damaged, model of masks", each("annotations", segmentation=[[]]),
        "10 annotations need it", True),
    Row("RLE of another size or cut off", first(segmentation={"size": [60, 80], "counts": "0"}),
        "counts are damaged or cut off", True),
    Row("no mask, model of masks", without("annotations", "segmentation"), "has no mask", True),
    Row("two categories of one name", first("categories", name="bolt"), 'both called "bolt"',
        labels='both called "bolt"'),
    Row("a name that is a number or null", first("categories", name=7), TEXT, labels=TEXT),
    Row("ids of mixed type", first("categories", id="3"), 'the id 1, but categories[0] has "3"',
        labels='has the id 1, but categories[0] has "3"'),
    Row("an id as text that points nowhere", first(category_id="3"), 'category_id "3", which'),
    Row("a category without objects", lambda content: None),
    Row("an annotation without id", without("annotations", "id"), "annotations[0] has no id"),
    Row("no width or height", without("images", "width"), "image 4 has no width",
        labels="image 4 has no width"),
    Row("a box with a negative side", first(bbox=[1, 2, -3, 4]), "has the bbox [1, 2, -3, 4]"),
    Row("a box that is not four numbers", first(bbox=["1", 2, 3, 4]), "has the bbox"),
    Row("no annotations", lambda c: c["annotations"].clear(), "holds no annotations"),
    Row("a file name of Windows or a URL", first("images", file_name="a\\4.png"),
        "Set the path with slashes", by_evaluation=True),
]  # fmt: skip


class Place(NamedTuple):
    annotations: Path
    images: Path
    results: Path
    runs: Path
    content: dict[str, Any]
    masks: bool


@pytest.fixture
def place(tmp_path):
    """Writes the files of a row."""
    images = tmp_path / "images"
    images.mkdir()
    rng = np.random.default_rng(0)
    for number, (height, width) in SIZES.items():
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    run_folder = tmp_path / "run"
    (run_folder / "inference").mkdir(parents=True)

    def write(content, masks=False):
        path = tmp_path / "val.json"
        path.write_text(json.dumps(content))
        results = [
            {k: v for k, v in result.items() if masks or k != "segmentation"}
            for result in sound_results(sound())
        ]
        results_file = run_folder / "inference" / "coco_instances_results.json"
        results_file.write_text(json.dumps(results))
        return Place(path, images, results_file, run_folder, content, masks)

    yield write
    forget()


def forget():
    for catalog in (DatasetCatalog, MetadataCatalog):
        if NAME in catalog.list():
            catalog.remove(NAME)


def small(place):
    cfg = shrink(get_cfg(), place.runs)
    cfg.MODEL.MASK_ON = place.masks
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (NAME,)
    return cfg


def train(place):
    """As far as the first batch."""
    data = [NAME, str(place.annotations), str(place.images)]
    options = [
        "--config-file",
        "repr_faster_rcnn.yaml",
        "--train-data",
        *data,
        "--test-data",
        *data,
    ]
    masks = ["MODEL.MASK_ON", str(place.masks), "INPUT.MASK_FORMAT", "bitmask"]
    cfg = configure(parse(["train", *options, *SMALL, *masks]))
    DetectionTrainer.check(cfg)
    next(iter(DetectionTrainer.build_train_loader(cfg)))


def of_tool(name, *arguments):
    def call(place, capsys):
        parts = [str(getattr(place, a[1:])) if a.startswith("@") else a for a in arguments]
        parts += ["--iou-type", "segm" if place.masks else "bbox"]
        if program(name, *parts):
            raise UserError(capsys.readouterr().err.splitlines()[-1])

    return call


def report(place):
    register_coco_instances(NAME, {}, str(place.annotations), str(place.images))
    matches_of(RunFolder(place.runs, small(place), {}), "segm" if place.masks else "bbox")


CALLS = {
    "train": lambda place, capsys: train(place),
    "eval": of_tool("eval", "--results", "@results", "--annotations", "@annotations"),
    "compare": of_tool("compare", "@annotations", "@results", "@results", "--resamples", "2"),
    "predict": lambda place, capsys: labels_for(small(place), place.annotations),
    "report": lambda place, capsys: report(place),
}


def outcome(tool, place, capsys):
    try:
        CALLS[tool](place, capsys)
    except UserError as error:
        return str(error)
    return ""


def expected(row, tool):
    if tool == "predict":
        return row.labels
    if row.by_evaluation and tool != "train":
        return ""
    return row.refused


@pytest.mark.parametrize("tool", TOOLS)
@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.words)
def test_row_of_the_table(row, tool, place, capsys):
    content = sound()
    row.change(content)
    sentence = outcome(tool, place(content, row.masks), capsys)
    if wanted := expected(row, tool):
        assert wanted in sentence and "\n" not in sentence
    else:
        assert not sentence


def test_the_docs_have_the_same_table():
    section = DOCS.read_text().split("## Bad input")[1].split("\n## ")[0]
    table = [
        [cell.strip() for cell in line.split("|")[1:-1]]
        for line in section.splitlines()
        if line.startswith("| ")
    ]
    found = {cells[0]: cells[1:] for cells in table}
    assert found["Annotation file"] == [f"`{tool}`" for tool in TOOLS]
    for row in ROWS:
        wanted = ["refused" if expected(row, tool) else "read" for tool in TOOLS]
        assert found[row.words] == wanted, row.words


# --- through the programs


def in_process(tool, place, masks, seconds):
    """Exit status and standard error of a program in a process of its own; None after a time.

    It is forked from a process that has imported this module and done nothing else. One in which
    other tests have let autograd start threads could not be forked to train.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    parent, child = context.Pipe(duplex=False)
    process = context.Process(target=send_outcome, args=(child, tool, place, masks))
    process.start()
    found = parent.recv() if parent.poll(seconds) else None
    process.kill()
    process.join()
    return found


def send_outcome(child, tool, place, masks):
    sys.stdout = sys.stderr = io.StringIO()
    torch.set_num_threads(1)
    try:
        status = call_program(tool, place, masks) or 0
    except SystemExit as stop:
        status = stop.code
    except BaseException as error:
        status, sys.stderr = repr(error), io.StringIO(repr(error))
    child.send((status, sys.stderr.getvalue()))


def call_program(tool, place, masks):
    if tool == "train":
        cfg = shrink(get_cfg(), place.runs)
        keys = ["MODEL.RESNETS.STEM_OUT_CHANNELS", "MODEL.RESNETS.RES2_OUT_CHANNELS",
                "MODEL.RESNETS.WIDTH_PER_GROUP", "MODEL.FPN.OUT_CHANNELS",
                "MODEL.RESNETS.NORM", "INPUT.MIN_SIZE_TRAIN", "INPUT.MAX_SIZE_TRAIN",
                "INPUT.MIN_SIZE_TEST", "SOLVER.IMS_PER_BATCH", "SOLVER.STEPS"]  # fmt: skip
        values = []
        for key in keys:
            node = cfg
            for part in key.split("."):
                node = node[part]
            values += [key, str(node)]
        data = [NAME, str(place.annotations), str(place.images)]
        options = ["--train-data", *data, "--test-data", *data, *SMALL, *values]
        more = ["MODEL.MASK_ON", str(masks), "INPUT.MASK_FORMAT", "bitmask", "SOLVER.MAX_ITER", "1"]
        folder = ["OUTPUT_DIR", str(place.runs / "out"), "REPR.ENABLED", "False"]
        config = ["--config-file", "repr_faster_rcnn.yaml"]
        return program("train", *config, *options, *more, *folder)
    kind = ["--iou-type", "segm" if masks else "bbox"]
    arguments = {
        "eval": ["--results", place.results, "--annotations", place.annotations],
        "compare": [place.annotations, place.results, place.results, "--resamples", "2"],
    }[tool]
    out = ["--json", place.runs / f"{tool}.json"] if tool == "eval" else []
    return program(tool, *arguments, *kind, *out)


@pytest.mark.slow
@settings(
    max_examples=34, deadline=None, database=None, derandomize=True,
    suppress_health_check=list(HealthCheck),
)  # fmt: skip
@given(st.lists(damages(), min_size=1, max_size=3), st.booleans())
def test_a_hundred_damaged_files_through_the_programs(place, damage, masks):
    """34 files through three programs each; none may take longer than 60 seconds."""
    content = sound()
    for step in damage:
        content = damaged(content, step)
    files, sentences = place(content, masks), {}
    for tool in ("train", "eval", "compare"):
        found = in_process(tool, files, masks, 60)
        assert found is not None, "it hangs"
        status, text = found
        assert status in (0, 2), text
        if status:
            (line,) = [line for line in text.splitlines() if ": error: " in line]
            sentences[tool] = line.split(": error: ")[1]
    about_images = re.search("has the file_name", sentences.get("train", ""))
    about_results = re.search(r"results\.json: detection", sentences.get("eval", ""))
    if not about_images and not about_results:
        assert len(set(sentences.values())) <= 1 and len(sentences) in (0, 3), sentences
    if "eval" not in sentences:
        kind = "segm" if masks else "bbox"
        record = json.loads((files.runs / "eval.json").read_text())["datasets"]["val"][kind]
        results = json.loads(files.results.read_text())
        wanted = direct(meant(content), results, kind)[0]
        found = np.array(list(record["overall"].values()), dtype=float)
        np.testing.assert_allclose(found, 100 * wanted, rtol=0, atol=1e-9)
