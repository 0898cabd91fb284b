"""RePr: training with filter dropping and orthogonal re-initialisation, for Detectron2.

Names are imported when they are first used, so that ``import repr_det`` works before torch and
Detectron2 are installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from repr_det.engine.config import add_repr_config
    from repr_det.engine.hook import RePrHook
    from repr_det.method.controller import RePr
    from repr_det.method.reinit import Reinit
    from repr_det.method.schedule import Phase, RePrSchedule

__version__ = "0.2.0"

__all__ = ["Phase", "RePr", "RePrHook", "RePrSchedule", "Reinit", "__version__", "add_repr_config"]

_MODULES = {
    "Phase": "repr_det.method.schedule",
    "RePr": "repr_det.method.controller",
    "RePrHook": "repr_det.engine.hook",
    "RePrSchedule": "repr_det.method.schedule",
    "Reinit": "repr_det.method.reinit",
    "add_repr_config": "repr_det.engine.config",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(_MODULES[name])
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] not in {"detectron2", "fvcore", "iopath"}:
            raise
        raise ImportError(
            f"repr_det.{name} needs Detectron2, which is not installed. "
            "Run `repr-det install-detectron2`."
        ) from error
    return getattr(module, name)
