#!/usr/bin/env python3
"""The same program as `repr-det predict`."""

import sys

from repr_det.cli import main

if __name__ == "__main__":
    sys.exit(main(["predict", *sys.argv[1:]]))
