"""The small pretraining job of ``make pretrain`` and ``make compare``: real text, 2 CPU cores.

It starts examples/pretrain_gpt.py as a user would, shows its progress, and reports from what the
run left on disk.
"""

import os
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from .checkpoint_guard import latest_iteration
from .errors import UserError
from .report.curves import LOSS, VALIDATION_LOSS, Run, read_run
from .report.megatron_log import parse_step, parse_validation
from .run_folder import claim

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "pretrain_gpt.py"
MIXINGS = ("plain", "unconstrained", "sinkhorn")


@dataclass(frozen=True)
class SmallRun:
    """One training of the small model.

    Attributes:
        folder: takes log, checkpoints, TensorBoard events; an interrupted run there is resumed.
        data: prefix of the prepared pairs, ``<data>_train`` and ``<data>_valid``.
        mixing: one of ``MIXINGS``; "plain" is the model without mHC.
        steps: training steps of 2048 bytes each.
    """

    folder: Path
    data: Path
    mixing: str = "sinkhorn"
    steps: int = 500

    def command(self) -> list[str]:
        """The command line, for a user to read and change."""
        tenth = max(1, self.steps // 10)
        flags = {
            "num-layers": 4,
            "hidden-size": 128,
            "ffn-hidden-size": 352,
            "num-attention-heads": 4,
            "seq-length": 256,
            "max-position-embeddings": 256,
            "micro-batch-size": 8,
            "global-batch-size": 8,
            "train-iters": self.steps,
            "lr": 4e-3,
            "min-lr": 4e-4,
            "lr-decay-style": "cosine",
            "lr-warmup-iters": tenth,
            "weight-decay": 0.1,
            "adam-beta2": 0.98,
            "hidden-dropout": 0,
            "attention-dropout": 0,
            "normalization": "RMSNorm",
            "position-embedding-type": "rope",
            "tokenizer-type": "NullTokenizer",
            "vocab-size": 257,
            "train-data-path": f"{self.data}_train",
            "valid-data-path": f"{self.data}_valid",
            "data-cache-path": self.data.parent / "cache",
            "eval-interval": max(1, self.steps // 5),
            "eval-iters": max(1, min(40, tenth)),
            "log-interval": 1,
            "save": self.folder / "checkpoints",
            "load": self.folder / "checkpoints",
            "save-interval": max(1, self.steps // 2),
            "tensorboard-dir": self.folder / "tensorboard",
            "tensorboard-log-interval": 1,
        }
        if self.mixing != "plain":
            flags["mhc-residual-mixing"] = self.mixing
            flags["mhc-log-gain-interval"] = max(1, self.steps // 40)
        words = [sys.executable, str(SCRIPT)]
        words += [] if self.mixing == "plain" else ["--mhc"]
        for name in ("swiglu", "disable-bias-linear", "untie-embeddings-and-output-weights"):
            words.append(f"--{name}")
        words.append("--no-create-attention-mask-in-dataloader")
        for name, value in flags.items():
            words += [f"--{name}", str(value)]
        return words

    def finished(self) -> bool:
        """The last checkpoint is that of the last step."""
        return latest_iteration(self.folder / "checkpoints") == self.steps

    def claim(self) -> None:
        """Raises UserError where the folder is not this training's, nor can become it."""
        claim(self.folder, self.mixing, self.steps, self.data)

    def train(self, console: Console) -> None:
        """Run to the last step, resuming where a checkpoint lies; progress on the console.

        Raises:
            UserError: the training failed or was interrupted; the message has its log's end.
        """
        log_path = self.folder / "log.txt"
        # To a file and not a pipe: helper processes of a killed trainer would hold a pipe open.
        with open(log_path, "a") as log:
            start = log.tell()
            trainer = subprocess.Popen(
                self.command(),
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
        tail: deque[str] = deque(maxlen=25)
        try:
            with _Progress(console, self.steps) as progress:
                for line in _follow(log_path, start, trainer):
                    tail.append(line)
                    progress.show(line)
        except KeyboardInterrupt:
            trainer.wait()  # the terminal interrupted it too
            raise UserError("interrupted; the same command resumes from the last save") from None
        if trainer.returncode:
            raise UserError(f"training failed, log in {log_path}; its end:\n{''.join(tail)}")

    def report(self) -> Run:
        """The run's curves."""
        return read_run(self.folder / "tensorboard", self.mixing)


def _follow(path: Path, start: int, process: subprocess.Popen) -> Iterator[str]:
    """The lines that a process adds to a file from byte ``start`` on, until it ends."""
    with open(path) as file:
        file.seek(start)
        while True:
            ended = process.poll() is not None
            yield from iter(file.readline, "")
            if ended:
                return
            time.sleep(0.2)


class _Progress:
    """A live line on a terminal, ten plain lines elsewhere."""

    def __init__(self, console: Console, steps: int) -> None:
        self._console = console
        self._every = max(1, steps // 10)
        self._validation = "-"
        self._bar = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._task = self._bar.add_task("starting", total=steps)

    def __enter__(self) -> "_Progress":
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(self, *_) -> None:
        self._bar.stop()

    def show(self, line: str) -> None:
        """Take in one line of Megatron's log."""
        if (loss := parse_validation(line)) is not None:
            self._validation = f"{loss:.3f}"
        step = parse_step(line)
        if step is None:
            if line.startswith("mHC"):
                self._console.print(line.rstrip(), highlight=False, soft_wrap=True)
            return
        text = f"loss {step.loss:.3f}  validation {self._validation}  {step.ms:.0f} ms/step"
        self._bar.update(self._task, completed=step.step, description=text)
        if not self._console.is_terminal and step.step % self._every == 0:
            self._console.print(f"step {step.step}/{step.steps}  {text}", highlight=False)


def last(curve: dict[int, float]) -> float:
    """The value at a curve's last step."""
    return curve[max(curve)]


def summary_line(run: SmallRun, plot: Path) -> str:
    """The line that ``make pretrain`` ends with, read back from the run's folder."""
    curves = run.report()
    loss = curves.curve(LOSS)
    gain = curves.max_gain()
    return (
        f"mhc-pretrain: steps={max(loss)} train_loss_first={loss[min(loss)]:.4f} "
        f"train_loss_last={last(loss):.4f} val_loss={last(curves.curve(VALIDATION_LOSS)):.4f} "
        f"max_gain={'-' if gain is None else f'{gain:.4f}'} "
        f"checkpoint={run.folder / 'checkpoints'} plot={plot}"
    )
