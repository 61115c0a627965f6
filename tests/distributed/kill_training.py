"""Runs a training script and kills its process at one point, from within: nothing else is sure to
be in time.

    python kill_training.py POINT STEP SCRIPT FLAGS...

POINT "training": the step is done, its loss is printed. The others are in the middle of saving the
step's checkpoint. POINT "shard": while the weights are written, so that their file is cut off.
POINT "tracker": the checkpoint is whole, the file that names it was opened, which empties it, and
not yet written.
"""

import builtins
import functools
import os
import runpy
import signal
import sys
from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"
ITEMS_BEFORE = 5
"""Tensors of the checkpoint that are written before the kill."""

# The file may be written by a child: all of the job goes.
job = os.getpid()


def kill() -> None:
    os.kill(job, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def kill_in_training(step: int) -> None:
    write = print

    def print_or_kill(*values, **how) -> None:
        write(*values, **how)
        if f" iteration {step:8d}/" in " ".join(map(str, values)):
            sys.stdout.flush()
            kill()

    builtins.print = print_or_kill


def kill_in_shard(step: int) -> None:
    from torch.distributed.checkpoint import filesystem

    write_item, written = filesystem._write_item, []

    @functools.wraps(write_item)  # Megatron looks at its signature
    def write_or_kill(transforms, stream, *args, **kwargs):
        if f"iter_{step:07d}" in str(stream.name):
            if len(written) == ITEMS_BEFORE:
                stream.flush()
                kill()
            written.append(stream.name)
        return write_item(transforms, stream, *args, **kwargs)

    filesystem._write_item = write_or_kill


def kill_in_tracker(step: int) -> None:
    def hook(event: str, args: tuple) -> None:
        if event != "open" or not str(args[0]).endswith(TRACKER) or "w" not in str(args[1]):
            return
        if (Path(args[0]).parent / f"iter_{step:07d}").is_dir():
            os.truncate(args[0], 0)
            kill()

    sys.addaudithook(hook)


if __name__ == "__main__":
    point, step, script, *flags = sys.argv[1:]
    points = {"training": kill_in_training, "shard": kill_in_shard, "tracker": kill_in_tracker}
    points[point](int(step))
    sys.argv = [script, *flags]
    runpy.run_path(script, run_name="__main__")
