"""Loads a trained model that a command line names by a run, or by a config and weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from detectron2.config import CfgNode
from torch import nn

from repr_det.engine.checkpoint import SafeCheckpointer, has_run, last_checkpoint
from repr_det.engine.command_line import merge_config_file, merge_overrides
from repr_det.engine.device import check_device
from repr_det.engine.trainer import RePrTrainer, check_weights
from repr_det.errors import UserError


def merge_trained(
    cfg: CfgNode, run: Path | None, config_file: str | None, overrides: Sequence[str]
) -> None:
    """Merge the description of a trained model into a config, in place.

    Args:
        cfg: defaults with the keys of the model's task.
        run: ``OUTPUT_DIR`` of a run. Its config is used, see :func:`merge_run_config`, with the
            weights of its last checkpoint.
        config_file: a config file or a bare name in ``configs/``, where ``run`` is None.
        overrides: KEY, VALUE, ...; they override both.

    Raises:
        UserError: no such run or config file, a config that cannot be read, or overrides that it
            does not accept.
    """
    if run is None:
        merge_config_file(cfg, config_file or "")
    else:
        config = run / "config.yaml"
        if not config.is_file() or not has_run(run):
            raise UserError(
                f"{run} holds no run ({config.name} and last_checkpoint). Pass the OUTPUT_DIR of "
                "one, or a config file and MODEL.WEIGHTS."
            )
        merge_run_config(cfg, config)
        cfg.MODEL.WEIGHTS = str(last_checkpoint(run))
    merge_overrides(cfg, overrides)


def merge_run_config(cfg: CfgNode, path: Path) -> None:
    """Merge the ``config.yaml`` of a run, in place.

    The run may come from another machine, so ``MODEL.DEVICE`` does not change. A trainer of one's
    own may have keys of its own.

    Raises:
        UserError: it cannot be read.
    """
    device = cfg.MODEL.DEVICE
    cfg.set_new_allowed(True)
    merge_config_file(cfg, str(path), trusted=False)
    cfg.set_new_allowed(False)
    cfg.MODEL.DEVICE = device


def load_trained(cfg: CfgNode) -> nn.Module:
    """Build the model of a config and load ``MODEL.WEIGHTS``, whole, without executing code.

    Detectron2's and Caffe2's pickles (``.pkl``) can execute code.

    Returns:
        The model on ``MODEL.DEVICE``, in evaluation mode.

    Raises:
        UserError: there are no weights, they cannot be loaded or are of another architecture, or
            there is no such device.
    """
    check_device(cfg.MODEL.DEVICE)
    check_weights(cfg.MODEL.WEIGHTS, required=True)
    model = RePrTrainer.build_model(cfg)
    SafeCheckpointer(model).load_whole(cfg.MODEL.WEIGHTS)
    return model.eval()
