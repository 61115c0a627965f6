"""The host's part of an application can be timed without a GPU, and is that of Hopper."""

import re
import subprocess
import sys
from pathlib import Path

TOOL = Path(__file__).resolve().parents[2] / "tools" / "benchmark_host_time.py"


def test_an_application_on_hopper_is_four_launches():
    command = [sys.executable, TOOL, "--repetitions", "1", "--chain", "3"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    *kernels, ours, least = run.stdout.splitlines()
    assert kernels == [
        "post_pre_hopper_kernel: 1 an application",
        "aggregate_backward_kernel: 1 an application",
        "streams_backward_hopper_kernel: 1 an application",
        "reduce_kernel: 1 an application",
    ]
    times = [float(re.search(r"([\d.]+) us$", line)[1]) for line in (ours, least)]
    assert times[0] > 0 < times[1]
