"""The method works where nothing but PyTorch is installed."""

from __future__ import annotations

import ast
import subprocess
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
                within = node.module.startswith(("repr_det.method", "repr_det.errors"))
                assert within, f"{path}: {node.module}"
            yield node.module.partition(".")[0]


def test_torch_and_the_standard_library_alone():
    modules = list(Path(repr_det.method.__file__).parent.glob("*.py"))
    assert len(modules) > 8
    for path in modules:
        assert set(imported(path)) <= {"torch", "repr_det", *sys.stdlib_module_names}, path


def test_without_detectron2():
    """The method can be used, and what needs Detectron2 says so."""
    code = """
import sys
sys.modules["detectron2"] = None
import torch
from repr_det import RePr, RePrSchedule
model = torch.nn.Sequential(*(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 8, 3)))
model.append(torch.nn.Conv2d(8, 2, 3))
method = RePr(model, torch.optim.SGD(model.parameters(), 0.1), RePrSchedule(1, 1, 1))
assert method.step(1)[0].kind == "drop"
try:
    from repr_det import RePrHook
except ImportError as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Detectron2" in done.stdout and "install" in done.stdout
