"""Two processes train and evaluate as one does."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import launch
from detectron2.utils import comm

from repr_det.classification import ClassificationTrainer
from repr_det.engine.trained import load_trained
from tests.classification.settings import register_corners, small_cfg


def train(output_dir: str, file: str, network: str = "c3_8") -> None:
    torch.set_num_threads(1)
    register_corners()
    cfg = small_cfg(output_dir)
    cfg.MODEL.CLASSIFIER.NAME = network
    cfg.INPUT.RANDOM_FLIP = "horizontal"
    cfg.INPUT.CROP_PADDING = 2
    cfg.SOLVER.MAX_ITER = 16
    cfg.REPR.ENABLED = True
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 4, 3, 2
    torch.manual_seed(0)
    trainer = ClassificationTrainer(cfg)
    trainer.train()
    weights = dict(trainer.model.named_parameters())
    result = {
        "weights": {n.removeprefix("module."): w.detach() for n, w in weights.items()},
        "accuracy": trainer._last_eval_results.get("accuracy"),
    }
    torch.save(result, f"{file}{comm.get_rank()}")


@pytest.mark.skipif(torch.cuda.is_available(), reason="Detectron2's launch would ask for two GPUs")
def test_two_processes_are_one(tmp_path):
    train(str(tmp_path / "one"), f"{tmp_path}/one")
    launch(train, 2, dist_url="auto", args=(str(tmp_path / "two"), f"{tmp_path}/two"))
    one, first, second = (torch.load(tmp_path / name) for name in ("one0", "two0", "two1"))
    assert second["accuracy"] is None
    for name, weight in one["weights"].items():
        # Half the batch on each side: sums are taken in another order, so only nearly equal.
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert torch.allclose(first["weights"][name], weight, atol=1e-5), name
    assert first["accuracy"] == pytest.approx(one["accuracy"], rel=1e-4)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Detectron2's launch would ask for two GPUs")
def test_checkpoint_of_two_processes_evaluates_to_what_was_reported(tmp_path):
    """Norms count the batches of their own process; a checkpoint holds the first one's counts."""
    out = tmp_path / "out"
    launch(train, 2, dist_url="auto", args=(str(out), f"{tmp_path}/two", "c3_8_bn"))
    register_corners()
    cfg = small_cfg(str(out))
    cfg.MODEL.CLASSIFIER.NAME = "c3_8_bn"
    cfg.MODEL.WEIGHTS = str(out / "model_final.pth")
    found = ClassificationTrainer.test(cfg, load_trained(cfg))["accuracy"]
    reported = torch.load(tmp_path / "two0")["accuracy"]
    assert found == pytest.approx(reported, rel=1e-5)
