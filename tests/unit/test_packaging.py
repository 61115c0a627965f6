"""kernels/ and patches/ import as megatron_mhc's, from a wheel, an install and a bare checkout."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PRINT_FILES = (
    "import megatron_mhc.kernels.reference as k, megatron_mhc.patches.record as p;"
    "from megatron_mhc import MHCConfig; print(k.__file__); print(p.__file__)"
)


def python(program: str, cwd: Path, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", program],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    source = tmp_path_factory.mktemp("source")
    for folder in ("megatron_mhc", "kernels", "patches"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, source / folder, ignore=ignored)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    folder = tmp_path_factory.mktemp("wheel")
    subprocess.run([*command, "-w", folder, source], check=True, timeout=300)
    return next(folder.glob("*.whl"))


def test_wheel_holds_every_module_in_its_place(wheel):
    packed = set(zipfile.ZipFile(wheel).namelist())
    for folder, target in (
        ("megatron_mhc", "megatron_mhc"),
        ("kernels", "megatron_mhc/kernels"),
        ("patches", "megatron_mhc/patches"),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            assert f"{target}/{path.relative_to(ROOT / folder)}" in packed


def test_wheel_imports(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    files = python(PRINT_FILES, tmp_path, PYTHONPATH=str(tmp_path / "site")).splitlines()
    expected = tmp_path / "site" / "megatron_mhc"
    assert files == [str(expected / "kernels/reference.py"), str(expected / "patches/record.py")]


def test_bare_checkout_imports(tmp_path):
    for folder in ("megatron_mhc", "kernels", "patches"):
        shutil.copytree(ROOT / folder, tmp_path / "checkout" / folder)
    files = python(PRINT_FILES, tmp_path, PYTHONPATH=str(tmp_path / "checkout")).splitlines()
    expected = tmp_path / "checkout"
    assert files == [str(expected / "kernels/reference.py"), str(expected / "patches/record.py")]


def test_import_is_light_and_kernels_know_no_megatron(tmp_path):
    program = (
        "import sys, megatron_mhc; assert 'torch' not in sys.modules;"
        "from megatron_mhc import HyperConnection, MHCConfig, kernels;"
        "print(sorted(name for name in sys.modules if name.split('.')[0] == 'megatron'))"
    )
    assert python(program, tmp_path, PYTHONPATH=str(ROOT)).strip() == "[]"


def test_unknown_names_are_refused():
    import megatron_mhc

    with pytest.raises(AttributeError, match="no attribute 'Hyper'"):
        _ = megatron_mhc.Hyper


def test_find_python_says_how_to_get_one(tmp_path):
    def find(**environment: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            ["/bin/sh", ROOT / "tools" / "find_python.sh"],
            env={"PATH": str(tmp_path), "PYENV_ROOT": str(tmp_path), **environment},
            capture_output=True,
            text=True,
        )

    nothing = find()
    assert nothing.returncode == 1
    assert "No Python >= 3.12" in nothing.stderr
    assert "pyenv install 3.12" in nothing.stderr
    assert find(PYTHON=sys.executable).stdout.strip() == sys.executable

    (tmp_path / "python3").write_text("#!/bin/sh\nexit 1\n")  # an old one
    (tmp_path / "python3").chmod(0o755)
    pyenv = tmp_path / "versions" / "3.12.9" / "bin"
    pyenv.mkdir(parents=True)
    (pyenv / "python").symlink_to(sys.executable)
    assert find().stdout.strip() == str(pyenv / "python")


def test_the_users_python_reaches_find_python():
    """Make exports a variable that the environment has with the Makefile's own value."""
    shown = subprocess.run(
        ["make", "-s", "--eval=shown:; @echo $$PYTHON", "shown"],
        cwd=ROOT,
        env={**os.environ, "PYTHON": "/opt/python3.12"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shown.stdout.strip() == "/opt/python3.12"
