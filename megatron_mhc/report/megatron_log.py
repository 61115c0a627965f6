"""Megatron's log lines, read as they are printed."""

import re
from dataclasses import dataclass

_ITERATION = re.compile(
    r"iteration\s+(?P<step>\d+)/\s*(?P<steps>\d+) \|.*?"
    r"elapsed time per iteration \(ms\): (?P<ms>[\d.]+) \|.*?"
    r"lm loss: (?P<loss>\S+) \|"
)
_VALIDATION = re.compile(r"validation loss at iteration (\d+) \| lm loss value: (\S+) \|")

_MEMORY = re.compile(r"memory \(MB\) \|.*max allocated: ([\d.]+)")


@dataclass(frozen=True)
class Step:
    """One logged training step: ``loss`` in nats per token, ``ms`` per iteration."""

    step: int
    steps: int
    ms: float
    loss: float


def parse_step(line: str) -> Step | None:
    """The training step that a line reports, if it does."""
    found = _ITERATION.search(line)
    if not found:
        return None
    return Step(int(found["step"]), int(found["steps"]), float(found["ms"]), float(found["loss"]))


def parse_validation(line: str) -> float | None:
    """The validation loss that a line reports, if it does."""
    found = _VALIDATION.search(line)
    return float(found[2]) if found else None


def parse_peak_memory(line: str) -> float | None:
    """The peak of allocated GPU memory so far that a line reports, in MiB, if it does."""
    found = _MEMORY.search(line)
    return float(found[1]) if found else None
