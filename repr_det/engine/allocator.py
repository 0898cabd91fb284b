"""Keeps the memory that tensors free on a CPU for the next step."""

from __future__ import annotations

import ctypes

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8
"""Names of glibc's ``malloc.h``."""


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory, for this process, from now on.

    By default glibc returns large blocks to the kernel as soon as they are free. The next training
    step gets them again, zeroed page by page. The memory that is kept is at most the peak of the
    process, apart from gaps between blocks.

    Returns:
        Whether it could be set: False with another C library.
    """
    try:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    except (OSError, TypeError):  # Windows
        return False
    # One heap for all threads, since memory kept in one heap cannot be used from another.
    options = {_M_MMAP_MAX: 0, _M_TRIM_THRESHOLD: -1, _M_ARENA_MAX: 1}
    return bool(mallopt) and all(mallopt(option, value) for option, value in options.items())  # type: ignore[misc]
