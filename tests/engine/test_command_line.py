"""The command line: whole runs, resumption, and every mistake in one sentence."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import SimpleTrainer
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

from repr_det.cli import main, parse
from repr_det.engine.data import datasets_root
from repr_det.engine.trainer import RePrTrainer
from repr_det.errors import UserError
from repr_det.report.run import read_run
from repr_det.tasks import configure, trainer_for
from tests.detectors import needs_coco, overrides
from tests.report.folders import write_detection_data


def train(*arguments):
    assert main(["train", *arguments]) == 0


def refused(capsys, *arguments):
    """The sentence on standard error of a command that must be refused."""
    with pytest.raises(SystemExit) as stop:
        train(*arguments)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    return next(line for line in lines if ": error: " in line)


@needs_coco
@pytest.mark.parametrize(
    "config",
    [pytest.param("repr_faster_rcnn.yaml", marks=pytest.mark.slow), "repr_mask_rcnn.yaml"],
)
def test_trains_is_stopped_and_resumes(config, tmp_path):
    """Whole cycles on COCO images; stopped in S2 and resumed there."""
    train(
        "--config", config,
        *overrides(tmp_path, **{"SOLVER.CHECKPOINT_PERIOD": "3", "SOLVER.MAX_ITER": "9"}),
    )  # fmt: skip
    final = torch.load(tmp_path / "model_final.pth", weights_only=True)
    # As if the run had been killed after the checkpoint in the middle of S2.
    (tmp_path / "last_checkpoint").write_text("model_0000002.pth")
    state = torch.load(tmp_path / "model_0000002.pth", weights_only=True)
    assert state["trainer"]["hooks"]["RePrHook"]["phase"] == "sub"
    train(
        "--config", config, "--resume",
        *overrides(tmp_path, **{"SOLVER.CHECKPOINT_PERIOD": "3", "SOLVER.MAX_ITER": "9"}),
    )  # fmt: skip
    resumed = torch.load(tmp_path / "model_final.pth", weights_only=True)
    assert resumed["iteration"] == final["iteration"] == 8
    history = [run["trainer"]["hooks"]["RePrHook"]["history"] for run in (final, resumed)]
    assert [len(h) for h in history] == [2, 2]
    # What was dropped before the stop is remembered to the bit.
    assert all(
        torch.equal(history[0][0]["pruned"][name], history[1][0]["pruned"][name])
        for name in history[0][0]["pruned"]
    )
    metrics = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert any("bbox/AP50" in line for line in metrics)


def save_weights(path, *arguments):
    """A checkpoint of a network that nobody trained."""
    cfg = configure(parse(["train", *arguments]))
    torch.save({"model": trainer_for(cfg).build_model(cfg).state_dict()}, path)


@needs_coco
def test_eval_only(tmp_path, capsys):
    weights, out = tmp_path / "weights.pth", tmp_path / "out"
    arguments = ["--config", "repr_faster_rcnn.yaml"]
    arguments += overrides(out, **{"REPR.ENABLED": "False", "SOLVER.MAX_ITER": "9"})
    text = refused(capsys, "--eval-only", *arguments)
    assert "MODEL.WEIGHTS is empty. Set the checkpoint of a trained model" in text
    text = refused(capsys, "--eval-only", *arguments, "DATASETS.TEST", "()")
    assert "DATASETS.TEST is empty. Set what to evaluate on." in text
    assert not out.exists()
    save_weights(weights, *arguments)
    train("--eval-only", *arguments, "MODEL.WEIGHTS", str(weights))
    assert (out / "inference" / "coco_instances_results.json").is_file()
    # That of the run that lies there stays as it is.
    (out / "config.yaml").write_text("# of another run\n")
    elsewhere = ("DATASETS.TRAIN", "('my_train',)")  # only the test set is here
    train("--eval-only", *arguments, "MODEL.WEIGHTS", str(weights), *elsewhere)
    assert (out / "config.yaml").read_text() == "# of another run\n"


class TestOtherClasses:
    """A model or a test set of other classes than a dataset of two."""

    SHAPES = ("DATASETS.TRAIN", "('shapes_train',)", "DATASETS.TEST", "('shapes_val',)")

    @pytest.fixture
    def two(self, tmp_path, request):
        annotations, images = write_detection_data(tmp_path / "two")
        name = f"two_{request.node.name}"
        yield [name, str(annotations), str(images)]
        for catalog in (DatasetCatalog, MetadataCatalog):
            if name in catalog.list():
                catalog.remove(name)

    def test_test_set_of_other_classes_than_training(self, tmp_path, capsys, two):
        text = refused(
            capsys, "--config", "repr_faster_rcnn.yaml", "--train-data", *two,
            *overrides(tmp_path / "out"), *self.SHAPES[2:],
        )  # fmt: skip
        assert "Dataset shapes_val has other classes than two_" in text
        assert not (tmp_path / "out").exists()

    def test_weights_of_another_number_of_classes_are_not_evaluated(self, tmp_path, capsys, two):
        arguments = ["--config", "repr_faster_rcnn.yaml", *overrides(tmp_path / "out")]
        arguments += self.SHAPES
        save_weights(tmp_path / "weights.pth", *arguments)
        text = refused(
            capsys, "--eval-only", "--test-data", *two, *arguments,
            "MODEL.WEIGHTS", str(tmp_path / "weights.pth"),
        )  # fmt: skip
        assert "is of another architecture" in text

    def test_number_of_classes_given_by_hand(self, tmp_path, capsys, two):
        arguments = ["--config", "repr_faster_rcnn.yaml", *overrides(tmp_path / "out")]
        arguments += self.SHAPES
        text = refused(
            capsys, "--eval-only", "--test-data", *two, *arguments,
            "MODEL.ROI_HEADS.NUM_CLASSES", "5",
        )  # fmt: skip
        assert "NUM_CLASSES is 5, but dataset two_" in text and "has 2 classes" in text


class TestErrors:
    """Each one a sentence, exit status 2, and nothing left behind."""

    @pytest.fixture
    def out(self, tmp_path):
        folder = tmp_path / "out"
        yield folder
        assert not folder.exists()

    def test_coco_not_found(self, out, capsys, tmp_path):
        train_data = ["--train-data", "nothing", str(tmp_path / "no.json"), str(tmp_path)]
        text = refused(capsys, "--config", "repr_faster_rcnn.yaml", *train_data, *overrides(out))
        assert "no.json does not exist" in text

    def test_registered_coco_not_found(self, out, capsys, monkeypatch):
        from detectron2.data import MetadataCatalog

        file = str(datasets_root() / "nowhere" / "instances.json")
        monkeypatch.setitem(MetadataCatalog.get("coco_2017_train").__dict__, "json_file", file)
        text = refused(capsys, "--config", "repr_faster_rcnn.yaml", *overrides(out))
        assert "nowhere/instances.json, which does not exist" in text
        assert "Set DETECTRON2_DATASETS to the folder that holds nowhere/." in text
        assert "`repr-det demo` needs no data" in text

    def test_not_coco(self, out, capsys, tmp_path):
        path = tmp_path / "a.json"
        path.write_text('{"some": "thing"}')
        text = refused(
            capsys, "--config", "repr_faster_rcnn.yaml",
            "--train-data", "x", str(path), str(tmp_path), *overrides(out),
        )  # fmt: skip
        assert "is not a COCO annotation file" in text

    def test_unknown_config(self, capsys):
        text = refused(capsys, "--config", "no_such.yaml")
        assert "'no_such.yaml'" in text
        assert "repr_faster_rcnn.yaml" in text

    def test_unknown_key(self, out, capsys):
        text = refused(
            capsys, "--config", "repr_faster_rcnn.yaml", *overrides(out), "REPR.NO_KEY", "1"
        )
        assert "NO_KEY" in text

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"MODEL.WEIGHTS": "/no/such.pth"}, "MODEL.WEIGHTS /no/such.pth does not exist"),
            ({"MODEL.WEIGHTS": "https://localhost:1/w.pkl"}, "could not be downloaded"),
            ({"REPR.S1": "9"}, "training ends after 10"),
            ({"REPR.S1": "0"}, "s1 is 0"),
            ({"REPR.WARMUP": "-1"}, "warmup is -1"),
            ({"REPR.WARMUP": "3"}, "ends after 10 iterations, in the warm-up of 3"),
            ({"REPR.N": "-1"}, "cycles is -1"),
            ({"REPR.PRUNE_RATIO": "1.5"}, "prune_ratio is 1.5"),
            ({"REPR.MAX_LAYER_RATIO": "0.0"}, "max_layer_ratio is 0.0"),
            ({"REPR.MAX_LAYER_RATIO": "0.2"}, "max_layer_ratio 0.2 allows"),
            ({"REPR.INCLUDE": "['back']"}, "pattern 'back' matches no conv"),
            ({"REPR.CRITERION": "magic"}, "criterion is 'magic'. Set one of ortho"),
            ({"REPR.REINIT.GAMMA": "two"}, "gamma is 'two'"),
            ({"SOLVER.AMP.ENABLED": "True", "SOLVER.AMP.PRECISION": "float16"}, "needs a GPU"),
            ({"REPR.UNIT": "epoch"}, "REPR.UNIT is 'epoch'"),
        ],
    )
    def test_config(self, out, capsys, changes, sentence):
        data = {"DATASETS.TRAIN": "('shapes_val',)", "DATASETS.TEST": "('shapes_val',)"}
        changes = {**data, "MODEL.ROI_HEADS.NUM_CLASSES": "6", **changes}
        text = refused(capsys, "--config", "repr_faster_rcnn.yaml", *overrides(out, **changes))
        assert sentence in text

    def test_nothing_trainable(self, out, capsys):
        data = {"DATASETS.TRAIN": "('shapes_val',)", "DATASETS.TEST": "('shapes_val',)"}
        frozen = {"MODEL.BACKBONE.FREEZE_AT": "5", "REPR.INCLUDE": "['backbone.bottom_up']"}
        text = refused(
            capsys, "--config", "repr_faster_rcnn.yaml",
            *overrides(out, **data, **{"MODEL.ROI_HEADS.NUM_CLASSES": "6"}, **frozen),
        )  # fmt: skip
        assert "are frozen. Unfreeze some" in text

    def test_number_of_classes(self, out, capsys):
        data = {"DATASETS.TRAIN": "('shapes_val',)", "DATASETS.TEST": "('shapes_val',)"}
        text = refused(capsys, "--config", "repr_faster_rcnn.yaml", *overrides(out, **data))
        assert "NUM_CLASSES is 80, but dataset shapes_val has 6 classes" in text


SHAPES = {
    "DATASETS.TRAIN": "('shapes_val',)",
    "DATASETS.TEST": "()",
    "MODEL.ROI_HEADS.NUM_CLASSES": "6",
}


@META_ARCH_REGISTRY.register()
class Broken(nn.Module):
    """A model of the user's with a bug, in the constructor or in the forward pass."""

    def __init__(self, cfg):
        super().__init__()
        self.weight = nn.Conv2d(3, 8, 3)
        if cfg.MODEL.MASK_ON:
            raise Broken.error

    def forward(self, batch):
        raise Broken.error


@pytest.mark.parametrize("error", [ValueError("not a typo"), KeyError("gone"), FileNotFoundError()])
@pytest.mark.parametrize("mask_on", ["True", "False"])
def test_a_bug_in_a_users_model_keeps_its_traceback(tmp_path, monkeypatch, error, mask_on):
    monkeypatch.setattr(Broken, "error", error, raising=False)
    changes = SHAPES | {"MODEL.META_ARCHITECTURE": "Broken", "MODEL.MASK_ON": mask_on}
    with pytest.raises(Exception) as found:
        train("--config", "repr_faster_rcnn.yaml", *overrides(tmp_path / "out", **changes))
    chain, seen = found.value, []
    while chain is not None:
        seen.append(chain)
        chain = chain.__cause__
    assert error in seen and not any(isinstance(one, UserError) for one in seen)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"MODEL.META_ARCHITECTURE": "FastRCNN"}, "MODEL.META_ARCHITECTURE"),
        ({"MODEL.BACKBONE.NAME": "build_resnet"}, "No object named 'build_resnet' found"),
        ({"DATALOADER.SAMPLER_TRAIN": "Sampler"}, "DATALOADER.SAMPLER_TRAIN is 'Sampler'"),
        ({"SOLVER.LR_SCHEDULER_NAME": "Cosine"}, "SOLVER.LR_SCHEDULER_NAME is 'Cosine'"),
        ({"SOLVER.MAX_ITER": "many"}, "An override is wrong"),
        ({"SOLVER.MAX_ITER": "0", "REPR.ENABLED": "False"}, "SOLVER.MAX_ITER is 0. Set 1"),
        ({"SOLVER.CHECKPOINT_PERIOD": "0"}, "SOLVER.CHECKPOINT_PERIOD is 0. Set 1"),
        ({"SOLVER.IMS_PER_BATCH": "0"}, "SOLVER.IMS_PER_BATCH is 0. Set a positive multiple"),
        ({"SOLVER.IMS_PER_BATCH": "0", "DETERMINISTIC": "True"}, "SOLVER.IMS_PER_BATCH is 0"),
        ({"SOLVER.REFERENCE_WORLD_SIZE": "2"}, "Set a multiple of SOLVER.REFERENCE_WORLD_SIZE, 2"),
        ({"MODEL.DEVICE": "gpu"}, "MODEL.DEVICE is 'gpu'. Set cpu or cuda"),
        ({"SOLVER.BASE_LR": "-1.0"}, "SOLVER.OPTIMIZER SGD cannot be built"),
        ({"SOLVER.MOMENTUM": "-1.0"}, "SOLVER.OPTIMIZER SGD cannot be built"),
        ({"SOLVER.OPTIMIZER": "Adam", "SOLVER.BETAS": "(0.9, 1.5)"}, "Adam cannot be built"),
        (
            {"SOLVER.CLIP_GRADIENTS.ENABLED": "True", "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "foo"},
            "SOLVER.OPTIMIZER SGD cannot be built",
        ),
        ({"DATALOADER.NUM_WORKERS": "-1"}, "DATALOADER.NUM_WORKERS is -1. Set 0 or more"),
        ({"SOLVER.MAX_EPOCHS": "12"}, "SOLVER.MAX_EPOCHS is 12, but only classification reads it"),
        ({"DISTILL.TEACHER": "c3_32"}, "DISTILL.TEACHER is 'c3_32', but only classification"),
        ({"SOLVER.OPTIMIZER": "sgd"}, "error: SOLVER.OPTIMIZER is 'sgd'. Set one of SGD"),
        ({"SOLVER.OPTIMIZER": "Adam", "SOLVER.BETAS": "(0.9,)"}, "Adam cannot be built"),
        ({"SOLVER.MAX_ITER": "None"}, "SOLVER.MAX_ITER is None. Correct it."),
        ({"REPR.INCLUDE": "None"}, "REPR.INCLUDE is None. Correct it."),
        ({"SEED.X": "3"}, "An override is wrong"),
        ({"OUTPUT_DIR": ""}, "OUTPUT_DIR is empty. Set a folder."),
        ({"OUTPUT_DIR": __file__}, "is a file. Set another one"),
        ({"OUTPUT_DIR": f"{__file__}/below"}, "is a file. Set another one"),
    ],
)
def test_a_typo_is_one_sentence(tmp_path, capsys, changes, sentence):
    arguments = overrides(tmp_path / "out", **(SHAPES | changes))
    assert sentence in refused(capsys, "--config", "repr_faster_rcnn.yaml", *arguments)
    assert not (tmp_path / "out").exists()


def test_a_config_that_is_its_own_base_is_one_sentence(tmp_path, capsys):
    config = tmp_path / "mine.yaml"
    config.write_text("_BASE_: mine.yaml\n")
    assert f"Config {config} cannot be read (maximum recursion" in refused(
        capsys, "--config", str(config)
    )


def test_the_config_of_a_run_that_is_scaled_to_its_processes_says_so(tmp_path):
    """One process where two were meant: twice the iterations at half the rate."""
    keys = {"SOLVER.REFERENCE_WORLD_SIZE": "2", "SOLVER.IMS_PER_BATCH": "2"}
    keys |= {"SOLVER.MAX_ITER": "3", "SOLVER.BASE_LR": "0.002", "SOLVER.STEPS": "(2,)"}
    keys |= {"REPR.S1": "1", "REPR.S2": "1", "REPR.N": "1"}
    given = ["--config", "repr_faster_rcnn.yaml", *overrides(tmp_path, **(SHAPES | keys))]
    train(*given)
    run = read_run(tmp_path)
    assert run.iterations == run.cfg.SOLVER.MAX_ITER == 6
    assert (run.cfg.SOLVER.IMS_PER_BATCH, run.cfg.SOLVER.BASE_LR) == (1, 0.001)
    assert run.rate_drops == [4]
    assert run.spans == [(run.cfg.REPR.S1, run.cfg.REPR.S1 + run.cfg.REPR.S2)] == [(2, 4)]
    # Scaled once and for all: the run's own config changes nothing more.
    train(*given, "--resume", "SOLVER.MAX_ITER", "4")
    assert read_run(tmp_path).iterations == read_run(tmp_path).cfg.SOLVER.MAX_ITER == 8
    train("--config", str(tmp_path / "config.yaml"), "--resume")
    assert read_run(tmp_path).iterations == read_run(tmp_path).cfg.SOLVER.MAX_ITER == 8


def test_a_mistake_leaves_what_another_process_writes_meanwhile(tmp_path, capsys, monkeypatch):
    """Another run in the same folder writes while this one is built, and finds its mistake."""
    written = {name: f"of the other run: {name}" for name in ("model_0000009.pth", "config.yaml")}
    written["last_checkpoint"] = "model_0000009.pth"

    def build_optimizer(cls, cfg, model):
        for name, text in written.items():
            (tmp_path / name).write_text(text)
        raise UserError("SOLVER is wrong: correct it.")

    monkeypatch.setattr(RePrTrainer, "build_optimizer", classmethod(build_optimizer))
    arguments = overrides(tmp_path, **SHAPES)
    assert "SOLVER is wrong" in refused(capsys, "--config", "repr_faster_rcnn.yaml", *arguments)
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == written


def test_a_new_run_in_a_folder_keeps_what_the_earlier_one_says(tmp_path):
    (tmp_path / "last_checkpoint").write_text("model_0000999.pth")
    (tmp_path / "model_0000999.pth").write_text("precious")
    (tmp_path / "notes.txt").write_text("mine")
    train("--config", "repr_faster_rcnn.yaml", *overrides(tmp_path, **SHAPES))
    assert (tmp_path / "last_checkpoint.earlier").read_text() == "model_0000999.pth"
    assert (tmp_path / "model_0000999.pth").read_text() == "precious"
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "last_checkpoint").read_text() == "model_final.pth"
    # What was logged before there was a folder to log to is in the log.
    log = (tmp_path / "log.txt").read_text()
    assert log.index("Environment info") < log.index("conv layers take part") < log.index("Saving")


def test_a_run_that_was_set_aside_is_named_on_resumption(tmp_path, monkeypatch):
    """A new run was started by mistake, and stopped before it has written a checkpoint."""
    (tmp_path / "last_checkpoint").write_text("model_0000999.pth")

    def stop(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(SimpleTrainer, "run_step", stop)
    arguments = ["--config", "repr_faster_rcnn.yaml", *overrides(tmp_path, **SHAPES)]
    assert main(["train", *arguments]) == 130
    sentence = "starts at iteration 0. To resume the earlier run"
    assert sentence not in (tmp_path / "log.txt").read_text()
    assert main(["train", "--resume", *arguments]) == 130
    assert sentence in (tmp_path / "log.txt").read_text()


class TestRefusedResumption:
    """A run that exists is left as it was."""

    @pytest.fixture(scope="class")
    def stopped(self, tmp_path_factory):
        """A run on the built-in data that was stopped in S2."""
        folder = tmp_path_factory.mktemp("run")
        train("--config", "repr_faster_rcnn.yaml", *self.arguments(folder))
        (folder / "last_checkpoint").write_text("model_0000002.pth")
        return folder

    def test_at_the_last_iteration_the_final_checkpoint_is_written(self, stopped, tmp_path):
        """Whoever kills a run may do so between its last two files."""
        folder = tmp_path / "killed"
        shutil.copytree(stopped, folder)
        final = torch.load(folder / "model_final.pth", weights_only=True)
        (folder / "model_final.pth").unlink()
        (folder / "last_checkpoint").write_text("model_0000008.pth")
        train("--config", "repr_faster_rcnn.yaml", "--resume", *self.arguments(folder))
        again = torch.load(folder / "model_final.pth", weights_only=True)
        assert again["iteration"] == final["iteration"] == 8
        assert again["trainer"]["iteration"] == final["trainer"]["iteration"]
        assert all(torch.equal(again["model"][name], w) for name, w in final["model"].items())
        assert read_run(folder).finished

    def arguments(self, folder, **changes):
        return overrides(
            folder,
            **{
                "DATASETS.TRAIN": "('shapes_val',)",
                "DATASETS.TEST": "()",
                "MODEL.ROI_HEADS.NUM_CLASSES": "6",
                "SOLVER.CHECKPOINT_PERIOD": "3",
                "SOLVER.MAX_ITER": "9",
                **changes,
            },
        )

    @pytest.mark.parametrize(
        ("changes", "sentence"),
        [
            ({"REPR.SEED": "7"}, "seed was 0, is 7"),
            ({"REPR.ENABLED": "False"}, "written in S2 of a RePr run"),
            (
                {"SOLVER.BASE_LR": "0.0125"},
                "initial_lr was 0.002 in the checkpoint and is 0.0125 now (SOLVER.BASE_LR or",
            ),
            (
                {"SOLVER.WEIGHT_DECAY": "0.5"},
                "weight_decay was 0.0001 in the checkpoint and is 0.5 now (SOLVER.WEIGHT_D",
            ),
            (
                {"SOLVER.WEIGHT_DECAY_BIAS": "0.5"},
                "The optimizer groups parameters by other options than in the checkpoint (SOLVER.W",
            ),
            (
                {"SOLVER.OPTIMIZER": "AdamW"},
                "The checkpoint was written with another SOLVER.OPTIMIZER.",
            ),
        ],
    )
    def test_refused(self, stopped, capsys, changes, sentence):
        # The log of the run that this process made is still open.
        before = {p: p.read_bytes() for p in stopped.glob("*") if p.name != "log.txt"}
        text = refused(
            capsys, "--config", "repr_faster_rcnn.yaml", "--resume",
            *self.arguments(stopped, **changes),
        )  # fmt: skip
        assert sentence in text
        after = {p: p.read_bytes() for p in stopped.glob("*") if p.name != "log.txt"}
        assert after == before
