"""A small run in several processes that writes down a fingerprint of every rank.

    python ranks.py TASK OUTPUT PROCESSES [RANK_TO_KILL ITERATION]

Under torchrun PROCESSES counts for nothing: the processes exist already.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import HookBase
from detectron2.layers import FrozenBatchNorm2d
from detectron2.utils import comm
from detectron2.utils.env import seed_all_rng

from repr_det.engine.hook import RePrHook
from repr_det.engine.processes import launch
from repr_det.tasks import trainer_for
from tests.engine.killed_run import TASKS


def digest(item: Any) -> str:
    """A hash of tensors and what holds them."""
    sha = hashlib.sha256()

    def add(item: Any) -> None:
        if isinstance(item, torch.Tensor):
            sha.update(item.detach().cpu().contiguous().numpy().tobytes())
        elif isinstance(item, dict):
            for key in sorted(item, key=str):
                sha.update(str(key).encode())
                add(item[key])
        elif isinstance(item, (list, tuple)):
            for entry in item:
                add(entry)
        else:
            sha.update(repr(item).encode())

    add(item)
    return sha.hexdigest()


class Fingerprint(HookBase):
    """Hashes masks, parameters, frozen norms, optimizer and RePr state after changes of phase."""

    def __init__(self, path: Path, kill_at: int | None) -> None:
        self._path, self._kill_at, self._seen, self._last = path, kill_at, [], None

    def before_step(self) -> None:
        if self.trainer.iter == self._kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        hook = next(h for h in self.trainer._hooks if isinstance(h, RePrHook))
        phase = [hook.method.phase, hook.method.cycle]
        if phase != self._last:
            self._last = phase
            self._write(hook)

    def after_train(self) -> None:
        self._write(next(h for h in self.trainer._hooks if isinstance(h, RePrHook)))

    def _write(self, hook: RePrHook) -> None:
        # Norms that train count the batches of their own rank.
        norms = [m for m in self.trainer.model.modules() if isinstance(m, FrozenBatchNorm2d)]
        self._seen.append(
            {
                "phase": self._last,
                "pruned": digest(hook.method.pruned),
                "parameters": digest(dict(self.trainer.model.named_parameters())),
                "frozen norms": digest([norm.state_dict() for norm in norms]),
                "optimizer": digest(self.trainer.optimizer.state_dict()),
                "repr": digest(hook.state_dict()),
            }
        )
        self._path.parent.mkdir(parents=True, exist_ok=True)  # the first rank may not be there yet
        self._path.write_text(json.dumps(self._seen))


def run(task: str, output: str, kill_rank: int, kill_at: int) -> None:
    torch.set_num_threads(1)
    cfg = TASKS[task](output)
    cfg.SEED = 5
    cfg.SOLVER.MAX_ITER = 12
    cfg.SOLVER.CHECKPOINT_PERIOD = 3
    cfg.SOLVER.IMS_PER_BATCH = 4
    cfg.REPR.S1, cfg.REPR.S2, cfg.REPR.N = 3, 2, 2
    cfg.DATASETS.TEST = ()
    if task == "detection":
        # Statistics of returned channels are measured, on the images of all ranks.
        cfg.MODEL.RESNETS.NORM = "FrozenBN"
        cfg.SOLVER.CLIP_GRADIENTS.ENABLED = True  # or it diverges, untrained without norms
    cfg.TEST.EVAL_PERIOD = 0
    # Learned from data, which differs from rank to rank.
    cfg.REPR.CRITERION = "taylor" if task.startswith("classification") else "ortho"
    rank = comm.get_rank()
    seed_all_rng(5 + rank)
    trainer = trainer_for(cfg)(cfg)
    path = Path(output) / f"rank{rank}.json"
    trainer.register_hooks([Fingerprint(path, kill_at if rank == kill_rank else None)])
    trainer.resume_or_load(resume=True)
    trainer.train()


def main(
    task: str, output: str, processes: str, kill_rank: str = "-1", kill_at: str = "-1"
) -> None:
    launch(run, int(processes), args=(task, output, int(kill_rank), int(kill_at)))


if __name__ == "__main__":
    main(*sys.argv[1:])
