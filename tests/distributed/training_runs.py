"""Short trainings with examples/pretrain_gpt.py in processes of their own."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.distributed import checkpoint

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
STEPS, SAVE_INTERVAL = 6, 2
TIMEOUT = 120

# Dropout is on: the generators' states must come back with the rest.
FLAGS = f"""
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 64 --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --seq-length 32 --max-position-embeddings 32
    --micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} --lr 1e-2
    --hidden-dropout 0.1 --attention-dropout 0.1 --mock-data --split 90,5,5
    --tokenizer-type NullTokenizer --vocab-size 128 --make-vocab-size-divisible-by 8
    --no-create-attention-mask-in-dataloader --log-interval 1 --eval-interval 1000 --eval-iters 2
    --save-interval {SAVE_INTERVAL}
""".split()


@dataclass(frozen=True)
class Run:
    """A training that ended.

    Attributes:
        code: its exit code; minus the signal where one killed it.
        log: all that it printed.
    """

    code: int
    log: str

    @property
    def tail(self) -> str:
        return f"exit code {self.code}\n{self.log[-4000:]}"

    @property
    def losses(self) -> dict[int, float]:
        """The training loss of every step."""
        printed = re.findall(r"iteration +(\d+)/.*? lm loss: (\S+)", self.log)
        losses = {int(step): float(loss) for step, loss in printed}
        # Megatron keeps its sum after a process's first step: the second line is the mean of both.
        if len(losses) > 1:
            first, second, *_ = losses
            losses[second] = 2 * losses[second] - losses[first]
        return losses

    @property
    def validation_loss(self) -> float:
        """The loss on the validation set after the last step."""
        pattern = rf"iteration {STEPS} on validation set \| lm loss value: (\S+)"
        found = re.search(pattern, self.log)
        assert found, self.tail
        return float(found[1])


def command(*flags: object, through: tuple[object, ...] = (), processes: int = 1) -> list[str]:
    """How the script is started.

    Args:
        flags: beside FLAGS.
        through: a script of this folder that runs the training script, and its arguments.
        processes: more than one go through torchrun.
    """
    launcher = [sys.executable]
    if processes > 1:
        anywhere = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
        launcher += ["-m", "torch.distributed.run", *anywhere, f"--nproc-per-node={processes}"]
    if through:
        wrapper, *arguments = through
        launcher += [str(HERE / wrapper), *map(str, arguments)]
    return [*launcher, str(SCRIPT), *FLAGS, *map(str, flags)]


def environment() -> dict[str, str]:
    """A single CPU process per rank, also on a GPU host and inside another job."""
    mine = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**mine, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def train(*flags: object, **how) -> Run:
    """Run the script to its end, or for TIMEOUT; flags and how are :func:`command`'s."""
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            command(*flags, **how),
            env=environment(),
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TIMEOUT)
        finally:
            # Megatron's checkpoint writer is a process that outlives a killed trainer.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        code = process.wait()
        log.seek(0)
        return Run(code, log.read())


def saved_tensors(folder: Path, step: int) -> dict[str, torch.Tensor]:
    """Weights and optimizer state of a distributed checkpoint."""
    reader = checkpoint.FileSystemReader(folder / f"iter_{step:07d}")
    described = reader.read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in described.items()
        if hasattr(entry, "size")
    }
    checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors
