"""The code and the commands of README and docs work as they stand, with few iterations."""

from __future__ import annotations

import json
import re

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from torch import nn

from experiments.__main__ import main as experiments
from repr_det.cli import COMMANDS, main, parse
from repr_det.tasks import get_cfg
from tests.detectors import overrides, shrink
from tests.documents import ROOT, blocks, commands
from tests.report.folders import write_detection_data

DOCUMENTS = ["README.md", *(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("path", DOCUMENTS)
def test_commands_are_parsed_without_a_word_of_old_options(path, capsys):
    for words in commands(path):
        parse(words)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "path", ["README.md", pytest.param("docs/tutorial.md", marks=pytest.mark.slow)]
)
def test_commands_on_your_own_data_do_their_work(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    annotations, _ = write_detection_data(tmp_path)
    for split in ("train", "val"):
        (tmp_path / f"{split}.json").write_bytes(annotations.read_bytes())
    run = [
        words for words in commands(path) if words[0] not in ("install-detectron2", "demo", "env")
    ]
    assert len(run) >= 3 and {words[0] for words in run} <= set(COMMANDS)
    small = dict(zip(*2 * [iter(overrides(tmp_path))], strict=True))
    for key in ("OUTPUT_DIR", "DATASETS.TRAIN", "DATASETS.TEST"):
        small.pop(key, None)
    small |= {"SOLVER.MAX_ITER": "9", "TEST.EVAL_PERIOD": "9"}
    for words in run:
        if words[0] == "train":
            # Its ResNet-18, which is small, has a width of its own.
            other = "MODEL.RESNETS" if "neu_det_faster_rcnn.yaml" in words else ()
            shorter = {k: v for k, v in small.items() if not k.startswith(other)}
            words = [*words, *(part for pair in shorter.items() for part in pair)]
        try:
            assert main(words) == 0, words
        finally:
            for name in ("my_train", "my_val"):
                for catalog in (DatasetCatalog, MetadataCatalog):
                    if name in catalog.list():
                        catalog.remove(name)
    for name in ("standard", "repr"):
        assert (tmp_path / "output" / name / "model_final.pth").is_file()
    assert (tmp_path / "report.html").is_file()


def test_results_page_is_what_the_records_say(tmp_path):
    assert experiments(["--page", str(tmp_path / "page.md")]) == 0
    assert (ROOT / "docs/results.md").read_text() == (tmp_path / "page.md").read_text()


RESULT = re.compile(r"(?<![\d.])[+-]?\d{1,2}\.\d\d\b(?: ± \d+\.\d\d| \[[^\]]*\])?")
"""A number with two decimals, perhaps with its deviation or interval."""


@pytest.mark.parametrize("path", ["README.md", "docs/card.md", "docs/finetuning.md"])
def test_results_in_a_text_are_on_the_results_page(path):
    text, page = (ROOT / path).read_text(), (ROOT / "docs/results.md").read_text()
    found = set(RESULT.findall(text.replace("Python 3.10", "")))
    assert found and found <= set(RESULT.findall(page))


def test_the_warning_about_loaded_weights_quotes_recorded_results():
    code, page = (ROOT / "repr_det/engine/hook.py").read_text(), ROOT / "docs/results.md"
    found = set(re.findall(r"(\d+\.\d\d) instead of (\d+\.\d\d)", code))
    recorded = {number.partition(" ")[0] for number in RESULT.findall(page.read_text())}
    assert len(found) == 2 and set().union(*found) <= recorded


def test_a_row_of_the_readme_is_of_one_table():
    text, page = (ROOT / "README.md").read_text(), (ROOT / "docs/results.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith("|") and " ± " in line]
    rows = [line.split("|")[3:6] for line in lines]
    assert len(rows) >= 6
    for cells in rows:
        standard, *of_repr = (RESULT.search(cell)[0] for cell in cells)
        row = next(line for line in page.splitlines() if all(n in line for n in of_repr))
        # Before it in the same table, or in a row of both.
        assert standard in (page.partition(row)[0] + row).rpartition("\n## ")[2]


class TestCodeOfTheReadme:
    """Its two blocks, with shorter schedules."""

    @pytest.fixture
    def code(self):
        return blocks("README.md", "python")

    def test_in_a_detectron2_trainer(self, code, tmp_path):
        cfg = shrink(get_cfg(), tmp_path)
        cfg.SOLVER.MAX_ITER = 10
        scope = {"cfg": cfg}
        exec(code[0].replace("12000", "2").replace("6000", "1"), scope)
        assert scope["trainer"].iter == cfg.SOLVER.MAX_ITER
        history = json.loads((tmp_path / "repr_history.json").read_text())
        assert [drop["iteration"] for drop in history["drops"]] == [2, 5, 8]

    def test_in_a_plain_loop(self, code):
        layers = [nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3)]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)

        def train(images):
            optimizer.zero_grad()
            model(images).square().mean().backward()
            optimizer.step()

        batches = iter([torch.randn(4, 3, 9, 9) for _ in range(10)])
        scope = {"model": model, "optimizer": optimizer, "train": train, "batches": batches}
        scope["iterations"] = 10
        exec(code[1].replace("2000", "2").replace("1000", "1"), scope)
        assert [drop["iteration"] for drop in scope["method"].history] == [2, 5, 8]
