"""What is wrong with an installation is named before Megatron's import breaks on it."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from megatron_mhc import environment
from megatron_mhc.environment import EnvironmentProblem

ROOT = Path(__file__).resolve().parents[2]


def test_half_installed_transformer_engine_is_named(tmp_path, monkeypatch):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").write_text("raise FileNotFoundError('no .so')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EnvironmentProblem) as problem:
        environment.check_transformer_engine()
    message = str(problem.value)
    assert str(package) in message
    assert "libtransformer_engine*.so" in message
    assert "pip uninstall transformer-engine" in message


def test_whole_transformer_engine_passes(tmp_path, monkeypatch):
    package = tmp_path / "transformer_engine"
    (package / "wheel_lib").mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "wheel_lib" / "transformer_engine_torch.cpython-312.so").touch()
    (package / "libtransformer_engine.so").touch()
    monkeypatch.syspath_prepend(tmp_path)
    environment.check_transformer_engine()


def test_unsupported_megatron_is_named(monkeypatch):
    monkeypatch.setattr(metadata, "version", lambda name: "0.16.1")
    with pytest.raises(EnvironmentProblem, match=r"megatron-core 0.16.1 is installed.*pip install"):
        environment.check_megatron()


def test_missing_megatron_is_named(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    with pytest.raises(EnvironmentProblem, match="megatron-core is not installed: pip install"):
        environment.check_megatron()


def test_script_shows_an_environment_problem_without_a_traceback(tmp_path):
    package = tmp_path / "transformer_engine"
    package.mkdir()
    (package / "__init__.py").touch()
    run = subprocess.run(
        [sys.executable, ROOT / "examples" / "pretrain_gpt.py", "--mhc"],
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.returncode == 2
    assert run.stderr.startswith("pretrain_gpt.py: error: Transformer Engine in ")
    assert "Traceback" not in run.stderr


def test_cpu_stand_in_says_so_once():
    """In a process of its own: "cuda" works on the CPU, one line says it, subprocesses are free."""
    program = (
        "from megatron_mhc import environment; environment.prepare(); environment.prepare();"
        "import os, torch; print(torch.zeros(2, device='cuda').cuda().type(), 'RANK' in os.environ)"
    )
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert run.stdout.strip() == "torch.cuda.FloatTensor False"
    assert run.stderr.count("the CPU stands in for CUDA") == 1


def test_several_slurm_tasks_without_a_launcher_are_refused(monkeypatch):
    """Each would be a training of its own, on the same GPU and --save."""
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "8")
    with pytest.raises(environment.EnvironmentProblem, match="SLURM_STEP_NUM_TASKS 8, .* torchrun"):
        environment.set_single_process()
    assert "RANK" not in os.environ


def test_a_process_of_a_slurm_batch_script_is_the_whole_job(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS", raising=False)
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_NTASKS", "8")
    environment.set_single_process()
    assert os.environ["WORLD_SIZE"] == "1"
