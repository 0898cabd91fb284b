"""Settings of every test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

# The networks of the tests are small: more threads would only wait for each other.
torch.set_num_threads(1)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="cpu",
        help="where tests marked gpu run; auto is a GPU where there is one",
    )
    parser.addoption("--failures", metavar="FILE", help="file for the names of failed tests")


def pytest_configure(config: pytest.Config) -> None:
    device = config.getoption("--device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Before test modules are imported, which read it from tests.device.
    os.environ["REPR_DET_TEST_DEVICE"] = device
    if device == "cuda":
        # Tolerances are those of float32 and float64, and resumed runs repeat to the bit.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Write the names of failed tests last, one a line, and into a file."""
    if not (file := config.getoption("--failures")):
        return
    found = terminalreporter.stats
    names = [report.nodeid for kind in ("failed", "error") for report in found.get(kind, [])]
    Path(file).parent.mkdir(parents=True, exist_ok=True)
    Path(file).write_text("".join(f"{name}\n" for name in names))
    terminalreporter.section(f"{len(names)} failures on {os.environ['REPR_DET_TEST_DEVICE']}")
    for name in names:
        terminalreporter.write_line(name)


@pytest.fixture(autouse=True)
def algorithms_as_before() -> Iterator[None]:
    """A deterministic run makes its whole process deterministic, and so the tests after it."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)
