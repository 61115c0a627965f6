"""Two GPUs: stages train as one GPU does, and no delay of a stream changes a bit of a loss."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

JOB = Path(__file__).resolve().with_name("pipeline_job.py")
RANKS = 2
WRONG = ("unordered merge", "unordered gradient", "forgotten send")


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> dict[str, list[list[float]]]:
    """Name of a run of pipeline_job.py to its losses, per step and micro-batch."""
    folder = tmp_path_factory.mktemp("pipeline")
    output = folder / "losses.jsonl"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "NCCL_NVLS_ENABLE": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        **os.environ,
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    environment.pop("CUDA_LAUNCH_BLOCKING", None)
    ranks = []
    for rank in range(RANKS):
        with open(folder / f"{rank}.log", "w") as log:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, str(JOB), str(output), "1"],
                    env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
                    stdout=log,
                    stderr=log,
                )
            )
    try:
        for process in ranks:
            process.wait(timeout=400)
    finally:
        for process in ranks:
            if process.poll() is None:
                process.kill()
            process.wait()
    logs = "\n".join((folder / f"{rank}.log").read_text()[-3000:] for rank in range(RANKS))
    assert output.is_file(), logs
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    found = {line["run"]: line["losses"] for line in lines}
    assert [process.returncode for process in ranks] == [0] * RANKS, f"ran {list(found)}\n{logs}"
    return found


def means(steps: list[list[float]]) -> list[float]:
    return [sum(step) / len(step) for step in steps]


@pytest.mark.parametrize("division", ["stages", "chunks"])
def test_stages_train_as_one_gpu_does(losses, division):
    """Within what rounding to bf16 at other places changes on one GPU.

    Full recomputation forms and rounds the streams at every layer, a pipeline at every stage's end.
    """
    single, recomputed, staged = (
        means(losses[name]) for name in ("single", "single recomputed", division)
    )
    assert len(single) == 100
    assert single[-1] < single[0] - 0.5, "it did not learn"
    noise = max(abs(one - other) for one, other in zip(single, recomputed, strict=True))
    assert noise < 0.02 * single[-1]
    for step, (one, other) in enumerate(zip(single, staged)):
        assert abs(one - other) <= max(3 * noise, 0.002 * one), step


@pytest.mark.parametrize("division", ["stages", "chunks"])
def test_delays_and_poisoned_memory_change_no_bit(losses, division):
    calm, disturbed = losses[division], losses[f"{division} disturbed"]
    assert len(calm) == len(disturbed) == 200
    assert disturbed == calm


def test_overlap_post_computes_what_overlap_none_computes(losses):
    assert losses["chunks"][: len(losses["chunks none"])] == losses["chunks none"]


@pytest.mark.parametrize("wrong", WRONG)
def test_the_disturbance_shows_what_is_wrong(losses, wrong):
    """Else the tests above prove nothing."""
    found, right = losses[wrong], losses["chunks"][: len(losses[wrong])]
    assert found != right or any(math.isnan(loss) for step in found for loss in step)
