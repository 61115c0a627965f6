"""Starting a worker script of this folder, and reading what its ranks saw."""

import os
import subprocess
import sys
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent


def run_worker(script: str, folder: Path, seconds: float) -> None:
    """Run ``script`` of this folder, which leaves a file for every rank; ``folder``/log has its
    output. Also on a GPU host its processes are CPU processes.
    """
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(HERE.parents[1]),
    }
    environment.pop("RANK", None)
    command = [sys.executable, str(HERE / script), str(folder)]
    with open(folder / "log", "w+") as log:
        subprocess.run(
            command, env=environment, stdout=log, stderr=log, timeout=seconds, check=False
        )


def load_ranks(folder: Path, run: str, world: int) -> list[dict]:
    """What every rank of one run saw, in rank order."""
    ranks = []
    for rank in range(world):
        path = folder / f"{run}.{rank}.pt"
        assert path.is_file(), f"{path.name} is missing\n{(folder / 'log').read_text()[-3000:]}"
        ranks.append(torch.load(path, weights_only=True))
        assert "error" not in ranks[-1], ranks[-1]["error"]
    return ranks
