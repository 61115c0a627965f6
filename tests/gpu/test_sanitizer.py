"""compute-sanitizer finds nothing in the kernels. It slows them down by orders of magnitude, so each
runs once, at sizes that end inside tiles (sanitizer_job.py).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"

pytestmark = pytest.mark.skipif(
    not Path(SANITIZER).exists(), reason="needs compute-sanitizer, of the CUDA toolkit"
)


@pytest.mark.parametrize("tool", ["memcheck", "racecheck", "initcheck"])
def test_sanitizer_finds_nothing(tool):
    root = Path(__file__).parents[2]
    run = subprocess.run(
        [
            *(SANITIZER, "--tool", tool, "--kernel-name", "regex=^[a-z_]+_kernel$", "--print-limit", "20"),
            *(sys.executable, Path(__file__).with_name("sanitizer_job.py")),
        ],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": _python_path(root)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    said = run.stdout + run.stderr
    assert run.returncode == 0 and re.search(r"ran \d+ operators", said), said[-4000:]
    summary = "RACECHECK SUMMARY: 0 hazards" if tool == "racecheck" else "ERROR SUMMARY: 0 errors"
    assert summary in said, said[-4000:]


def _python_path(root: Path) -> str:
    return os.pathsep.join([str(root), *filter(None, [os.environ.get("PYTHONPATH")])])
