"""RePr: training with filter dropping and orthogonal re-initialisation, for Detectron2."""

from __future__ import annotations

from typing import Any

from repr_det.method.controller import RePr
from repr_det.method.reinit import Reinit
from repr_det.method.schedule import Phase, RePrSchedule

__all__ = ["Phase", "RePr", "RePrHook", "RePrSchedule", "Reinit", "add_repr_config"]

_NEEDS_DETECTRON2 = {
    "RePrHook": "repr_det.engine.hook",
    "add_repr_config": "repr_det.engine.config",
}


def __getattr__(name: str) -> Any:
    if name not in _NEEDS_DETECTRON2:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    try:
        module = importlib.import_module(_NEEDS_DETECTRON2[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in {"detectron2", "fvcore", "iopath"}:
            raise
        raise ImportError(
            f"repr_det.{name} needs Detectron2, which is not installed; "
            f"run tools/install_detectron2.py or see the README."
        ) from error
    return getattr(module, name)
