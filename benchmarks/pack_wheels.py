#!/usr/bin/env python3
"""Pack what `make test-gpu` and device.py need on a machine without a network, as wheels.

    python benchmarks/pack_wheels.py --output wheels [--there FILE] [--python-version 3.12]

FILE lists what is there already, by lines NAME==VERSION, as `python3 -m pip list --format freeze`
prints them there; without it, only PyTorch and torchvision are left out. On that machine, with this
checkout and the folder, without a compiler:

    for wheel in wheels/*.whl; do python3 -m zipfile -e $wheel site; done
    export PYTHONPATH=$PWD:$PWD/site
    python3 benchmarks/device.py --output figures
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from repr_det.cli import install_detectron2
from repr_det.errors import UserError

NEEDED = (
    *install_detectron2.DEPENDENCIES,
    "hypothesis>=6.80",
    "opencv-python-headless>=4.9",
    "pytest>=8.0",
    "pytest-xdist>=3.7",
    "scipy>=1.12",
)
"""Besides PyTorch and torchvision. OpenCV is the one without windows, whose wheel is smaller."""

PURE = ("fvcore>=0.1.5", "iopath>=0.1.9", "antlr4-python3-runtime==4.9.*")
"""Python files that the index has no wheel of; omegaconf asks for the third."""

PLATFORMS = (*(f"manylinux_2_{n}_x86_64" for n in range(28, 16, -1)), "manylinux2014_x86_64",
             "manylinux1_x86_64")  # fmt: skip


def pip(*arguments: str | Path) -> str:
    """Run pip, and return what it prints.

    Raises:
        UserError: it failed; its own message is shown before.
    """
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise UserError(f"pip {arguments[0]} failed. See its message above, and check the network.")
    return done.stdout


def missing(needed: Iterable[str], there: Iterable[str]) -> list[str]:
    """The requirements that are not met.

    Args:
        needed: requirements, as pip takes them.
        there: ``NAME==VERSION``, or ``NAME`` where any version will do.
    """
    versions = {}
    for line in filter(None, map(str.strip, there)):
        name, _, version = line.partition("==")
        versions[canonicalize_name(name)] = version

    def is_met(line: str) -> bool:
        one = Requirement(line)
        version = versions.get(canonicalize_name(one.name))
        return version is not None and (not version or one.specifier.contains(version, True))

    return [line for line in needed if not is_met(line)]


def pack(folder: Path, there: Sequence[str], target: Sequence[str]) -> None:
    """Fill a folder with wheels.

    Args:
        folder: where they go.
        there: see :func:`missing`.
        target: pip's options that say for which Python and platform.

    Raises:
        UserError: pip failed, or Detectron2's wheel is another one than was examined.
    """
    with tempfile.TemporaryDirectory() as temporary:
        original, repacked, pure = (Path(temporary, n) for n in ("original", "repacked", "pure"))
        wheel = install_detectron2.download(original)
        install_detectron2.verify(wheel)
        repacked = install_detectron2.repack(wheel, repacked)
        (folder / repacked.name).write_bytes(repacked.read_bytes())
        pip("wheel", "--quiet", "--no-deps", "--wheel-dir", pure, *PURE)
        options = [*target, "--only-binary=:all:", "--find-links", pure]
        asked = missing(NEEDED, there)
        report = pip(
            *("install", "--dry-run", "--quiet", "--ignore-installed", "--report", "-"),
            *("--target", temporary, *options, *asked),
        )
        # What these depend on is left out if it is there, in whatever version.
        out = {canonicalize_name(line.partition("==")[0].strip()) for line in there}
        out -= {canonicalize_name(Requirement(line).name) for line in asked}
        found = [one["metadata"] for one in json.loads(report)["install"]]
        wanted = [
            f"{one['name']}=={one['version']}"
            for one in found
            if canonicalize_name(one["name"]) not in out
        ]
        pip("download", "--quiet", "--no-deps", "--dest", folder, *options, *wanted)


def main() -> int:
    """Pack, and print what was packed and its size."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--there", type=Path, metavar="FILE", help="lists what is there already")
    parser.add_argument("--python-version", default=here, help="default: %(default)s")
    parser.add_argument("--platform", nargs="+", default=PLATFORMS, help="default: Linux, x86-64")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    if any(args.output.iterdir()):
        parser.error(f"{args.output} is not empty. Set another --output.")
    there = ["torch", "torchvision", *(args.there.read_text().splitlines() if args.there else ())]
    target = ["--python-version", args.python_version, "--implementation", "cp"]
    for platform in args.platform:
        target += ["--platform", platform]
    try:
        pack(args.output, there, target)
    except UserError as error:
        parser.error(str(error))
    wheels = sorted(args.output.glob("*.whl"))
    for wheel in wheels:
        print(f"{wheel.stat().st_size / 2**20:8.2f} MiB  {wheel.name}")
    total = sum(wheel.stat().st_size for wheel in wheels)
    print(f"{total / 2**20:8.2f} MiB  {len(wheels)} wheels in {args.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
