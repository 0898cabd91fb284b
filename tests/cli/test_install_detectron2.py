"""The script is run as its users run it: as a process, in interpreters made for the test."""

import base64
import csv
import hashlib
import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from repr_det.cli.install_detectron2 import DEPENDENCIES, repack

SCRIPT = Path(__file__).parents[2] / "tools" / "install_detectron2.py"
NO_INDEX = {
    "PIP_CONFIG_FILE": os.devnull,
    "PIP_INDEX_URL": "http://127.0.0.1:9",
    "PIP_RETRIES": "0",
}


def run(python, *arguments, **environment):
    """Run the script without whatever the tests' own environment tells Python and pip."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PIP_", "PYTHON"))}
    return subprocess.run(
        [python, SCRIPT, *arguments],
        env=inherited | environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def make_venv(folder, *options):
    subprocess.run([sys.executable, "-m", "venv", *options, folder], check=True)
    return folder / "bin" / "python"


def installed(python):
    command = "import importlib.metadata as m; print([d.name for d in m.distributions()])"
    return subprocess.run([python, "-c", command], capture_output=True, text=True).stdout


@pytest.fixture(scope="module")
def bare_python(tmp_path_factory):
    """An interpreter with pip and nothing else."""
    return make_venv(tmp_path_factory.mktemp("bare") / "venv")


@pytest.fixture
def stub_torch(tmp_path):
    """A folder for PYTHONPATH where torch and torchvision import, at no cost."""
    folder = tmp_path / "stubs"
    folder.mkdir()
    for name in ("torch", "torchvision"):
        (folder / f"{name}.py").touch()
    return str(folder)


def test_does_nothing_where_detectron2_works():
    result = run(sys.executable, **NO_INDEX)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == "Detectron2 is already installed: nothing to do.\n"


def test_leaves_a_broken_detectron2_to_its_owner(bare_python, tmp_path):
    package = tmp_path / "detectron2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN')")
    result = run(bare_python, PYTHONPATH=str(tmp_path))
    assert result.returncode == 2
    assert result.stderr == (
        "repr-det install-detectron2: error: Detectron2 is installed but does not work "
        "(ImportError: undefined symbol: _ZN). Repair or uninstall it, then run this again.\n"
    )


def test_says_that_torch_comes_first(bare_python):
    result = run(bare_python)
    assert result.returncode == 2
    assert result.stderr == (
        "repr-det install-detectron2: error: Detectron2 needs PyTorch and a torchvision of the "
        "matching release, which cannot be imported (ModuleNotFoundError: No module named "
        "'torch'). Run pip install torch torchvision first.\n"
    )


def test_says_that_torchvision_does_not_match(bare_python, stub_torch):
    Path(stub_torch, "torchvision.py").write_text("raise RuntimeError('operator nms')")
    result = run(bare_python, PYTHONPATH=stub_torch)
    assert result.returncode == 2
    assert "torchvision of the matching release" in result.stderr
    assert "RuntimeError: operator nms" in result.stderr


def test_says_that_the_download_failed(bare_python, stub_torch):
    before = installed(bare_python)
    result = run(bare_python, PYTHONPATH=stub_torch, **NO_INDEX)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1] == (
        "repr-det install-detectron2: error: sal-detectron2 0.7.2 could not be downloaded. Check "
        "the network and pip's index, or download the wheel elsewhere and set --wheel FILE."
    )
    assert "Traceback" not in result.stderr
    assert installed(bare_python) == before


def test_refuses_another_file(bare_python, stub_torch, tmp_path):
    wheel = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    wheel.write_bytes(b"something else")
    before = installed(bare_python)
    result = run(bare_python, "--wheel", wheel, PYTHONPATH=stub_torch)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert str(wheel) in result.stderr
    assert hashlib.sha256(b"something else").hexdigest() in result.stderr
    assert "nothing was installed" in result.stderr
    assert installed(bare_python) == before


def test_names_a_wheel_that_does_not_exist(bare_python, stub_torch, tmp_path):
    result = run(bare_python, "--wheel", tmp_path / "none.whl", PYTHONPATH=stub_torch)
    assert result.returncode == 2
    assert f"error: {tmp_path / 'none.whl'} does not exist" in result.stderr


@pytest.fixture
def small_wheel(tmp_path):
    """A wheel laid out like the real one, with the same flaws."""
    info = "sal_detectron2-0.7.2.dist-info"
    members = {
        "detectron2/__init__.py": "__version__ = '0.7.2'\n",
        "detectron2/_C.cpython-310-x86_64-linux-gnu.so": "binary",
        "detectron2/model_zoo/configs/a/b.yaml": "A: 1\n",
        "tools/__init__.py": "",
        "tools/train_net.py": "stray",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: false\n"
        "Tag: cp310-cp310-linux_x86_64\n",
        f"{info}/top_level.txt": "detectron2\ntools\n",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: sal-detectron2\nVersion: 0.7.2\n"
        "Requires-Dist: numpy<2\nRequires-Dist: black\nProvides-Extra: all\n"
        'Requires-Dist: timm; extra == "all"\n\nAbout\n\nRequires-Dist: is text here\n',
    }
    rows = [f"{name},sha256={digest(text.encode())},{len(text)}" for name, text in members.items()]
    members[f"{info}/RECORD"] = "\n".join([*rows, f"{info}/RECORD,,"])
    wheel = tmp_path / "sal_detectron2-0.7.2-cp310-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, text in members.items():
            archive.writestr(name, text)
    return wheel


def digest(content):
    """The form of a hash in RECORD: URL-safe base64 without padding (PEP 376 and 427)."""
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()


def test_repacked_wheel_holds_python_only_and_a_true_record(small_wheel, tmp_path):
    result = repack(small_wheel, tmp_path / "out")
    assert result.name == "sal_detectron2-0.7.2-py3-none-any.whl"

    with zipfile.ZipFile(result) as archive:
        contents = {name: archive.read(name) for name in archive.namelist()}
    by_folder = {name.rpartition("dist-info/")[2]: text for name, text in contents.items()}
    assert sorted(by_folder) == [
        "METADATA",
        "RECORD",
        "WHEEL",
        "detectron2/__init__.py",
        "detectron2/model_zoo/configs/a/b.yaml",
        "top_level.txt",
    ]
    assert by_folder["top_level.txt"] == b"detectron2\n"
    assert b"Root-Is-Purelib: true" in by_folder["WHEEL"]
    assert b"Tag: py3-none-any" in by_folder["WHEEL"]
    assert by_folder["WHEEL"].count(b"Tag:") == 1

    rows = {name: row for name, *row in csv.reader(by_folder["RECORD"].decode().splitlines())}
    assert rows.keys() == contents.keys()
    for name, content in contents.items():
        if not name.endswith("/RECORD"):
            assert rows[name] == [f"sha256={digest(content)}", str(len(content))]


def test_repacked_wheel_lists_our_dependencies(small_wheel, tmp_path):
    with zipfile.ZipFile(repack(small_wheel, tmp_path / "out")) as archive:
        metadata = archive.read("sal_detectron2-0.7.2.dist-info/METADATA").decode()
    header, _, description = metadata.partition("\n\n")
    assert description == "About\n\nRequires-Dist: is text here\n"
    assert header.splitlines()[:3] == [
        "Metadata-Version: 2.1",
        "Name: sal-detectron2",
        "Version: 0.7.2",
    ]
    required = [
        line.removeprefix("Requires-Dist: ")
        for line in header.splitlines()
        if line.startswith("Requires-Dist: ")
    ]
    assert required == list(DEPENDENCIES)
    assert "numpy" in required
    assert "black" not in metadata and "timm" not in metadata
    assert "setuptools<81" in required


def environment_without(folder, *hidden):
    """A new interpreter and the PYTHONPATH on which it sees this one's packages but the hidden."""
    packages = folder / "packages"
    packages.mkdir()
    for entry in Path(sysconfig.get_paths()["purelib"]).iterdir():
        if not entry.name.startswith(hidden):
            (packages / entry.name).symlink_to(entry)
    return make_venv(folder / "venv"), str(packages)


@pytest.mark.slow
def test_installs_the_real_wheel_once(tmp_path):
    python, packages = environment_without(tmp_path, "detectron2", "sal_detectron2")
    first = run(python, PYTHONPATH=packages)
    if "could not be downloaded" in first.stderr:
        pytest.skip("the package index cannot be reached")
    assert first.returncode == 0, first.stderr
    assert first.stdout.endswith("Detectron2 is installed.\n")

    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    assert (site / "detectron2" / "modeling").is_dir()
    assert not list(site.glob("detectron2/_C*"))
    assert not (site / "tools").exists()

    source = site / "detectron2" / "__init__.py"
    written = source.stat().st_mtime_ns
    second = run(python, PYTHONPATH=packages, **NO_INDEX)
    assert second.stdout == "Detectron2 is already installed: nothing to do.\n"
    assert source.stat().st_mtime_ns == written


@pytest.mark.slow
def test_removes_what_turns_out_not_to_work(tmp_path, stub_torch):
    """With a torch that imports and then has nothing in it."""
    python, packages = environment_without(tmp_path, "detectron2", "sal_detectron2", "torch")
    result = run(python, PYTHONPATH=f"{stub_torch}:{packages}")
    if "could not be downloaded" in result.stderr:
        pytest.skip("the package index cannot be reached")
    assert result.returncode == 2
    sentence = result.stderr.splitlines()[-1]
    assert ": error: Detectron2 was installed but does not work here (" in sentence
    assert sentence.endswith("so it was removed again.")
    site = next((tmp_path / "venv").glob("lib/python*/site-packages"))
    assert not list(site.glob("*detectron2*"))
