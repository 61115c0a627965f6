"""Two GPUs: stages train as one GPU does, and no delay of a stream changes a bit of a loss.

With the variable OUT, a run that is cut off leaves losses.jsonl and the ranks' logs in that folder.
"""

import json
import math
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

JOB = Path(__file__).resolve().with_name("pipeline_job.py")
RANKS = 2
LIMIT = 240
"""Seconds for the whole job."""
WRONG = ("unordered merge", "unordered gradient", "forgotten send")


@dataclass(frozen=True)
class Job:
    """What the ranks of pipeline_job.py left.

    Attributes:
        losses: name of a run to its losses, per step and micro-batch.
        log: how each rank ended, and the end of what it printed.
    """

    losses: dict[str, list[list[float]]]
    log: str

    def __getitem__(self, run: str) -> list[list[float]]:
        assert run in self.losses, f"only {list(self.losses)} ended\n{self.log}"
        return self.losses[run]


def start_rank(rank: int, port: int, output: Path, log: Path) -> subprocess.Popen:
    environment = {
        "CUDA_DEVICE_MAX_CONNECTIONS": "32",
        "NCCL_NVLS_ENABLE": "0",
        "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(RANKS),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    environment.pop("CUDA_LAUNCH_BLOCKING", None)
    command = [sys.executable, str(JOB), str(output), "1"]
    with open(log, "w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> Job:
    """The job's runs; a rank that fails, or that takes too long, ends it."""
    folder = Path(os.environ.get("OUT") or tmp_path_factory.mktemp("pipeline"))
    output, logs = folder / "losses.jsonl", [folder / f"losses.{rank}.log" for rank in range(RANKS)]
    output.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ranks = [start_rank(rank, port, output, logs[rank]) for rank in range(RANKS)]
    end = time.monotonic() + LIMIT
    try:
        while any(process.poll() is None for process in ranks) and time.monotonic() < end:
            if any(process.poll() for process in ranks):
                break
            time.sleep(0.2)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    lines = output.read_text().splitlines() if output.is_file() else []
    ends = [
        f"rank {rank}: exit code {process.returncode}\n{logs[rank].read_text()[-3000:]}"
        for rank, process in enumerate(ranks)
    ]
    found = {line["run"]: line["losses"] for line in map(json.loads, lines)}
    return Job(found, "\n".join(ends))


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


def test_replays_ahead_change_no_bit(losses):
    """Under delays too: they run on the priority stream, while gradients are on their way."""
    assert losses["chunks replayed"] == losses["chunks"][: len(losses["chunks replayed"])]


@pytest.mark.parametrize("other", ["chunks none", "chunks nccl disturbed"])
def test_other_ways_to_send_change_no_bit(losses, other):
    assert losses["chunks"][: len(losses[other])] == losses[other]


@pytest.mark.parametrize("wrong", WRONG)
def test_the_disturbance_shows_what_is_wrong(losses, wrong):
    """Else the tests above prove nothing."""
    found, right = losses[wrong], losses["chunks"][: len(losses[wrong])]
    assert found != right or any(math.isnan(loss) for step in found for loss in step)
