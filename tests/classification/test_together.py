"""Networks that are trained at once end as those that are trained alone."""

from __future__ import annotations

import json
import re

import pytest
import torch
from detectron2.utils.env import seed_all_rng
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode

from repr_det.classification import ClassificationTrainer
from repr_det.classification.datasets import ImageArrays
from repr_det.classification.loader import ArrayTrainLoader, StackedTrainLoader
from repr_det.classification.together import Together, common_settings, obstacle
from repr_det.engine import recording
from tests.classification.settings import make_arrays, register_corners, small_cfg


@pytest.fixture(autouse=True)
def double():
    """Everything in float64, so that only mistakes can make a difference."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def configs(tmp_path, **changes):
    """Standard training and two criteria, two seeds, all but the first with a drop and a return."""
    register_corners()
    found = []
    for number, (seed, criterion) in enumerate([(3, None), (3, "ortho"), (4, "taylor")]):
        cfg = small_cfg(str(tmp_path / str(number)))
        cfg.SEED = cfg.REPR.SEED = seed
        cfg.SOLVER.MAX_ITER = 32
        cfg.SOLVER.BASE_LR = 0.02
        cfg.SOLVER.WEIGHT_DECAY = 0.01
        cfg.SOLVER.STEPS = (25,)
        cfg.TEST.EVAL_PERIOD = 6
        cfg.REPR.ENABLED = criterion is not None
        cfg.REPR.CRITERION = criterion or "ortho"
        cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 8, 5 + number, 2
        cfg.REPR.COMPACT = "off"
        cfg.REPR.REINIT.OUTGOING = 0.5
        for key, value in changes.items():
            cfg.merge_from_list([key.replace("__", "."), value])
        found.append(cfg)
    return found


def train_alone(cfg, folder):
    cfg = cfg.clone()
    cfg.OUTPUT_DIR = str(folder)
    seed_all_rng(cfg.SEED)
    trainer = ClassificationTrainer(cfg)
    trainer.train()
    return trainer


def lines(folder):
    """The scalars of metrics.json that both kinds of training write, by name and iteration."""
    found = {}
    for line in (folder / "metrics.json").read_text().splitlines():
        line = json.loads(line)
        iteration = line.pop("iteration")
        found.update({(name, iteration): value for name, value in line.items()})
    timing = {"time", "data_time", "rank_data_time", "eta_seconds"}
    return {key: value for key, value in found.items() if key[0] not in timing}


def saved(folder):
    return torch.load(folder / "model_final.pth", weights_only=True)["model"]


@pytest.mark.parametrize(
    "changes",
    [
        {"SOLVER__OPTIMIZER": "Adam", "SOLVER__BASE_LR": 0.002},
        {"MODEL__CLASSIFIER__NAME": "c3_8_bn", "SOLVER__WEIGHT_DECAY_NORM": 0.02},
        {"MODEL__CLASSIFIER__NAME": "cifar_resnet8", "INPUT__CROP_PADDING": 2,
         "INPUT__RANDOM_FLIP": "horizontal", "SOLVER__WEIGHT_DECAY_BIAS": 0.0,
         "SOLVER__IMS_PER_BATCH": 6},
    ],
    ids=["adam", "momentum-norm", "augmented-residual"],
)  # fmt: skip
def test_ends_as_trained_alone(tmp_path, changes):
    cfgs = configs(tmp_path, **changes)
    Together(cfgs).train()
    for number, cfg in enumerate(cfgs):
        folder, alone_folder = tmp_path / str(number), tmp_path / f"alone{number}"
        alone = train_alone(cfg, alone_folder)
        torch.testing.assert_close(
            saved(folder), dict(alone.model.state_dict()), rtol=1e-7, atol=1e-9
        )
        mine, theirs = lines(folder), lines(alone_folder)
        # Detectron2 writes the last evaluation of every 20 iterations only.
        assert {name for name, _ in mine} == {name for name, _ in theirs}
        assert {key: mine[key] for key in theirs} == pytest.approx(theirs, rel=1e-6, abs=1e-6)
        if cfg.REPR.ENABLED:
            assert recording.read(folder).drops == recording.read(alone_folder).drops
            assert len(recording.read(folder).drops) == 2


def test_a_checkpoint_holds_one_network_and_can_be_resumed(tmp_path):
    (cfg, *others) = configs(tmp_path, REPR__ENABLED=True)
    Together([cfg, *others]).train()
    assert (tmp_path / "0" / "model_final.pth").stat().st_size < 40_000
    train_alone(cfg, tmp_path / "alone")
    rates, schedules = [], []
    for folder in ("0", "alone"):
        state = torch.load(tmp_path / folder / "model_final.pth", weights_only=True)["trainer"]
        rates.append([g["lr"] for g in state["_trainer"]["optimizer"]["param_groups"]])
        schedules.append(state["hooks"]["LRScheduler"])
    assert rates[0] == rates[1] and schedules[0] == schedules[1]
    trainer = ClassificationTrainer(cfg)
    trainer.resume_or_load(resume=True)
    assert trainer.start_iter == cfg.SOLVER.MAX_ITER
    torch.testing.assert_close(dict(trainer.model.state_dict()), saved(tmp_path / "0"))
    assert trainer.optimizer.state[trainer.model.network.fc.weight]["momentum_buffer"].any()


def test_a_network_that_diverges_leaves_the_others_alone(tmp_path):
    healthy = configs(tmp_path / "healthy")
    Together(healthy).train()
    cfgs = configs(tmp_path / "one")
    cfgs[1].REPR.REINIT.SCALE = 1e200
    progress = []
    together = Together(cfgs)
    together.train(progress.append)
    assert sum(progress) == 32
    for number in (0, 2):
        assert together.networks[number].diverged is None
        torch.testing.assert_close(
            saved(tmp_path / "one" / str(number)), saved(tmp_path / "healthy" / str(number)),
            rtol=0, atol=0,
        )  # fmt: skip
        assert lines(tmp_path / "one" / str(number)) == lines(tmp_path / "healthy" / str(number))
    with pytest.raises(FloatingPointError) as alone:
        train_alone(cfgs[1], tmp_path / "alone")
    (iteration,) = re.findall(r"at iteration=(\d+)", str(alone.value))
    assert together.networks[1].diverged.endswith(f"at iteration {iteration}.")
    recorded = lines(tmp_path / "one" / "1")
    evaluated = [at for name, at in recorded if name == "accuracy/top1"]
    assert evaluated == [5, 11] and max(at for _, at in recorded) <= int(iteration)
    assert not (tmp_path / "one" / "1" / "model_final.pth").exists()


class CountOperations(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def test_operations_of_a_step_are_as_many_for_any_number_of_networks(tmp_path):
    """In S2, too, where every network has dropped filters: on a GPU each is a launch."""
    in_s2 = []
    for count in (2, 3):
        cfgs = [configs(tmp_path / f"{count}-{number}")[1] for number in range(count)]
        for cfg in cfgs:
            cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 1, 38, 1
            cfg.SOLVER.MAX_ITER, cfg.SOLVER.IMS_PER_BATCH, cfg.TEST.EVAL_PERIOD = 41, 2, 0
        seen = []
        together = Together(cfgs)
        with CountOperations() as counted:
            together.train(lambda done, c=counted, s=seen: s.append((done, c.count)))
        assert [done for done, _ in seen] == [1, 19, 19, 1, 1]
        in_s2.append((seen[2][1] - seen[1][1]) / 19)
    assert 50 < in_s2[0] == in_s2[1] < 250


@pytest.mark.parametrize("augmented", [False, True])
def test_batches_are_those_of_each_order(augmented):
    images, labels = make_arrays(30)
    data = ImageArrays(images, labels, tuple("abcd"))
    first = ArrayTrainLoader(data, 7, 1, crop_padding=2 * augmented, flip=augmented)
    loaders = [first.with_seed(seed) for seed in (3, 1, 3, 2)]
    batches = iter(StackedTrainLoader(loaders, window=4))
    for iteration in range(10):
        batch = next(batches)
        for k, loader in enumerate(loaders):
            own = loader.batch(iteration)
            assert torch.equal(batch["image"][:, k], own["image"])
            assert torch.equal(batch["label"][:, k], own["label"])
    assert not torch.equal(batch["image"][:, 0], batch["image"][:, 1])


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("MODEL.META_ARCHITECTURE", "GeneralizedRCNN", "detector"),
        ("DISTILL.TEACHER", "c3_8", "learns from a teacher"),
        ("DSD.ENABLED", True, "dense, sparse, dense"),
        ("MODEL.CLASSIFIER.ORTHO_LOSS", 0.1, "orthogonality loss"),
        ("SOLVER.AMP.ENABLED", True, "mixed precision"),
        ("SOLVER.CLIP_GRADIENTS.ENABLED", True, "clipped"),
        ("MODEL.CLASSIFIER.DROPOUT", 0.5, "dropout"),
        ("MODEL.CLASSIFIER.NAME", "mobilenet_v3_small", r"cannot be batched \(.*random"),
        ("REPR.COMPACT", "on", "leave its network"),
        ("REPR.WARMUP", 3, "warms up after returns"),
        ("MODEL.COMPILE", True, "compiled"),
        ("DETERMINISTIC", True, "deterministic"),
    ],
)
def test_what_must_be_trained_alone(key, value, reason):
    register_corners()
    cfg = small_cfg()
    assert obstacle(cfg) is None
    cfg.merge_from_list([key, value])
    assert re.search(reason, obstacle(cfg))


def test_image_files_are_trained_alone(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / "imagenet" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (16, 16)).save(tmp_path / "imagenet" / "train" / name / "0.png")
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    cfg = small_cfg()
    cfg.DATASETS.TRAIN = ("imagenet_train",)
    assert obstacle(cfg) == "its images are files"


def test_what_goes_together():
    one, other = small_cfg("one"), small_cfg("other")
    other.SEED, other.REPR.ENABLED, other.REPR.S1 = 7, True, 3
    assert common_settings(one) == common_settings(other)
    other.SOLVER.BASE_LR = 0.5
    assert common_settings(one) != common_settings(other)
