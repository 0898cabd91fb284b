"""``python -m repr_det`` is the same program as ``repr-det``."""

from __future__ import annotations

import sys

from repr_det.cli import main

if __name__ == "__main__":
    sys.exit(main())
