"""What a run makes of the files that it is given and of those that it finds in its folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, DatasetMapper, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from repr_det.detection import keypoints
from repr_det.detection.prediction import labels_for
from repr_det.detection.trainer import DetectionTrainer
from repr_det.engine.class_names import recorded_names
from repr_det.errors import UserError
from repr_det.report.run import read_metrics
from repr_det.tasks import get_cfg, trained_detector_cfg
from tests.cli.programs import program
from tests.coco_damage import SIZES, sound
from tests.detectors import overrides, shrink

# pycocotools and numpy 2, in mask.decode
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

NAMES = ["bolt", "nut", "été"]


@pytest.fixture(autouse=True)
def nothing_stays_registered():
    yield
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in ("input_train", "input_test"):
            if name in catalog.list():
                catalog.remove(name)


def write(folder, change=lambda content: None):
    """A dataset in a folder; returns what --train-data and --test-data take after the name."""
    images, path = folder / "images", folder / "coco.json"
    images.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for number, (height, width) in SIZES.items():
        pixels = rng.integers(0, 255, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{number}.png")
    content = sound()
    change(content)
    path.write_text(json.dumps(content))
    return str(path), str(images)


def arguments(data, out, *flags, **changes):
    config = ["--config-file", "repr_faster_rcnn.yaml"]
    named = ["--train-data", "input_train", *data, "--test-data", "input_test", *data]
    changes = {
        "REPR.ENABLED": "False",
        "SOLVER.MAX_ITER": "2",
        "SOLVER.CHECKPOINT_PERIOD": "1",
        **changes,
    }
    return [*config, *named, *flags, *overrides(out, **changes)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The data and the folder of a run of two iterations."""
    folder = tmp_path_factory.mktemp("trained")
    data = write(folder / "data")
    run(arguments(data, folder / "run"))
    for catalog in (DatasetCatalog, MetadataCatalog):
        for name in ("input_train", "input_test"):
            catalog.remove(name)
    return data, folder / "run"


@pytest.fixture
def copy(trained, tmp_path):
    """The same, to be changed."""
    shutil.copytree(trained[1], tmp_path / "run")
    return trained[0], tmp_path / "run"


def run(arguments):
    assert program("train", *arguments) == 0


def refused(capsys, arguments):
    return refused_by(capsys, "train", *arguments)


def refused_by(capsys, name, *arguments):
    assert program(name, *arguments) == 2
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if ": error: " in line]
    assert "Traceback" not in error.split(": error: ")[1]
    return line


def renamed(content):
    for category in content["categories"]:
        if category["name"] == "nut":
            category["name"] = "washer"


def renumbered(content):
    """The same names; nut and bolt have changed their numbers."""
    for entries, key in ((content["categories"], "id"), (content["annotations"], "category_id")):
        for entry in entries:
            entry[key] = {1: 3, 3: 1}.get(entry[key], entry[key])


class TestNames:
    @pytest.fixture(params=[renamed, renumbered])
    def other(self, request, tmp_path):
        """Data of other names, or of the same in another order."""
        return write(tmp_path / "other", request.param)

    def test_are_recorded_in_their_order(self, trained):
        _, folder = trained
        for name in ("model_final.pth", "model_0000000.pth"):
            assert recorded_names(folder / name) == NAMES
        path = folder / "inference" / "coco_instances_categories.json"
        ids = {c["id"]: c["name"] for c in json.loads(path.read_text())}
        assert ids == {3: "nut", 1: "bolt", 7: "été"}

    def test_are_compared_on_resumption(self, copy, other, capsys):
        changes = {"SOLVER.MAX_ITER": "3"}
        sentence = refused(capsys, arguments(other, copy[1], "--resume", **changes))
        assert "has other classes than the run was trained on, or in another order" in sentence

    @pytest.mark.parametrize("resume", [False, True])
    def test_are_compared_by_eval_only(self, copy, other, capsys, resume):
        weights = "" if resume else str(copy[1] / "model_final.pth")
        flags = ["--eval-only", *["--resume"] * resume]
        given = arguments(other, copy[1], *flags, **{"MODEL.WEIGHTS": weights})
        sentence = refused(capsys, given)
        assert "has other classes than the run was trained on" in sentence

    def test_are_compared_by_evaluation(self, trained, other, capsys):
        data = ["--test-data", "input_test", *other]
        sentence = refused_by(capsys, "eval", trained[1], *data)
        assert "Dataset input_test has other classes than the run was trained on" in sentence

    def test_are_compared_by_prediction(self, trained, other, capsys, tmp_path):
        given = ["--run", trained[1], trained[0][1], "--annotations", other[0]]
        sentence = refused_by(capsys, "predict", *given, "--json", tmp_path / "found.json")
        assert f"{other[0]} has other classes than the run was trained on" in sentence

    def test_of_results_are_compared(self, trained, other, capsys):
        for tool, given in (
            ("compare", [other[0], trained[1], trained[1], "--resamples", "2"]),
            ("eval", ["--results", trained[1], "--annotations", other[0]]),
        ):
            assert "was made where category 3 is" in refused_by(capsys, tool, *given)

    @pytest.mark.parametrize(
        ("change", "difference"),
        [
            (lambda c: c["images"][0].update(file_name="other.png"), 'it is "other.png"'),
            (
                lambda c: c["images"].append({**c["images"][0], "id": 99}),
                "only the annotations have image 99.",
            ),
        ],
    )
    def test_of_images_are_compared(self, trained, capsys, tmp_path, change, difference):
        """A file of other images with the same ids, and one with more images."""
        path, _ = write(tmp_path / "other", change)
        for tool, given in (
            ("compare", [path, trained[1], trained[1], "--resamples", "2"]),
            ("eval", ["--results", trained[1], "--annotations", path]),
        ):
            assert difference in refused_by(capsys, tool, *given)

    def test_are_those_of_predictions_without_annotations(self, trained):
        cfg = trained_detector_cfg(trained[1], None, [])
        assert labels_for(cfg).names == NAMES

    def test_may_be_missing_as_in_older_runs(self, copy, other, capsys):
        _, folder = copy
        for path in folder.glob("*.pth"):
            state = torch.load(path, weights_only=True)
            del state["trainer"]["hooks"]["ClassNames"]
            torch.save(state, path)
        for part in ("categories", "images"):
            (folder / "inference" / f"coco_instances_{part}.json").unlink()
        assert recorded_names(folder / "model_final.pth") is None
        data = ["--test-data", "input_test", *other]
        assert program("eval", folder, *data) == 0
        given = ["--results", str(folder), "--annotations", other[0]]
        assert program("eval", *given) == 0
        run(arguments(other, folder, "--resume", **{"SOLVER.MAX_ITER": "3"}))


@pytest.mark.parametrize("text", ["", "\n", "/work_dirs/epoch_12.pth", "epoch 3\nepoch 4"])
def test_a_last_checkpoint_of_another_tool_is_named(copy, capsys, text):
    data, folder = copy
    (folder / "last_checkpoint").write_text(text)
    more = {"SOLVER.MAX_ITER": "3"}
    for sentence in (
        refused(capsys, arguments(data, folder, "--resume", **more)),
        refused(capsys, arguments(data, folder, "--resume", "--eval-only", **more)),
        refused_by(capsys, "eval", folder),
    ):
        assert "last_checkpoint holds " in sentence and "no name of a checkpoint" in sentence


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"iteration": 19, "lr": "\xff\xfe"}\n', "is not UTF-8"),
        (b'[{"iteration": 19}]\n', "line 1 is ["),
        (b'{"iteration": 0}\n{"epoch": 3}\n', 'line 2 is {"epoch": 3}'),
        (b'{"iteration": "19"}\n', "line 1 is {"),
    ],
)
def test_metrics_of_another_tool_are_named(copy, capsys, content, reason):
    data, folder = copy
    (folder / "metrics.json").write_bytes(content)
    with pytest.raises(UserError, match=r"metrics\.json is no record of training") as error:
        read_metrics(folder)
    assert reason in str(error.value)
    more = {"SOLVER.MAX_ITER": "3"}
    assert reason in refused(capsys, arguments(data, folder, "--resume", **more))
    assert (folder / "metrics.json").read_bytes() == content


def test_fewer_iterations_than_are_done_are_refused(copy, capsys):
    data, folder = copy
    before = (folder / "metrics.json").read_bytes()
    sentence = refused(capsys, arguments(data, folder, "--resume", **{"SOLVER.MAX_ITER": "1"}))
    assert "SOLVER.MAX_ITER is 1, but the run in" in sentence and "done 2 iterations" in sentence
    assert (folder / "metrics.json").read_bytes() == before


@pytest.mark.parametrize("which", ["train", "test"])
def test_images_that_are_missing_are_said_before_training(tmp_path, capsys, which):
    data = [write(tmp_path / name) for name in ("train", "test")]
    gone = tmp_path / which / "images" / "4.png"
    gone.unlink()
    given = arguments(data[0], tmp_path / "run", "--test-data", "input_test", *data[1])
    sentence = f"Dataset input_{which}: 1 of 3 images do not exist, for example {gone}. "
    assert sentence in refused(capsys, given)
    assert not (tmp_path / "run").exists()


def test_a_missing_held_out_image_is_said_before_training(tmp_path, capsys):
    data = write(tmp_path / "data")
    names = sorted(path.name for path in Path(data[1]).iterdir())
    keys = {"DATASETS.HELD_OUT": "2", "DATASETS.TEST": "('input_heldout',)"}
    given = ["--config-file", "repr_faster_rcnn.yaml", "--train-data", "input_train", *data]
    given += overrides(tmp_path / "run", **{"REPR.ENABLED": "False", **keys})
    said = []
    for name in names:
        path = Path(data[1]) / name
        content = path.read_bytes()
        path.unlink()
        said.append(refused(capsys, given).split("error: ")[1].split(" images")[0])
        path.write_bytes(content)
        for catalog in (DatasetCatalog, MetadataCatalog):
            for registered in ("input_train", "input_heldout"):
                if registered in catalog.list():
                    catalog.remove(registered)
    assert sorted(said) == [
        "Dataset input_heldout: 1 of 2",
        "Dataset input_heldout: 1 of 2",
        "Dataset input_train: 1 of 1",
    ]


def test_missing_training_images_may_be_skipped(tmp_path):
    data = [write(tmp_path / name) for name in ("train", "test")]
    (tmp_path / "train" / "images" / "4.png").unlink()
    given = arguments(data[0], tmp_path / "run", "--test-data", "input_test", *data[1])
    run([*given, "INPUT.SKIP_BAD_IMAGES", "True"])


def test_missing_images_are_said_before_evaluation(copy, tmp_path, capsys):
    data, folder = copy
    elsewhere = str(tmp_path / "elsewhere")
    Path(elsewhere).mkdir()
    given = (str(folder), "--test-data", "input_test", data[0], elsewhere)
    sentence = refused_by(capsys, "eval", *given)
    assert f"3 of 3 images do not exist, for example {elsewhere}" in sentence


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_damaged_image_in_training_is_one_sentence(tmp_path, capsys, workers):
    """Also where a loader's process meets it."""
    data = write(tmp_path / "data")
    for number in SIZES:
        path = tmp_path / "data" / "images" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:60])
    given = arguments(data, tmp_path / "run", **{"DATALOADER.NUM_WORKERS": workers})
    sentence = refused(capsys, given)
    assert ".png cannot be read (" in sentence and "INPUT.SKIP_BAD_IMAGES" in sentence


@pytest.mark.parametrize("deterministic", ["False", "True"])
def test_not_one_image_can_be_read_in_training(tmp_path, capsys, deterministic):
    data = write(tmp_path / "data")
    for path in Path(data[1]).iterdir():
        path.write_bytes(b"")
    keys = {"INPUT.SKIP_BAD_IMAGES": "True", "DETERMINISTIC": deterministic}
    given = arguments(data, tmp_path / "run", **keys)
    assert "None of the training images can be read." in refused(capsys, given)


@pytest.mark.parametrize("workers", ["0", "1"])
def test_an_error_of_the_users_code_keeps_its_traceback(tmp_path, monkeypatch, workers):
    def mine(self, record):
        raise ValueError("of my own mapper")

    data = write(tmp_path / "data")
    monkeypatch.setattr(DatasetMapper, "__call__", mine)
    with pytest.raises(ValueError, match="of my own mapper"):
        run(arguments(data, tmp_path / "run", **{"DATALOADER.NUM_WORKERS": workers}))


def test_only_the_test_file_is_wrong_and_nothing_is_trained(tmp_path, capsys):
    data = write(tmp_path / "data")
    bad = write(tmp_path / "bad", lambda content: content["annotations"][0].update(iscrowd="no"))
    given = [part for part in arguments(data, tmp_path / "run")]
    at = given.index("--test-data")
    given[at + 2 : at + 4] = bad
    assert "annotation 100 has the iscrowd" in refused(capsys, given)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "changes", "sentence"),
    [
        (
            lambda c: [e.update(keypoints=[1, 2, 0, 3, 4, 0]) for e in c["annotations"]],
            {"MODEL.KEYPOINT_ON": "True"},
            "None of the 3 images in DATASETS.TRAIN has 1 labelled keypoints; the most are 0",
        ),
        (
            lambda c: [e.update(iscrowd=1) for e in c["annotations"]],
            {},
            "all 10 annotations are crowds",
        ),
    ],
)
def test_nothing_is_left_to_train_on(tmp_path, capsys, change, changes, sentence):
    def both(content):
        for category in content["categories"]:
            category.update(keypoints=["left", "right"])
        change(content)

    data = write(tmp_path / "data", both)
    assert sentence in refused(capsys, arguments(data, tmp_path / "run", **changes))


class TestKeypoints:
    @pytest.fixture
    def data(self, tmp_path):
        def change(content):
            for category in content["categories"]:
                category.update(keypoints=["ear_l", "nose", "ear_r"], skeleton=[[1, 2], [3, 2]])
            for entry in content["annotations"]:
                x, y, w, h = entry["bbox"]
                entry["keypoints"] = [x, y, 2, x + w / 2, y + h / 2, 1, x + w - 1, y, 2]

        return write(tmp_path / "data", change)

    def test_are_trained_and_evaluated(self, data, tmp_path):
        changes = {"MODEL.KEYPOINT_ON": "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "(16,)"}
        run(arguments(data, tmp_path / "run", **changes))
        metadata = MetadataCatalog.get("input_train")
        assert metadata.keypoint_names == ["ear_l", "nose", "ear_r"]
        assert metadata.keypoint_flip_map == [("ear_l", "ear_r")]
        rules = [rule[:2] for rule in metadata.keypoint_connection_rules]
        assert rules == [("ear_l", "nose"), ("ear_r", "nose")]
        config = (tmp_path / "run" / "config.yaml").read_text()
        assert "NUM_KEYPOINTS: 3" in config
        results = tmp_path / "run" / "inference" / "coco_instances_results.json"
        found = json.loads(results.read_text())
        assert all(len(entry["keypoints"]) == 9 for entry in found)
        record = (tmp_path / "run" / "metrics.json").read_text()
        assert "keypoints/AP" in record

    def test_are_evaluated_where_the_training_set_is_not_there(self, data, tmp_path, capsys):
        changes = {"MODEL.KEYPOINT_ON": "True", "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": "(16,)"}
        run(arguments(data, tmp_path / "run", **changes))
        for catalog in (DatasetCatalog, MetadataCatalog):
            for name in ("input_train", "input_test"):
                catalog.remove(name)
        written = tmp_path / "found.json"
        given = (str(tmp_path / "run"), "--test-data", "input_test", *data, "--json", str(written))
        assert program("eval", *given) == 0
        recorded = read_metrics(tmp_path / "run")["bbox/AP"].dropna().iloc[-1]
        found = json.loads(written.read_text())["datasets"]["input_test"]["bbox"]["overall"]["AP"]
        assert found == pytest.approx(recorded, abs=1e-9)

    def test_are_trained_from_a_dataset_that_python_registers(self, data):
        register_coco_instances("input_train", {}, *data)
        cfg = shrink(get_cfg(), Path("unused"))
        cfg.MODEL.KEYPOINT_ON, cfg.MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS = True, 3
        cfg.MODEL.ROI_HEADS.NUM_CLASSES, cfg.TEST.KEYPOINT_OKS_SIGMAS = 3, [0.1] * 3
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = ("input_train",)
        DetectionTrainer.check(cfg)
        (example,) = next(iter(DetectionTrainer.build_train_loader(cfg)))
        assert example["instances"].gt_keypoints.tensor.shape[1] == 3

    def test_of_another_number_are_refused(self, data, tmp_path, capsys):
        changes = {"MODEL.KEYPOINT_ON": "True", "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": "17"}
        sentence = refused(capsys, arguments(data, tmp_path / "run", **changes))
        assert "NUM_KEYPOINTS is 17, but dataset input_train has 3 keypoints" in sentence

    def test_are_missing(self, tmp_path, capsys):
        data = write(tmp_path / "data")
        sentence = refused(capsys, arguments(data, tmp_path / "r", **{"MODEL.KEYPOINT_ON": "True"}))
        assert "coco.json: no category has keypoints. Set their names" in sentence

    @pytest.mark.parametrize(
        ("names", "pairs"),
        [
            (["nose", "left_eye", "right_eye"], [("left_eye", "right_eye")]),
            (["R", "L"], [("R", "L")]),
            (["leftFoot", "rightFoot", "left foot", "right foot"], [("left foot", "right foot")]),
            (["Left-Ear", "right-ear"], [("Left-Ear", "right-ear")]),
            (["left_eye", "nose"], []),
            (["collar", "tail", "lower", "rear"], []),
        ],
    )
    def test_that_a_mirror_swaps(self, names, pairs):
        assert keypoints.flip_pairs(names) == pairs
