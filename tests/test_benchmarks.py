"""The benchmarks run, and what they print says what they measured."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import site
import subprocess
import sys
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = ROOT / "benchmarks"


def benchmark(name):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_this_cpu(output, *options):
    command = [sys.executable, BENCHMARKS / "device.py", "-o", output, "--device", "cpu", *options]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_device_is_rehearsed_on_a_cpu(tmp_path):
    names = ["changes-resnet50", "steps-c3_32-amp"]
    printed = on_this_cpu(tmp_path, "--minutes", "5", "--only", *names)
    assert printed.endswith(f"Results: {tmp_path}\nLeft out: nothing\nFailed: nothing\n")
    found, ratios = (json.loads((tmp_path / f"{name}.json").read_text()) for name in names)
    for what in ("step", "drop", "return", "taking out", "putting back", "measurement of auto"):
        steps = found[what]["seconds"] / found["step"]["seconds"] * found["step"]["steps"]
        assert found[what]["steps"] == pytest.approx(steps, rel=0.05, abs=0.01)
        assert found[what]["seconds"] > 0
    assert {"full", "masked", "smaller"} <= ratios.keys()
    assert json.loads((tmp_path / "environment.json").read_text())["size"] == "small"


def test_measuring_ends_when_the_time_is_up(tmp_path):
    """Within a second not even PyTorch is imported."""
    printed = on_this_cpu(tmp_path, "--minutes", "0.01")
    assert f"Left out: {' '.join(benchmark('device').PLAN)}\nFailed: nothing" in printed
    assert not list(tmp_path.glob("*.json"))


def test_measuring_goes_on_after_a_process_that_died(tmp_path, monkeypatch):
    device = benchmark("device")
    asked = []

    def worker(names, args, until):
        asked.append(list(names))
        (tmp_path / "environment.json").touch()
        if len(asked) == 1:
            (tmp_path / "steps-resnet50.json").write_text("{}")
            return -9
        for name in names:
            error = {"error": "made up"} if name == "whole-c3_32" else {}
            (tmp_path / f"{name}.json").write_text(json.dumps(error))
            if error:
                return 1
        return 0

    monkeypatch.setattr(device, "run_worker", worker)
    only = ["steps-resnet50", "steps-resnet20", "whole-c3_32", "loading-demo"]
    failed = device.measure(Namespace(output=tmp_path, only=only), until=1e12)
    assert asked == [only, only[2:], only[3:]]
    assert failed == only[1:3]
    error = json.loads((tmp_path / "steps-resnet20.json").read_text())["error"]
    assert error == "the process ended with status -9"


def of_three_convs():
    convs = [nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 16, 3), nn.SiLU(), nn.Conv2d(16, 4, 3)]
    return nn.Sequential(*convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()), torch.randn(2, 3, 16, 16)


def of_transformer():
    encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    patches = [nn.Conv2d(3, 8, 4, stride=4), nn.Flatten(2), nn.Linear(16, 8), encoder]
    return nn.Sequential(*patches, nn.Linear(8, 4)), torch.randn(2, 3, 16, 16)


def broken():
    raise ValueError("made up")


def killed():
    os.kill(os.getpid(), signal.SIGKILL)


def test_list_of_models_goes_on_after_any_model():
    models = benchmark("models")
    found = models.check_apart(of_three_convs)
    assert (found["result"], found["linear"], found["removed"]) == ("exact", False, 1)
    assert models.check_apart(broken) == {"result": "exception", "reason": "ValueError: made up"}
    assert models.check_apart(killed) == {"result": "stopped", "reason": "status -9"}
    assert models.check_apart(of_transformer)["linear"]


@pytest.mark.slow
def test_packed_wheels_are_all_that_is_missing(tmp_path):
    """Detectron2 and what only it needs come from the wheels, the rest is linked from here."""
    packed = {"detectron2", "fvcore", "iopath", "yacs", "omegaconf", "hydra", "antlr4", "termcolor"}
    there = "numpy scipy matplotlib pillow opencv-python-headless pycocotools tensorboard tabulate"
    others = "tqdm packaging cloudpickle setuptools pytest pytest-xdist hypothesis pyyaml grpcio"
    more = "protobuf portalocker contourpy fonttools kiwisolver werkzeug markdown absl-py pluggy"
    names = tmp_path / "there.txt"
    names.write_text("\n".join(f"{there} {others} {more}".split()))
    command = [sys.executable, BENCHMARKS / "pack_wheels.py", "-o", tmp_path / "wheels"]
    done = subprocess.run([*command, "--there", names], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheels = sorted((tmp_path / "wheels").iterdir())
    size = sum(wheel.stat().st_size for wheel in wheels) / 2**20
    assert f"{size:8.2f} MiB  {len(wheels)} wheels" in done.stdout
    for wheel in wheels:
        zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    (tmp_path / "others").mkdir()
    for path in Path(site.getsitepackages()[0]).iterdir():
        if path.name.partition("-")[0].partition(".")[0] not in packed:
            (tmp_path / "others" / path.name).symlink_to(path)
    use = "import speed, device_jobs, sys; print(*(sys.modules[n].__file__ for n in sys.argv[1:]))"
    folders = [ROOT, BENCHMARKS, tmp_path / "site", tmp_path / "others"]
    where = {"PYTHONPATH": os.pathsep.join(map(str, folders))}
    names = ["detectron2", "fvcore", "iopath", "yacs", "repr_det"]
    command = [sys.executable, "-S", "-W", "ignore", "-c", use, *names]
    done = subprocess.run(command, env={**os.environ, **where}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *from_wheels, own = done.stdout.split()
    assert all(path.startswith(str(tmp_path / "site")) for path in from_wheels)
    assert own.startswith(str(ROOT))


@pytest.mark.slow
def test_quick_size():
    recorded = {path: path.read_bytes() for path in BENCHMARKS.iterdir() if path.is_file()}
    parts = ["--parts", "steps", "whole", "kept", "ranking", "growth", "loading", "memory"]
    command = [sys.executable, BENCHMARKS / "bench.py", "quick", *parts]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    line = next(line for line in printed.splitlines() if line.startswith("| C^3(32), 64"))
    *_, multiply_adds = (float(cell.split()[0]) for cell in line.split("|")[2:-1])
    # The stem is whole; 19 of the other 64 filters are gone, and what read them.
    assert 0.7 <= multiply_adds <= 0.8
    cells = r" +([\d.]+) \((\d+)\) \|" * 4 + r" +([\d.]+) \|"
    memory = re.search(r"peak memory.*\n.*\n\| C[^|]*\|" + cells, printed)
    *variants, pruned = map(float, memory.groups())
    tensors, processes = variants[::2], variants[1::2]
    # At least the images and what the first conv makes of them, forward and backward.
    assert all(16 < peak <= tensors[0] + pruned + 0.2 for peak in tensors)
    assert all(100 < peak < 4000 for peak in processes)
    assert re.search(r"memory kept.*\n.*\n\| on a CPU +\| +[\d.]+ \(", printed)
    # Only the full size records.
    assert all(path.read_bytes() == before for path, before in recorded.items())
