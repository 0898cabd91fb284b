"""Settings of Sphinx; see the Makefile's target `docs`."""

from __future__ import annotations

import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import generate  # noqa: E402

import repr_det  # noqa: E402

generate.write(HERE / "_generated")

project = "repr_det"
author = copyright = "repr_det maintainers"
version = release = repr_det.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "_generated"]
html_theme = "furo"
html_title = f"repr_det {version}"
html_static_path = ["images"]
myst_heading_anchors = 3
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "description"
