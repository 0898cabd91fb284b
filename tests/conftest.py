"""Settings of every test."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from detectron2.utils.logger import setup_logger

# The networks of the tests are small: more threads would only wait for each other, also those of
# the programs that tests start.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("auto", "cpu", "cuda"),
        default="cpu",
        help="where tests marked gpu run; auto is a GPU where there is one",
    )
    parser.addoption("--failures", metavar="FILE", help="file for the names of failed tests")


def pytest_configure(config: pytest.Config) -> None:
    # Once, and not in every process of pytest-xdist.
    if (file := config.getoption("--failures")) and not hasattr(config, "workerinput"):
        config.pluginmanager.register(Failures(Path(file)))
    device = config.getoption("--device")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    # Before test modules are imported, which read it from tests.device.
    os.environ["REPR_DET_TEST_DEVICE"] = device
    if device == "cuda":
        # Tolerances are those of float32 and float64, and resumed runs repeat to the bit.
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


class Failures:
    """Names of failed tests: in a file as they fail, in case the run is stopped, and at the end."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._names: list[str] = []
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")

    def pytest_runtest_logreport(self, report: pytest.TestReport | pytest.CollectReport) -> None:
        if report.failed and report.nodeid not in self._names:
            self._names.append(report.nodeid)
            self._file.write_text("".join(f"{name}\n" for name in self._names))

    pytest_collectreport = pytest_runtest_logreport

    def pytest_unconfigure(self) -> None:
        """After pytest's own summary, so that the end of the output holds them."""
        device = os.environ["REPR_DET_TEST_DEVICE"]
        print("", f"{len(self._names)} failures on {device}", *self._names, sep="\n")


@pytest.fixture(autouse=True, scope="module")
def older_objects_are_no_garbage() -> None:
    """Every RePr that is made collects garbage, which would look at all that was ever imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def algorithms_as_before() -> Iterator[None]:
    """A deterministic run makes its whole process deterministic, and so the tests after it."""
    before = torch.are_deterministic_algorithms_enabled()
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture(autouse=True)
def loggers_as_imported() -> None:
    """Detectron2 sets up logging once a process, and then logs to the output of a test before."""
    setup_logger.cache_clear()
    for logger in map(logging.getLogger, ("detectron2", "fvcore")):
        for handler in logger.handlers[:]:
            logger.removeHandler(handler)
            handler.close()
        logger.setLevel(logging.NOTSET)
        logger.propagate = True
