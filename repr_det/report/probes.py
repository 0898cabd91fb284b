"""A trained network and what its filters do: overlap, responses and their correlations."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.utils.env import seed_all_rng
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from repr_det.engine import solver
from repr_det.engine.batches import own_batches, training_loss
from repr_det.engine.checkpoint import SafeCheckpointer
from repr_det.engine.trainer import RePrTrainer, check_weights
from repr_det.errors import UserError
from repr_det.method.controller import RePr
from repr_det.method.criteria import Data, filter_overlap, mean_overlap
from repr_det.method.data_criteria import BATCHES, oracle
from repr_det.method.layers import FilterLayer
from repr_det.method.modules import named_modules, unchanged
from repr_det.method.schedule import RePrSchedule
from repr_det.tasks import trainer_for

OBSERVATIONS = 2048
"""Positions of all images together at which the responses of a layer are looked at."""

_MOST_RESPONSES = 4e7
"""Responses of all layers together that are kept at once."""

POOLED_FILTERS = 64
"""At most this many filters of a layer, evenly chosen, are compared by their pooled maps."""

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class Network:
    """A model and the layers that RePr works on in it.

    Attributes:
        cfg: what it was built from.
        model: in evaluation mode.
        layers: the filter layers.
        stems: names of the convs that read the image.
    """

    cfg: CfgNode
    model: nn.Module
    layers: list[FilterLayer]
    stems: list[str]


@dataclass(frozen=True)
class Responses:
    """What the filters of some layers answered to the same images, before any non-linearity.

    Attributes:
        sampled: (observations, filters) by layer.
        pooled: (images, filters, positions) by layer, of at most :data:`POOLED_FILTERS` filters.
        whole: names of the layers that see whole images, at the same positions in every network;
            others see boxes, which are not the same in two networks.
    """

    sampled: dict[str, Matrix]
    pooled: dict[str, Matrix]
    whole: frozenset[str]


def load_network(cfg: CfgNode, weights: str | Path | None) -> Network:
    """Build a config's model with weights.

    Args:
        cfg: a run's config.
        weights: a checkpoint; None for what training begins with, by ``MODEL.WEIGHTS`` and, where
            ``SEED`` is at least 0, the same random numbers.

    Raises:
        UserError: no such file, or not a checkpoint, or of another architecture.
    """
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DISTILL.TEACHER = ""  # a teacher is not part of the network
    seed_all_rng(max(cfg.SEED, 0))
    model = RePrTrainer.build_model(cfg)
    if weights is not None:
        SafeCheckpointer(model).load_whole(str(weights))
    elif cfg.MODEL.WEIGHTS:  # of a part of the model, maybe
        check_weights(cfg.MODEL.WEIGHTS)
        SafeCheckpointer(model).load(cfg.MODEL.WEIGHTS, checkpointables=[])
    keys = cfg.REPR
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what only matters to training
        method = RePr(
            model,
            solver.build_optimizer(cfg, model),
            RePrSchedule(1, 1, 1),
            prune_ratio=0.5,
            include=keys.INCLUDE,
            exclude=keys.EXCLUDE,
            max_layer_ratio=1.0,
            linear=keys.LINEAR,
        )
    model.eval()
    stems = method.graph.stems & method.graph.convs.keys()
    return Network(cfg, model, method.layers, sorted(stems))


def overlap(network: Network) -> dict[str, float]:
    """Mean plain Ortho score of the filters of each layer that are not zero."""
    none = {n.name: torch.zeros(n.num_filters, dtype=torch.bool) for n in network.layers}
    return mean_overlap(filter_overlap(network.layers, none))


def held_out_images(cfg: CfgNode, count: int) -> list[Any]:
    """The first images of the last test set, prepared as for evaluation.

    Returns:
        Batches of the test loader with at least ``count`` images, or all that there are.

    Raises:
        UserError: there is no test set, or its data are not there.
    """
    if not cfg.DATASETS.TEST:
        raise UserError(
            "The run has no test set (DATASETS.TEST). Set one with --test-data or --test-folder."
        )
    cfg = cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.TEST.IMS_PER_BATCH = count
    trainer = trainer_for(cfg)
    trainer.check(cfg)
    loader = trainer.build_test_loader(cfg, cfg.DATASETS.TEST[-1])
    batches, images = [], 0
    for batch in loader:
        batches.append(batch)
        images += _size(batch)
        if images >= count:
            break
    return batches


def _size(batch: Any) -> int:
    return len(batch["image"]) if isinstance(batch, dict) else len(batch)


def responses(network: Network, batches: Sequence[Any], pooled: Sequence[str]) -> Responses:
    """Run a network and keep what its filter layers answer.

    Args:
        network: whose.
        batches: from :func:`held_out_images`.
        pooled: names of the layers whose pooled maps are kept.
    """
    images = sum(map(_size, batches))
    # SVCCA of two maps needs more images than both maps have positions.
    side = max(1, min(4, math.isqrt(max(0, (images - 2) // 2))))
    filters = sum(layer.num_filters for layer in network.layers)
    kept = min(OBSERVATIONS, int(_MOST_RESPONSES / filters))
    positions = max(1, kept // max(images, 1))
    samples: dict[str, list[Tensor]] = {layer.name: [] for layer in network.layers}
    maps: dict[str, list[Tensor]] = {name: [] for name in pooled}
    of_boxes: set[str] = set()

    def look(name: str, out: Tensor, linear: bool) -> None:
        if linear and out.dim() > 1:  # channels are last there
            out = out.reshape(len(out), -1, out.shape[-1]).transpose(1, 2)[..., None]
        if out.dim() != 4 or not len(out):  # for example a mask head without boxes
            return
        if len(out) != size:
            of_boxes.add(name)
            out = out[:: max(1, len(out) // size)]  # about as many boxes as there are images
        flat = out.flatten(2)
        generator = torch.Generator().manual_seed(0)
        chosen = torch.randperm(flat.shape[2], generator=generator)[:positions]
        values = flat[:, :, chosen.to(flat.device)].transpose(1, 2)
        samples[name].append(values.reshape(-1, out.shape[1]).cpu())
        if name in maps:
            few = np.linspace(0, out.shape[1] - 1, min(POOLED_FILTERS, out.shape[1])).astype(int)
            maps[name].append(F.adaptive_avg_pool2d(out[:, few], side).flatten(2).cpu())

    handles = [
        layer.module.register_forward_hook(
            lambda module, _, out, name=layer.name: look(name, out, isinstance(module, nn.Linear))
        )
        for layer in network.layers
    ]
    try:
        with torch.no_grad():
            for batch in batches:
                size = _size(batch)
                network.model(batch)
    finally:
        for handle in handles:
            handle.remove()
    sampled, averaged = (
        {name: torch.cat(parts).double().numpy() for name, parts in kind.items() if parts}
        for kind in (samples, maps)
    )
    return Responses(sampled, averaged, frozenset(sampled) - of_boxes)


def filter_correlations(samples: Matrix) -> Matrix:
    """|Pearson's correlation| of the filters of a layer.

    That is the canonical correlation of two filters whose observations are positions, each filter
    being one variable.

    Args:
        samples: (observations, filters).

    Returns:
        (filters, filters), 1 on the diagonal; NaN for filters that are constant.
    """
    constant = np.ptp(samples, axis=0) <= 1e-12 * np.abs(samples).max(axis=0)
    table = np.full((samples.shape[1],) * 2, np.nan)
    varying = np.flatnonzero(~constant)
    if varying.size:
        found = np.atleast_2d(np.corrcoef(samples[:, varying], rowvar=False))
        table[np.ix_(varying, varying)] = np.clip(np.abs(found), 0, 1)
    return table


def _main_directions(values: Matrix, variance: float) -> Matrix:
    """(n, r), an orthonormal basis of the fewest directions that explain the variance."""
    left, singular, _ = np.linalg.svd(values - values.mean(axis=0), full_matrices=False)
    # Rounding errors are no direction: the limit is that of a rank, by the raw values.
    rank = int((singular > max(values.shape) * np.finfo(float).eps * np.linalg.norm(values)).sum())
    explained = np.cumsum(singular[:rank] ** 2)
    needed = int(np.searchsorted(explained, (variance - 1e-12) * explained[-1])) + 1 if rank else 0
    return left[:, : min(rank, needed)]


def map_correlations(maps: Matrix, variance: float = 0.99) -> Matrix:
    """SVCCA of the maps of a layer's filters over images (Raghu et al. 2017, section 2).

    Each map is replaced by its fewest principal directions that explain the variance; then the
    canonical correlations of two maps are averaged.

    Args:
        maps: (images, filters, positions), more than twice as many images as positions.
        variance: share to be explained, in (0, 1].

    Returns:
        (filters, filters), 1 on the diagonal; NaN for maps that are constant.

    Raises:
        UserError: so few images that some correlations are 1 whatever the values.
    """
    bases = [_main_directions(values, variance) for values in np.moveaxis(maps, 1, 0)]
    directions = 2 * max(basis.shape[1] for basis in bases)
    if directions > len(maps) - 1:
        raise UserError(
            f"SVCCA of {directions} directions needs more than {directions} images, not "
            f"{len(maps)}. Raise --num-images."
        )
    table = np.full((len(bases),) * 2, np.nan)
    for i, first in enumerate(bases):
        for j, second in enumerate(bases):
            if first.size and second.size:
                cosines = np.linalg.svd(first.T @ second, compute_uv=False)
                table[i, j] = np.clip(cosines, 0, 1).mean()
    return table


def similarity(first: Matrix, second: Matrix) -> float:
    """Debiased linear CKA of two layers' responses to the same observations.

    The estimate of HSIC is unbiased (Song et al. 2012, equation 5; Kornblith et al. 2019, Nguyen et
    al. 2021), so unrelated layers have 0 on average however many filters they have.

    Args:
        first: (observations, filters), at least 4 observations.
        second: (observations, other filters)

    Returns:
        At most 1; NaN where a layer is constant.
    """
    x, y = first - first.mean(axis=0), second - second.mean(axis=0)

    def hsic(a: Matrix, b: Matrix) -> float:
        """Of two kernels a a^T and b b^T without their diagonals; centred, their rows sum to 0."""
        n, k, m = len(a), (a**2).sum(axis=1), (b**2).sum(axis=1)
        together = ((a.T @ b) ** 2).sum() - k @ m
        return together + k.sum() * m.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * (k @ m)

    scale = hsic(x, x) * hsic(y, y)
    return float(hsic(x, y) / math.sqrt(scale)) if scale > 0 else math.nan


def first_filters(network: Network) -> Matrix | None:
    """(filters, channels, height, width), the weights of the conv that reads the image."""
    modules = dict(named_modules(network.model))
    for name in network.stems:
        weight = modules[name].weight
        if weight.dim() == 4:
            array = weight.detach().double().cpu().numpy()
            bgr = network.cfg.INPUT.FORMAT == "BGR" and array.shape[1] == 3
            return array[:, ::-1] if bgr else array
    return None


def contributions(network: Network) -> dict[str, list[float]]:
    """What the mean training loss rises by when one filter is zeroed, by layer.

    The paper's greedy oracle, measured on training batches, as the criterion ``oracle`` does; one
    forward pass a filter and batch.

    Raises:
        UserError: the data are not there.
    """
    cfg = network.cfg.clone()
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = 0
    trainer = trainer_for(cfg)
    trainer.check_to_train(cfg)
    batches = own_batches(trainer.build_train_loader(cfg), max(cfg.SEED, 0))
    network.model.train()
    try:
        with torch.no_grad(), unchanged(network.model):
            generator = torch.Generator().manual_seed(0)
            bar = partial(tqdm, desc="Zeroing", unit="filter", disable=None)  # on a terminal
            data = Data(network.model, batches, training_loss, generator, bar)
            scores = oracle(network.layers, data)
    finally:
        network.model.eval()
    return {name: (-score / BATCHES).tolist() for name, score in scores.items()}
