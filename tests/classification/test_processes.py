"""Two processes train and evaluate as one does; three resume to the same bits."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import time
from pathlib import Path

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm

from repr_det.classification import ClassificationTrainer
from repr_det.engine.processes import launch
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


def threads() -> int:
    """How many threads this process has, those of C++ included."""
    return len(os.listdir("/proc/self/task"))


def train_and_watch_threads(output_dir: str, file: str) -> None:
    train(output_dir, file)
    target = Path(f"{file}_threads{comm.get_rank()}")
    while_trained = threads()

    def write() -> None:
        # Linux may still list a thread for a moment that has been joined.
        until = time.monotonic() + 10
        while threads() >= while_trained and time.monotonic() < until:
            time.sleep(0.01)
        target.write_text(json.dumps([while_trained, threads()]))

    atexit.register(write)


@pytest.mark.skipif(torch.cuda.is_available(), reason="Detectron2's launch would ask for two GPUs")
def test_two_processes_are_one(tmp_path):
    train(str(tmp_path / "one"), f"{tmp_path}/one")
    launch(train_and_watch_threads, 2, args=(str(tmp_path / "two"), f"{tmp_path}/two"))
    one, first, second = (torch.load(tmp_path / name) for name in ("one0", "two0", "two1"))
    assert second["accuracy"] is None
    for name, weight in one["weights"].items():
        # Half the batch on each side: sums are taken in another order, so only nearly equal.
        assert torch.equal(first["weights"][name], second["weights"][name])
        assert torch.allclose(first["weights"][name], weight, atol=1e-5), name
    assert first["accuracy"] == pytest.approx(one["accuracy"], rel=1e-4)
    for rank in range(2):
        while_trained, at_exit = json.loads((tmp_path / f"two_threads{rank}").read_text())
        assert at_exit < while_trained, "the threads that reduce tensors are still there"


@pytest.mark.skipif(torch.cuda.is_available(), reason="Detectron2's launch would ask for two GPUs")
def test_checkpoint_of_two_processes_evaluates_to_what_was_reported(tmp_path):
    """Norms count the batches of their own process; a checkpoint holds the first one's counts."""
    out = tmp_path / "out"
    launch(train, 2, args=(str(out), f"{tmp_path}/two", "c3_8_bn"))
    register_corners()
    cfg = small_cfg(str(out))
    cfg.MODEL.CLASSIFIER.NAME = "c3_8_bn"
    cfg.MODEL.WEIGHTS = str(out / "model_final.pth")
    found = ClassificationTrainer.test(cfg, load_trained(cfg))["accuracy"]
    reported = torch.load(tmp_path / "two0")["accuracy"]
    assert found == pytest.approx(reported, rel=1e-5)


class Stop(HookBase):
    """Ends training after so many iterations, on every rank."""

    def __init__(self, iterations: int) -> None:
        self._iterations = iterations

    def after_step(self) -> None:
        if self.trainer.iter + 1 == self._iterations:
            comm.synchronize()  # until the first rank has written its checkpoint
            raise KeyboardInterrupt


def train_whole_and_resumed(folder: str) -> None:
    """On each rank, in one process: a run, the same run stopped in S2, and that run resumed."""
    torch.set_num_threads(1)
    register_corners()
    weights = []
    for name, stop in (("whole", 0), ("stopped", 6), ("stopped", 0)):
        cfg = small_cfg(f"{folder}/{name}")
        cfg.DETERMINISTIC = True
        cfg.MODEL.CLASSIFIER.NAME = "c3_8_bn"
        cfg.SOLVER.IMS_PER_BATCH = 12
        cfg.SOLVER.CHECKPOINT_PERIOD = 3
        cfg.REPR.ENABLED = True
        cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 4, 4, 1
        cfg.DATASETS.TEST = ()
        torch.manual_seed(0)
        trainer = ClassificationTrainer(cfg)
        trainer.resume_or_load(resume=True)
        assert trainer.start_iter == (6 if len(weights) == 2 else 0)
        trainer.register_hooks([Stop(stop)])
        with contextlib.suppress(KeyboardInterrupt):
            trainer.train()
        weights.append({n: w.clone() for n, w in trainer.model.state_dict().items()})
    torch.save(weights, f"{folder}/weights{comm.get_rank()}")


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="Detectron2's launch would ask for GPUs")
def test_three_processes_resume_to_the_same_bits(tmp_path):
    """Of three gradients the sum depends on the order, and that on how they are put together."""
    launch(train_whole_and_resumed, 3, args=(str(tmp_path),))
    by_rank = [torch.load(tmp_path / f"weights{rank}") for rank in range(3)]
    whole = by_rank[0][0]
    for _, stopped, resumed in by_rank:
        assert any(not torch.equal(stopped[name], weight) for name, weight in whole.items())
        for name, weight in whole.items():
            assert torch.equal(resumed[name], weight), name
