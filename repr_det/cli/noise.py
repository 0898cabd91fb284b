"""Warnings of other packages that no user of the program can act on."""

from __future__ import annotations

import logging
import warnings

_WARNINGS = (
    # (where it comes from, how it starts)
    (r"detectron2\.", "pkg_resources is deprecated"),
    (r"detectron2\.", ".* is deprecated"),
    (r"torch\.jit", ".* is deprecated"),
    (r"torch\.functional", "torch.meshgrid: in an upcoming release"),
)
_LOGGERS = (
    "torch.fx._symbolic_trace",  # is_fx_tracing, which Detectron2 calls, will mean something else
    "torch.utils.cpp_extension",  # "No CUDA runtime is found", of Detectron2's list of versions
)


def silence() -> None:
    """Silence them, each by where it comes from, in this process and in those it starts."""
    for module, message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message, module=module)
    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
