#!/usr/bin/env python3
"""The same program as `repr-det install-detectron2`, for a checkout that is not installed yet."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from repr_det.cli import main

if __name__ == "__main__":
    sys.exit(main(["install-detectron2", *sys.argv[1:]]))
