"""What the kernels in Gluon compile to for sm_90, on any machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize(
    "cases",
    [
        ["forward,8192,4096,24,1", "forward,17,200,24,1", "forward,4096,7168,24,1"]
        + ["forward,64,4096,24,0", "forward,64,4096,4,1", "forward,64,4096,4,0"],
        ["backward,8192,4096,24,1", "backward,4096,7168,24,0"],
    ],
    ids=["forward", "backward"],
)
def test_it_fits(cases):
    """The registers and the shared memory of a multiprocessor, with next to no spills; and every
    barrier's memory is its own (see make_barriers).
    """
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("compile_hopper.py"), *cases],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    for line in run.stdout.splitlines():
        found = json.loads(line)
        assert found["registers"] * 32 * found["warps"] <= 65536
        assert found["spilled"] <= 32
        assert found["shared"] <= 227 * 1024
        assert found["idle_barriers"] == 0
    assert len(run.stdout.splitlines()) == len(cases)
