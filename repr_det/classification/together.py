"""Several training runs at once, as one batched network.

Runs that differ only in their seed and in RePr go together: same network, data, batch size, length,
optimizer and learning-rate schedule. Each has the initial weights, the batches, the drops and
returns and the evaluations that it has alone in ``ClassificationTrainer``; what it computes is the
same up to the order in which floating-point numbers are added. Pruned filters stay in the network
as zeros, and no run lays its memory out channels last.

For RePr each network is a module of its own, on its part of the common storage, with an optimizer
that shows its part of the common state: :class:`repr_det.RePrHook` acts on both as in any trainer.
"""

from __future__ import annotations

import json
import logging
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.engine import hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.solver import LRMultiplier
from detectron2.utils.env import seed_all_rng
from detectron2.utils.events import EventStorage
from torch import Tensor, nn

from repr_det.classification.classifier import ImageClassifier
from repr_det.classification.datasets import ImageArrays, load_images
from repr_det.classification.loader import ArrayTrainLoader, StackedTrainLoader
from repr_det.classification.models import build_classifier
from repr_det.classification.stacked import StackedNetworks
from repr_det.classification.trainer import ClassificationTrainer
from repr_det.engine import solver
from repr_det.engine.checkpoint import SafeCheckpointer
from repr_det.engine.hook import RePrHook

logger = logging.getLogger(f"detectron2.{__name__}")

WINDOW = 20
"""Iterations between two looks at the losses, and over which their median is recorded."""

Around = Callable[[CfgNode], AbstractContextManager[Any]]


def obstacle(cfg: CfgNode) -> str | None:
    """Why a run cannot be trained together with others, or None.

    Args:
        cfg: its config, with the keys of every task.

    Raises:
        UserError: a mistake in the config or the data.
    """
    keys = cfg.MODEL.CLASSIFIER
    reasons = {
        "it is a detector": cfg.MODEL.META_ARCHITECTURE != "ImageClassifier",
        "it learns from a teacher": cfg.DISTILL.TEACHER,
        "it has dropout": keys.DROPOUT,
        "it is trained dense, sparse, dense": cfg.DSD.ENABLED,
        "it has an orthogonality loss": keys.ORTHO_LOSS,
        "it uses mixed precision": cfg.SOLVER.AMP.ENABLED,
        "its gradients are clipped": cfg.SOLVER.CLIP_GRADIENTS.ENABLED,
        "it starts from given weights": cfg.MODEL.WEIGHTS,
        "its network is compiled": cfg.MODEL.COMPILE,
        "it is deterministic": cfg.DETERMINISTIC,
        "it has no seed": cfg.SEED < 0,
        "its statistics are measured anew for evaluations": cfg.TEST.PRECISE_BN.ENABLED,
        "its learning rate warms up after returns": cfg.REPR.WARMUP,
        "pruned filters leave its network": cfg.REPR.COMPACT == "on",
    }
    for reason, holds in reasons.items():
        if holds:
            return reason
    if not isinstance(load_images(cfg, cfg.DATASETS.TRAIN[0]), ImageArrays):
        return "its images are files"
    size = cfg.INPUT.IMAGE_SIZE
    with torch.random.fork_rng(devices=[]):
        network = build_classifier(keys.NAME, keys.NUM_CLASSES, keys.DROPOUT, size)
    try:
        with torch.no_grad():
            found = StackedNetworks([network.to("meta")] * 2)(
                torch.empty(2, 2, 3, size, size, device="meta")
            )
    except (RuntimeError, AssertionError) as error:
        return f"its network cannot be batched ({str(error).splitlines()[0].rstrip('.')})"
    return None if isinstance(found, Tensor) else "its network has further outputs"


def common_settings(cfg: CfgNode) -> str:
    """What runs that are trained together have in common, as text: equal for equal settings."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.REPR = CfgNode({"COMPACT": cfg.REPR.COMPACT})
    for key in ("SEED", "OUTPUT_DIR"):
        del cfg[key]
    return cfg.dump()


class Network(TrainerBase):
    """One of the networks, with its hooks, as if it had a trainer of its own.

    Args:
        cfg: its config.
        model: its model.
        data_loader: its batches.

    Attributes:
        results: what the last evaluation found, as Detectron2's trainers return it.
        diverged: where its loss ceased to be finite; None while it has not.
    """

    def __init__(self, cfg: CfgNode, model: nn.Module, data_loader: ArrayTrainLoader) -> None:
        super().__init__()
        self.cfg = cfg
        self.model = model.train()
        self.data_loader = data_loader
        self.optimizer = solver.build_optimizer(cfg, model)
        self.max_iter = cfg.SOLVER.MAX_ITER
        self.storage = EventStorage()
        self.results: dict[str, Any] = {}
        self.diverged: str | None = None
        self._written = -1
        self.hook = RePrHook.from_config(cfg)
        evaluation = hooks.EvalHook(cfg.TEST.EVAL_PERIOD, lambda: self.results)
        self.register_hooks([self.hook, evaluation])

    @property
    def in_s2(self) -> bool:
        """Whether filters must be held at zero now."""
        return self.diverged is None and self.hook is not None and self.hook.method.num_pruned > 0

    def at(self, iteration: int) -> Network:
        """Itself, with its clocks at an iteration."""
        self.iter = self.storage.iter = iteration
        return self

    def open_metrics(self) -> TextIO:
        """``metrics.json`` in its folder, empty."""
        folder = Path(self.cfg.OUTPUT_DIR)
        folder.mkdir(parents=True, exist_ok=True)
        return (folder / "metrics.json").open("w")

    def write(self, file: TextIO) -> None:
        """Write the scalars that are new as lines of ``metrics.json``, one an iteration."""
        lines: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in self.storage.latest().items():
            if iteration > self._written:
                lines[iteration][name] = value
        for iteration, line in sorted(lines.items()):
            file.write(json.dumps({**line, "iteration": iteration}, sort_keys=True) + "\n")
            self._written = iteration
        # Nobody writes these.
        self.storage.clear_images()
        self.storage.clear_histograms()

    def save(self, scheduler: LRMultiplier) -> None:
        """Write the checkpoint that training alone ends with.

        Args:
            scheduler: of all networks' learning rate, which their own optimizers have not followed.
        """
        for group, rate in zip(self.optimizer.param_groups, scheduler.get_last_lr(), strict=True):
            group["lr"] = rate
        state = {"iteration": self.iter, "optimizer": self.optimizer.state_dict()}
        trainer = {**self.state_dict(), "_trainer": state}
        trainer.setdefault("hooks", {})["LRScheduler"] = scheduler.state_dict()
        checkpointer = SafeCheckpointer(self.model, self.cfg.OUTPUT_DIR)
        checkpointer.save("model_final", trainer=trainer, iteration=self.iter)


class Together:
    """Trains several runs of a classifier at once.

    Each run's folder gets what a run alone leaves there, except for checkpoints on the way and
    times: ``metrics.json``, ``repr_history.json`` and, if it did not diverge, ``model_final.pth``.

    Args:
        configs: of runs without :func:`obstacle` and with equal :func:`common_settings`; every
            length in iterations, ``OUTPUT_DIR`` a folder without a run.
        around: entered around what is done for one run alone, so that log lines can be told apart.

    Raises:
        UserError: what the runs' own trainers would refuse.
    """

    def __init__(
        self, configs: Sequence[CfgNode], around: Around = lambda cfg: nullcontext()
    ) -> None:
        self._around = around
        self._cfg = configs[0]
        models = []
        for cfg in configs:
            with around(cfg):
                seed_all_rng(cfg.SEED)
                models.append(ClassificationTrainer.build_model(cfg))
        self._classifier: ImageClassifier = models[0]
        self._stacked = StackedNetworks([model.network for model in models])
        self._optimizer = solver.build_optimizer(self._cfg, self._stacked.stack)
        self._scheduler = solver.build_lr_scheduler(self._cfg, self._optimizer)
        loader = ClassificationTrainer.build_train_loader(self._cfg)
        loaders = [loader.with_seed(cfg.SEED) for cfg in configs]
        self._batches = iter(StackedTrainLoader(loaders, WINDOW))
        self._test_loaders = {
            name: ClassificationTrainer.build_test_loader(self._cfg, name)
            for name in self._cfg.DATASETS.TEST
        }
        self.networks: list[Network] = []
        for cfg, model, data_loader in zip(configs, models, loaders, strict=True):
            with around(cfg):
                self.networks.append(Network(_without_compact(cfg), model, data_loader))
        self._changes = {
            iteration
            for network in self.networks
            if network.hook is not None
            for span in network.hook.schedule.sub_spans()
            for iteration in span
        }
        self._masks: dict[nn.Parameter, Tensor] = {}
        self._unseen: list[Tensor] = []
        self._recent: deque[np.ndarray] = deque(maxlen=WINDOW)

    def train(self, progress: Callable[[int], None] = lambda iterations: None) -> None:
        """Train all runs to their end.

        A network whose loss ceases to be finite is left alone from then on, see
        :attr:`Network.diverged`; the others do not notice. Ends early where none is left.

        Args:
            progress: called with the number of iterations done since it was called last.
        """
        last = self._cfg.SOLVER.MAX_ITER - 1
        period = self._cfg.TEST.EVAL_PERIOD
        with ExitStack() as stack:
            stack.enter_context(_fastest_kernels())
            files = [stack.enter_context(network.open_metrics()) for network in self.networks]
            for network in self._each():
                network.before_train()
            for iteration in range(last + 1):
                if iteration in self._changes:
                    self._change_phases(iteration)
                if iteration:
                    self._scheduler.step()
                self._step()
                done = iteration + 1
                evaluates = iteration == last or (period > 0 and done % period == 0)
                records = iteration == last or done % WINDOW == 0
                if evaluates or records or done in self._changes:
                    progress(self._look(iteration))
                    if all(network.diverged for network in self.networks):
                        return
                if records:
                    self._record(iteration)
                if evaluates:
                    self._evaluate()
                    for network in self._each():
                        network.at(iteration).after_step()
                if evaluates or records:
                    for network, file in zip(self.networks, files, strict=True):
                        network.write(file)
            self._finish(last)
            for network, file in zip(self.networks, files, strict=True):
                network.write(file)

    def _each(self) -> Iterator[Network]:
        """The networks that have not diverged, each in what was given as ``around``."""
        for network in self.networks:
            if network.diverged is None:
                with self._around(network.cfg):
                    yield network

    def _step(self) -> None:
        batch = next(self._batches)
        labels = batch["label"].T
        logits = self._stacked(self._classifier.normalized(batch["image"]))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
        losses = losses.view_as(labels).mean(1)
        self._optimizer.zero_grad()
        # A sum, so that each network's gradients are those of its own loss.
        losses.sum().backward()
        if self._masks:
            torch._foreach_mul_([p.grad for p in self._masks], list(self._masks.values()))
        self._optimizer.step()
        hits = (logits.detach().argmax(2) == labels).to(losses.dtype).mean(1)
        self._unseen.append(torch.stack([losses.detach(), hits]))

    def _change_phases(self, iteration: int) -> None:
        """Let the networks that it is time for drop filters or bring them back."""
        self._share_state()
        for network in self._each():
            if network.hook is not None and network.hook.method.due(iteration):
                try:
                    network.at(iteration).before_step()
                except FloatingPointError as error:
                    network.diverged = str(error)
                    logger.warning(network.diverged)
        self._masks = self._gradient_masks()

    def _share_state(self) -> None:
        self._stacked.share_state(self._optimizer, [n.optimizer for n in self.networks])

    def _gradient_masks(self) -> dict[nn.Parameter, Tensor]:
        """Zero where a filter is dropped and one elsewhere, for parameters with dropped filters.

        One multiplication a step of all gradients, instead of one for each network and layer.
        """
        stacked = dict(self._stacked.stack.named_parameters())
        masks = {name: torch.ones_like(p) for name, p in stacked.items()}
        for k, network in enumerate(self.networks):
            if network.in_s2:
                parameters = dict(network.model.network.named_parameters())
                for name, parameter in parameters.items():
                    parameter.grad = masks[name][k]
                network.hook.method.mask_gradients()
                for parameter in parameters.values():
                    parameter.grad = None
        return {stacked[name]: mask for name, mask in masks.items() if not mask.all()}

    def _look(self, iteration: int) -> int:
        """Read the losses of the steps up to this one, and see who diverged; returns how many."""
        found = torch.stack(self._unseen).double().cpu().numpy()  # (steps, 2, K)
        self._unseen.clear()
        self._recent.extend(found)
        first = iteration + 1 - len(found)
        for k, network in enumerate(self.networks):
            lost = np.flatnonzero(~np.isfinite(found[:, 0, k]))
            if len(lost) and network.diverged is None:
                loss = found[lost[0], 0, k]
                network.diverged = f"The loss became {loss} at iteration {first + lost[0]}."
                with self._around(network.cfg):
                    logger.warning(network.diverged)
        return len(found)

    def _record(self, iteration: int) -> None:
        """Record the scalars that Detectron2's hooks record, medians over the last window."""
        groups = self._optimizer.param_groups
        rate = groups[hooks.LRScheduler.get_best_param_group_id(self._optimizer)]["lr"]
        losses, hits = np.median(np.stack(self._recent), axis=0)
        for network, loss, hit in zip(self.networks, losses, hits, strict=True):
            if network.diverged is None:
                network.at(iteration).before_step()
                network.storage.put_scalars(
                    **{"total_loss": loss, "train/top1": 100 * hit, "lr": rate},
                    smoothing_hint=False,
                )

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Set the results of every network."""
        self._stacked.eval()
        alive = [(k, n) for k, n in enumerate(self.networks) if n.diverged is None]
        found: list[dict[str, Any]] = [{} for _ in alive]
        for name, loader in self._test_loaders.items():
            evaluators = [ClassificationTrainer.build_evaluator(n.cfg, name) for _, n in alive]
            for evaluator in evaluators:
                evaluator.reset()
            for batch in loader:
                logits = self._stacked(self._classifier.normalized(batch["image"]))
                for evaluator, (k, _) in zip(evaluators, alive, strict=True):
                    evaluator.process(batch, logits[k])
            for results, evaluator in zip(found, evaluators, strict=True):
                results[name] = evaluator.evaluate()
        for (_, network), results in zip(alive, found, strict=True):
            # As Detectron2's trainers name the results of a single test set.
            network.results = results if len(results) > 1 else next(iter(results.values()), {})
        self._stacked.train()

    def _finish(self, last: int) -> None:
        self._share_state()
        self._stacked.separate([network.optimizer for network in self.networks])
        self._scheduler.step()
        for network in self._each():
            network.at(last).save(self._scheduler)
            network.iter = last + 1
            network.after_train()


def _without_compact(cfg: CfgNode) -> CfgNode:
    """The config of a network whose shapes must not change."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.REPR.COMPACT = "off"
    cfg.freeze()
    return cfg


@contextmanager
def _fastest_kernels() -> Iterator[None]:
    """Let cuDNN try out which of its kernels are fastest, since shapes stay the same."""
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
