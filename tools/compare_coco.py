#!/usr/bin/env python3
"""The same program as `repr-det compare`."""

import sys

from repr_det.cli import main

if __name__ == "__main__":
    sys.exit(main(["compare", *sys.argv[1:]]))
