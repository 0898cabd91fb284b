#!/usr/bin/env python3
"""The same program as `repr-det report`."""

import sys

from repr_det.cli import main

if __name__ == "__main__":
    sys.exit(main(["report", *sys.argv[1:]]))
