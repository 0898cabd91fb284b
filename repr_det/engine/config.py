"""RePr's config keys, and where configs are found."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from repr_det.engine.solver import add_solver_config
from repr_det.errors import UserError
from repr_det.method import reinit


def add_repr_config(cfg: CfgNode) -> None:
    """Add ``cfg.REPR`` to a Detectron2 config, in place."""
    cfg.REPR = CfgNode()
    # Train with RePr. False is standard training with the same config.
    cfg.REPR.ENABLED = False
    # Unit of S1, S2 and WARMUP: "iteration", or "epoch" for classification.
    cfg.REPR.UNIT = "iteration"
    # Length of the full phase in a cycle.
    cfg.REPR.S1 = 0
    # Length of the sub-network phase in a cycle.
    cfg.REPR.S2 = 0
    # Number of cycles. N * (S1 + S2) must be smaller than SOLVER.MAX_ITER, and should end before
    # the learning rate first falls: a filter that returns later has too low a rate to learn.
    cfg.REPR.N = 3
    # Share of the filters that a drop takes, of all layers that take part: the paper's p.
    cfg.REPR.PRUNE_RATIO = 0.3
    # What ranks filters: ortho (the paper's score divided by its expected value for random filters
    # of the same size), ortho_paper (the score as printed), ortho_authors (that of the authors'
    # code), weights, random, or with data activations, apoz, gradients, taylor, hessian, oracle.
    cfg.REPR.CRITERION = "ortho"
    # Shell-style patterns of conv layers that take part. A pattern also matches everything below
    # it. Empty: the backbone with its FPN, or without a backbone all layers but the prediction
    # layers. Stems and gates (squeeze-and-excitation) take part only if named, depthwise convs
    # never. A pattern that matches no conv takes linear layers: roi_heads.box_head.fc1.
    cfg.REPR.INCLUDE = []
    # Patterns of layers that take no part. They win over INCLUDE.
    cfg.REPR.EXCLUDE = []
    # Whether linear layers take part, too, where their units are hidden: those of box heads and of
    # the MLPs in transformers.
    cfg.REPR.LINEAR = False
    # Share of one layer that a drop may take.
    cfg.REPR.MAX_LAYER_RATIO = 0.5
    # Whether pruned filters are taken out of the network during S2: "on", "off" (they stay as
    # zeros), or "auto": time both at the first drop and remove them if that pays. It means off for
    # example with DETERMINISTIC; docs/performance.md says where else.
    cfg.REPR.COMPACT = "auto"
    # Length over which the learning rate climbs back after each return, in the unit of S1.
    cfg.REPR.WARMUP = 0
    # Seed of the new filters and of the random criterion.
    cfg.REPR.SEED = 0

    # What a returned filter starts with; see repr_det.method.reinit.Reinit.
    defaults = reinit.Reinit()
    cfg.REPR.REINIT = CfgNode()
    # "orthogonal" to the survivors and to the dropped filters, as in the paper, or "previous" (ours
    # and not the paper's): filters return as they were at the drop. The keys below do not apply
    # then, and must have their defaults.
    cfg.REPR.REINIT.DIRECTION = defaults.direction
    # Length of a new filter: "survivors" (their mean) or "previous" (its own before the drop).
    cfg.REPR.REINIT.NORM = defaults.norm
    # Factor on that length.
    cfg.REPR.REINIT.SCALE = defaults.scale
    # Scale of the norm: "survivors", "one" or "previous". Frozen norms keep theirs.
    cfg.REPR.REINIT.GAMMA = defaults.gamma
    # Shift of the norm and bias of the conv: "zero", "survivors" or "previous". Frozen
    # norms keep theirs.
    cfg.REPR.REINIT.BETA = defaults.beta
    # Scale of the next layer's weights for a returned channel: 1 restores their values from before
    # the drop, 0 starts at zero. Those of depthwise and of frozen layers are restored unchanged.
    cfg.REPR.REINIT.OUTGOING = defaults.outgoing


def add_trainer_config(cfg: CfgNode) -> None:
    """Add the keys of training that every task reads to a Detectron2 config, in place."""
    # Make the order of samples, augmentation and every random draw a function of SEED, iteration
    # and rank, and use torch's deterministic algorithms: a run that is killed and resumed ends with
    # the same bits. SEED must be 0 or more.
    cfg.DETERMINISTIC = False
    # Precision of mixed-precision training: "auto" is float16 on a GPU and bfloat16 on a CPU.
    cfg.SOLVER.AMP.PRECISION = "auto"
    # Keep weights and images channels last in memory. Results are the same up to rounding.
    cfg.MODEL.CHANNELS_LAST = False
    # Compile the backbone of a detector, the network of a classifier, with torch.compile.
    cfg.MODEL.COMPILE = False
    # Hold out this many training images, always the same ones. To evaluate on them, set
    # DATASETS.TEST to ("X_heldout",) when training on X_train.
    cfg.DATASETS.HELD_OUT = 0
    # Share of the training images that are not held out to train on, always the same ones.
    cfg.DATASETS.TRAIN_SHARE = 1.0


def get_cfg(*additions: Callable[[CfgNode], None]) -> CfgNode:
    """Detectron2's default config with this package's keys.

    ``MODEL.DEVICE`` is the GPU where there is one, else the CPU.

    Args:
        additions: functions that add a task's own keys.
    """
    cfg = get_detectron2_cfg()
    add_repr_config(cfg)
    add_solver_config(cfg)
    add_trainer_config(cfg)
    for add in additions:
        add(cfg)
    if not torch.cuda.is_available():
        cfg.MODEL.DEVICE = "cpu"
    return cfg


def config_path(name: str) -> str:
    """Path of a config file.

    Args:
        name: a path, or the bare name of a file in ``configs/``.

    Raises:
        UserError: neither exists; lists the names in ``configs/``.
    """
    if os.path.isfile(name):
        return str(Path(name).resolve())
    package = Path(__file__).resolve().parents[1]
    # A source checkout keeps configs/ next to the package, an installed wheel inside it.
    folders = [package.parent / "configs", package / "configs"]
    for folder in folders:
        if os.path.isfile(folder / name):
            return str(folder / name)
    names = sorted({path.name for folder in folders for path in folder.glob("*.yaml")})
    twin = name.replace("_standard.yaml", ".yaml")
    if twin != name and twin in names:
        raise UserError(f"{name} is gone. Set {twin} and REPR.ENABLED False, which are the same.")
    raise UserError(
        f"Config {name!r} is neither a file nor a name in configs/; there are: {', '.join(names)}."
    )


def flat_settings(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a config by dotted key."""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            flat.update(flat_settings(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
