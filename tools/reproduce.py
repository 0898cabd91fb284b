#!/usr/bin/env python3
"""The tables of the paper and our own studies: ``python -m experiments`` by its earlier name."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from experiments.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
