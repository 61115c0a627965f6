"""Starting a job of two ranks, one GPU each, and reading the losses that it leaves."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

RANKS = 2


@dataclass(frozen=True)
class Job:
    """What the ranks of a job left.

    Attributes:
        losses: name of a run to its losses, per step and micro-batch.
        log: how each rank ended, and the end of what it printed.
    """

    losses: dict[str, list[list[float]]]
    log: str

    def __getitem__(self, run: str) -> list[list[float]]:
        assert run in self.losses, f"only {list(self.losses)} ended\n{self.log}"
        return self.losses[run]


def add_run(output: Path, run: str, losses: list[list[float]]) -> None:
    """Add a run to a job's output file as it ends, so that a job cut short keeps what it has."""
    with open(output, "a") as file:
        file.write(json.dumps({"run": run, "losses": losses}) + "\n")


def _start_rank(rank: int, port: int, command: list[str], log: Path) -> subprocess.Popen:
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
    with open(log, "w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=file)


def run_job(script: Path, *arguments: str, folder: Path, limit: float) -> Job:
    """Run ``script OUTPUT_FILE ARGUMENTS`` on two ranks; one that fails ends it, and so does time.

    Args:
        script: calls :func:`add_run` for every run.
        folder: gets the output file, named as the script, and the ranks' logs; the variable OUT
            names another one.
        limit: seconds for the whole job.
    """
    folder = Path(os.environ.get("OUT") or folder)
    output = folder / f"{script.stem}.jsonl"
    logs = [folder / f"{script.stem}.{rank}.log" for rank in range(RANKS)]
    output.unlink(missing_ok=True)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, str(script), str(output), *arguments]
    ranks = [_start_rank(rank, port, command, logs[rank]) for rank in range(RANKS)]
    end = time.monotonic() + limit
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
    """The loss of every step."""
    return [sum(step) / len(step) for step in steps]
