"""What is installed is what the checkout holds, and what the code imports is declared."""

import ast
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import repr_det

ROOT = Path(__file__).parents[1]
# Where they differ from the distribution's name.
IMPORTED_NAMES = {
    "Jinja2": "jinja2",
    "Pillow": "PIL",
    "PyYAML": "yaml",
    "faster-coco-eval": "faster_coco_eval",
    "opencv-python": "cv2",
    "pytest-xdist": "xdist",
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of this checkout, built from a copy so that nothing is left behind here."""
    source = tmp_path_factory.mktemp("source")
    for name in ("setup.py", "pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(ROOT / name, source)
    for name in ("repr_det", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps"]
    command += ["--no-build-isolation", "--wheel-dir", source / "dist", source]
    # Without the checkout on its path, pip would otherwise take it for an installed repr-det.
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    subprocess.run(command, check=True, cwd=source, env=environment)
    with zipfile.ZipFile(next((source / "dist").glob("*.whl"))) as archive:
        yield archive


def metadata(wheel):
    name = next(n for n in wheel.namelist() if n.endswith(".dist-info/METADATA"))
    return wheel.read(name).decode()


def required(wheel):
    """Names of the distributions that the wheel requires: {extra or None: names}."""
    names = {}
    for line in re.findall(r"^Requires-Dist: (.*)$", metadata(wheel), re.MULTILINE):
        extra = re.search(r'extra == "(\w+)"', line)
        names.setdefault(extra and extra[1], set()).add(re.match(r"[\w.-]+", line)[0])
    return names


def python_files(*folders):
    return [path for folder in folders for path in (ROOT / folder).rglob("*.py")]


def test_wheel_holds_every_module_of_the_package(wheel):
    in_checkout = {path.relative_to(ROOT).as_posix() for path in python_files("repr_det")}
    in_wheel = {name for name in wheel.namelist() if name.endswith(".py")}
    assert in_wheel == in_checkout


def test_wheel_holds_every_config(wheel):
    configs = {path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.yaml")}
    assert configs
    in_wheel = {name for name in wheel.namelist() if name.endswith(".yaml")}
    assert in_wheel == {f"repr_det/{path.as_posix()}" for path in configs}
    for path in configs:
        assert wheel.read(f"repr_det/{path.as_posix()}") == (ROOT / path).read_bytes()


def test_wheel_holds_the_template_of_the_report(wheel):
    name = "repr_det/report/templates/report.html"
    assert wheel.read(name) == (ROOT / name).read_bytes()


def test_installed_wheel_finds_its_configs(wheel, tmp_path):
    """config_path() in the unpacked wheel, far from the checkout, gives its own file."""
    wheel.extractall(tmp_path)
    code = "from repr_det.engine.config import config_path; print(config_path({!r}))"
    config = next((ROOT / "configs").glob("*.yaml")).name
    result = subprocess.run(
        [sys.executable, "-c", code.format(config)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == str(tmp_path / "repr_det" / "configs" / config)


def test_wheel_carries_name_version_and_licence(wheel):
    assert re.search(r"^Name: repr-det$", metadata(wheel), re.MULTILINE)
    assert f"\nVersion: {repr_det.__version__}\n" in metadata(wheel)
    (licence,) = [name for name in wheel.namelist() if name.endswith("/LICENSE")]
    assert wheel.read(licence) == (ROOT / "LICENSE").read_bytes()


def test_readme_is_the_description(wheel):
    assert metadata(wheel).partition("\n\n")[2] == (ROOT / "README.md").read_text()


def test_wheel_has_the_program_and_its_types(wheel):
    (name,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "repr-det = repr_det.cli:main" in wheel.read(name).decode()
    assert "repr_det/py.typed" in wheel.namelist()


def test_version_stands_in_one_place_and_in_the_citation():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == repr_det.__version__
    assert f"\n## {repr_det.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()


def test_imports_of_other_packages_are_declared(wheel):
    imported = set()
    for path in python_files("repr_det", "tools"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                imported.add(node.module.split(".")[0])
    declared = {IMPORTED_NAMES.get(name, name) for name in required(wheel)[None]}
    # tools/reproduce.py starts what is not in the wheel.
    ours = {"repr_det", "detectron2", "experiments"}
    assert imported <= sys.stdlib_module_names | ours | declared


def make(*arguments, **environment):
    return subprocess.run(
        ["make", "--directory", ROOT, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )


def test_make_says_what_an_existing_environment_lacks(tmp_path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path], check=True)
    result = make("check", f"PYTHON={tmp_path}/bin/python")
    assert result.returncode != 0
    sentence = result.stderr.splitlines()[0]
    assert sentence.startswith(f"{tmp_path}/bin/python cannot import torch, detectron2")
    assert sentence.endswith(".")


@pytest.mark.parametrize("target", ["demo", "test", "test-slow", "test-all", "lint", "docs"])
def test_make_installs_nothing_into_an_existing_environment(target):
    plan = make("--dry-run", target, "PYTHON=python3").stdout
    assert "find_spec" in plan
    assert "pip install" not in plan and "-m venv" not in plan


def test_the_package_does_not_import_experiments():
    assert not [p for p in python_files("repr_det") if re.search(r"\bexperiments\b", p.read_text())]


@pytest.mark.parametrize(
    ("room", "above"),
    [
        ("method", "engine|detection|classification|tasks|report|cli"),
        ("engine", "detection|classification|tasks|report|cli"),
        ("detection", "classification|tasks|report|cli"),
        ("classification", "detection|tasks|report|cli"),
        ("report", "cli"),
    ],
)
def test_a_room_imports_none_above_it(room, above):
    found = rf"^\s*(from|import) repr_det\.({above})\b"
    files = python_files(f"repr_det/{room}")
    assert files
    assert not [p for p in files if re.search(found, p.read_text(), re.MULTILINE)]


def test_no_test_module_imports_another():
    """What several of them need is in modules that hold no tests."""
    found = r"^\s*(from tests\S* import test_|from tests\.\S*\btest_|import tests\.\S*\btest_)"
    assert not [p for p in python_files("tests") if re.search(found, p.read_text(), re.MULTILINE)]
