"""Processes that share a GPU take turns in the middle of kernels, whose copies and waits go on."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
PROCESSES, SECONDS = 8, 10

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


def start(seconds: float) -> subprocess.Popen:
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name("shared_gpu_job.py"), str(seconds)],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_eight_processes_have_the_same_bits():
    said, _ = start(0).communicate(timeout=300)  # compiles
    assert said.endswith("0 of 0 differ\n"), said[-4000:]
    running = [start(SECONDS) for _ in range(PROCESSES)]
    for process in running:
        said, _ = process.communicate(timeout=300)
        found = re.search(r"^(\d+) of (\d+) differ$", said, re.MULTILINE)
        assert found, said[-4000:]
        assert found[1] == "0"
        assert int(found[2]) >= 200
