"""RePr's config keys, and where configs are found."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.config import get_cfg as get_detectron2_cfg

from repr_det.engine.solver import add_solver_config
from repr_det.errors import UserError
from repr_det.method import reinit


def add_repr_config(cfg: CfgNode) -> None:
    """Add ``cfg.REPR`` to a Detectron2 config, in place."""
    cfg.REPR = CfgNode()
    # Train with RePr; False is standard training of the same config.
    cfg.REPR.ENABLED = False
    # Unit of S1, S2 and WARMUP: "iteration", or "epoch" where the task knows its number of images.
    cfg.REPR.UNIT = "iteration"
    # Length of the full network's phase in a cycle.
    cfg.REPR.S1 = 0
    # Length of the sub-network's phase in a cycle.
    cfg.REPR.S2 = 0
    # Number of cycles. N * (S1 + S2) must be smaller than SOLVER.MAX_ITER, and should end before
    # the first drop of the learning rate: a filter that returns later has too low a rate to learn.
    cfg.REPR.N = 3
    # Share of all filters together that a drop takes, the paper's p.
    cfg.REPR.PRUNE_RATIO = 0.3
    # What ranks filters, a name in repr_det.method.criteria.CRITERIA.
    cfg.REPR.CRITERION = "ortho"
    # Shell-style patterns of conv layers that take part; a pattern takes what lies below, too.
    # Empty: the backbone with its FPN; without a backbone all but stem and prediction layers. Gates
    # (squeeze-and-excitation) are never among them.
    cfg.REPR.INCLUDE = []
    # Patterns of layers that take no part; wins over INCLUDE.
    cfg.REPR.EXCLUDE = []
    # Share of one layer that a drop may take.
    cfg.REPR.MAX_LAYER_RATIO = 0.5
    # Take pruned filters out of the network physically during S2: "on", "off", or "auto", where a
    # measurement at the first drop shows that it is faster; with DETERMINISTIC auto means off.
    cfg.REPR.COMPACT = "auto"
    # Length, in the unit of S1, over which the learning rate climbs back after each return.
    cfg.REPR.WARMUP = 0
    # Seed of the new filters and of the random criterion.
    cfg.REPR.SEED = 0

    # What a returned filter starts with; see repr_det.method.reinit.Reinit.
    defaults = reinit.Reinit()
    cfg.REPR.REINIT = CfgNode()
    # "orthogonal" to survivors and to the dropped filters, as in the paper, or "previous", which is
    # ours: filters return as they were at the drop, and the keys below keep their defaults.
    cfg.REPR.REINIT.DIRECTION = defaults.direction
    # Length of a new filter: "survivors" (their mean) or "previous" (its own before the drop).
    cfg.REPR.REINIT.NORM = defaults.norm
    # Factor on that length.
    cfg.REPR.REINIT.SCALE = defaults.scale
    # Scale of the norm: "survivors", "one" or "previous". Frozen norms keep "previous".
    cfg.REPR.REINIT.GAMMA = defaults.gamma
    # Shift of the norm and bias of the conv: "zero", "survivors" or "previous".
    cfg.REPR.REINIT.BETA = defaults.beta
    # Factor on the weights that read a returned filter: 1 as they were at the drop, 0 none.
    cfg.REPR.REINIT.OUTGOING = defaults.outgoing


def _add_trainer_config(cfg: CfgNode) -> None:
    # Make sample order, augmentation and every random draw of a step a function of SEED, iteration
    # and rank, and torch's operations repeatable: a resumed run ends with the same bits.
    cfg.DETERMINISTIC = False
    # Precision of mixed-precision training: "auto" is float16 on a GPU and bfloat16 on a CPU.
    cfg.SOLVER.AMP.PRECISION = "auto"
    # Keep weights and images channels last in memory: the same numbers up to rounding.
    cfg.MODEL.CHANNELS_LAST = False
    # Compile the backbone of a detector, the network of a classifier, with torch.compile.
    cfg.MODEL.COMPILE = False
    # So many images are taken out of the training set, always the same ones. DATASETS.TEST names
    # them by the training set's name with "_heldout" in place of "_train".
    cfg.DATASETS.HELD_OUT = 0
    # Share of the other training images to train on, always the same ones.
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
    _add_trainer_config(cfg)
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
    if Path(name).is_file():
        return str(Path(name).resolve())
    package = Path(__file__).resolve().parents[1]
    # A source checkout keeps configs/ beside the package, an installed wheel inside it.
    folders = [package.parent / "configs", package / "configs"]
    for folder in folders:
        if (folder / name).is_file():
            return str(folder / name)
    names = sorted({path.name for folder in folders for path in folder.glob("*.yaml")})
    raise UserError(
        f"Config {name!r} is neither a file nor a name in configs/; there are: {', '.join(names)}."
    )
