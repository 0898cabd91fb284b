"""Install Detectron2 from the package index, where its official ways are out of reach.

Detectron2 has no release on the index, and building it takes its repository, a compiler and a
PyTorch that its set-up can import. Whoever has those should install it officially; this script
then finds it and does nothing.

Otherwise it takes ``sal-detectron2``, a wheel on the index whose Python files are Detectron2's own
as of 17 April 2024, checks it against a pinned SHA-256, and changes three things before installing:

* The compiled extension (for Python 3.10 only) and a stray top-level package ``tools`` go. What is
  lost is rotated boxes, deformable convolution and the fast COCO evaluation; Faster and Mask R-CNN
  with FPN use none of them.
* The tag becomes ``py3-none-any``, since only Python files are left.
* The dependencies become the list below. The wheel's own asks for ``numpy<2`` and ``black``, which
  Detectron2 works without, and leaves out ``fvcore`` and ``iopath``, which it needs.

pip resolves that list before it installs anything, so the result is all or nothing.
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


def run_module(*arguments: str | Path, or_exit: str) -> None:
    """Run ``python -m ARGUMENTS``; if it fails, exit with the sentence ``or_exit``.

    Errors of the module itself are shown as they come, before that sentence.
    """
    command = [sys.executable, "-m", *map(str, arguments)]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit(or_exit)


def download(folder: Path) -> Path:
    """Fetch the pinned wheel into ``folder``; its tag would not match most interpreters."""
    run_module(
        *("pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", "--dest", folder),
        *("--python-version=3.10", "--implementation=cp", "--abi=none", "--platform=any"),
        f"sal-detectron2=={VERSION}",
        or_exit=f"sal-detectron2 {VERSION} could not be downloaded: check the network and pip's "
        "index, or fetch the wheel elsewhere and hand it over with --wheel.",
    )
    return next(folder.glob("*.whl"))


def verify(wheel: Path) -> None:
    """Exit unless the file is, byte for byte, the wheel that was examined."""
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if found != SHA256:
        sys.exit(
            f"{wheel} has SHA-256 {found} where {SHA256} is expected: it is damaged or another "
            "file, so nothing was installed; delete it and download it again."
        )


def repack(wheel: Path, folder: Path) -> Path:
    """Write the changed wheel (see the module's docstring) into ``folder`` and return its path."""
    failure = f"{wheel} could not be repacked with the `wheel` tool; see its message above."
    run_module("wheel", "unpack", "--dest", folder, wheel, or_exit=failure)
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

    # `pack` writes RECORD anew and takes the file name's tag from WHEEL.
    run_module("wheel", "pack", "--dest-dir", folder, root, or_exit=failure)
    return next(folder.glob("*.whl"))


def main() -> None:
    """Install Detectron2 unless it is there; every failure is one sentence and exit status 1."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--wheel", type=Path, help="use this downloaded wheel, not the index")
    arguments = parser.parse_args()

    if importlib.util.find_spec("detectron2"):
        if error := python_error(USE_DETECTRON2):
            sys.exit(
                f"Detectron2 is installed but does not work ({error}): repair or uninstall it, "
                "then run this again."
            )
        print("Detectron2 is already installed: nothing to do.")
        return

    if error := python_error("import torch, torchvision"):
        sys.exit(
            "Detectron2 needs PyTorch and a torchvision of the matching release, which cannot be "
            f"imported ({error}): install both first, with pip install torch torchvision."
        )

    with tempfile.TemporaryDirectory() as temporary:
        original, repacked = Path(temporary, "original"), Path(temporary, "repacked")
        wheel = arguments.wheel or download(original)
        if not wheel.is_file():
            sys.exit(f"{wheel} does not exist: give --wheel the path of the downloaded wheel.")
        verify(wheel)
        print(
            "Installing Detectron2 without its compiled extension, and what it depends on ...",
            flush=True,
        )
        failure = "pip could not install {}; see its message above and run this again."
        run_module("pip", "install", "--quiet", "wheel>=0.40", or_exit=failure.format("`wheel`"))
        wheel = repack(wheel, repacked)
        run_module("pip", "install", "--quiet", wheel, or_exit=failure.format("Detectron2"))

    if error := python_error(USE_DETECTRON2):
        failure = f"Detectron2 was installed but does not work here ({error})"
        uninstall = ("pip", "uninstall", "--quiet", "--yes", "sal-detectron2")
        run_module(*uninstall, or_exit=f"{failure} and could not be removed: uninstall it.")
        sys.exit(f"{failure}, so it was removed again.")
    print("Detectron2 is installed.")


if __name__ == "__main__":
    main()
