#!/usr/bin/env python3
"""The same program as `repr-det export-backbone`."""

import sys

from repr_det.cli import main

if __name__ == "__main__":
    sys.exit(main(["export-backbone", *sys.argv[1:]]))
