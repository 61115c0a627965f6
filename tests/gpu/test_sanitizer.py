"""compute-sanitizer finds nothing in the kernels. It slows them down by orders of magnitude, so
each runs once, at sizes that end inside tiles (sanitizer_job.py).
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(
    not Path(SANITIZER).exists(), reason="needs compute-sanitizer, of the CUDA toolkit"
)


def sanitize(tool: str, *options: str) -> str:
    """What ``tool`` says of sanitizer_job.py."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    job = Path(__file__).with_name("sanitizer_job.py")
    run = subprocess.run(
        [SANITIZER, "--tool", tool, "--show-backtrace", "no", *options, sys.executable, job],
        env=os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    said = run.stdout + run.stderr
    assert re.search(r"ran \d+ operators", said), said[-4000:]
    return said


# Only what PyTorch's kernels write counts for initcheck; the other tools need not watch those.
OURS = ("--kernel-name", "regex=^[a-z_]+_kernel$")


@pytest.mark.parametrize(("tool", "options"), [("memcheck", OURS), ("initcheck", ())])
def test_no_errors(tool, options):
    said = sanitize(tool, *options)
    assert "ERROR SUMMARY: 0 errors" in said, said[-4000:]


# In Gluon one thread arrives at a barrier for all warps that wrote or read. racecheck does not
# follow that and reports each of their rings, so there it can find two writes only. What those
# barriers must order, tests/kernels/test_hopper_schedules.py finds on a CPU.
GLUON = (
    "post_pre_hopper_kernel",
    "pre_backward_hopper_kernel",
    "streams_backward_hopper_kernel",
)


def test_no_hazards_but_the_compilers():
    """Triton's reductions write equal values from several threads to one place."""
    said = sanitize("racecheck", *OURS)
    place = r"(\w+) access at (\w+)\+(0x[0-9a-f]+) in"
    for report in re.split(r"Error: Race reported between ", said)[1:]:
        (first, kernel, at), *others = re.findall(place, report)
        assert others, report
        for other, _, other_at in others:
            reduced = (first, other, at) == ("Write", "Write", other_at)
            assert reduced or (kernel in GLUON and first != other), report
