"""The method works where nothing but PyTorch is installed."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import repr_det.method


def imported(path):
    """Top-level packages that a module imports anywhere in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.module.startswith("repr_det"):
                assert node.module.startswith("repr_det.method"), f"{path}: {node.module}"
            yield node.module.partition(".")[0]


def test_torch_and_the_standard_library_alone():
    modules = list(Path(repr_det.method.__file__).parent.glob("*.py"))
    assert len(modules) > 8
    for path in modules:
        assert set(imported(path)) <= {"torch", "repr_det", *sys.stdlib_module_names}, path
