"""The kernels of a backward pass compile while its forward's does, once, and are found."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

PRE = ["aggregate_backward_kernel", "pre_backward_hopper_kernel", "reduce_kernel"]
POST_PRE = ["aggregate_backward_kernel", "reduce_kernel", "streams_backward_hopper_kernel"]
FORWARD = "post_pre_hopper_kernel"


@pytest.fixture(scope="module")
def applied(tmp_path_factory):
    """What compiled for each of some cases (apply_ahead.py): ahead, with how many launchers, and at
    a launch; how many kernels were then left that no launch took; the error.
    """
    cases = ["pre real", "pre main_grad", "post_pre", "post_pre main_grad"]
    cases += ["post_pre unused", "post_pre frozen", "post_pre inference", "post_pre broken", "head"]
    run = subprocess.run(
        [sys.executable, Path(__file__).with_name("apply_ahead.py"), *cases],
        env={
            **os.environ,
            "TRITON_INTERPRET": "0",
            "TRITON_CACHE_DIR": str(tmp_path_factory.mktemp("triton")),
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return dict(zip(cases, map(json.loads, run.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(
    ("case", "ahead"),
    [
        ("pre real", PRE),
        ("pre main_grad", PRE),
        ("post_pre", POST_PRE),
        ("post_pre main_grad", POST_PRE),
    ],
)
def test_launches_find_what_was_compiled_ahead(applied, case, ahead):
    expected = {"ahead": ahead, "launchers": 3, "launch": [FORWARD], "left": 0, "error": None}
    assert applied[case] == expected


def test_what_was_not_foreseen_compiles_at_its_launch(applied):
    found = applied["post_pre unused"]
    assert found["launch"] == [FORWARD, "streams_backward_kernel"]
    assert found["left"] == 1
    assert found["error"] is None


@pytest.mark.parametrize("case", ["post_pre frozen", "post_pre inference"])
def test_nothing_compiles_ahead_without_a_gradient(applied, case):
    assert applied[case]["ahead"] == []
    assert applied[case]["launch"] == [FORWARD]


def test_the_head_compiles_at_its_launches(applied):
    backward = ["aggregate_backward_kernel", "streams_backward_kernel", "reduce_kernel"]
    assert applied["head"]["ahead"] == []
    assert applied["head"]["launch"] == [FORWARD, *backward]


def test_the_launch_raises_the_compilers_error(applied):
    found = applied["post_pre broken"]
    assert found["error"] == "broken"
    assert found["ahead"] == POST_PRE
    assert found["launch"] == [FORWARD]
