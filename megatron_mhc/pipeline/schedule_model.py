"""Megatron's schedules on paper: how many messages a stage holds at once."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache

FORWARD, BACKWARD = 1, 2
"""How long a chunk's passes take, in units of the forward pass."""


@dataclass(frozen=True)
class Schedule:
    """Which of Megatron's schedules a pipeline runs.

    Attributes:
        chunks: of a stage; 1 is 1F1B, more are interleaved.
        group: microbatch_group_size_per_vp_stage; 0 is the number of stages.
        combined: combined 1F1B.
    """

    chunks: int = 1
    group: int = 0
    combined: bool = False


def _forward_order(micro_batches: int, chunks: int, group: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) of one rank's forward passes, which are every rank's."""
    return [
        (chunk, micro_batch)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + group, micro_batches))
    ]


def _steps(
    stages: int, rank: int, schedule: Schedule, micro_batches: int
) -> Iterator[list[tuple[str, int, int]]]:
    """What a rank does at a time, in order: passes, each ("F" or "B", place of the chunk among all
    stages, micro-batch). Only combined 1F1B does two at a time.
    """
    chunks, group = schedule.chunks, schedule.group or stages
    forwards = _forward_order(micro_batches, chunks, group)
    warm_up = stages - rank - 1
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * group + schedule.combined
    for index in range(len(forwards) + warm_up):
        passes = []
        if index < len(forwards):
            chunk, micro_batch = forwards[index]
            passes.append(("F", chunk * stages + rank, micro_batch))
        if 0 <= index - warm_up < len(forwards):
            chunk, micro_batch = forwards[index - warm_up]
            passes.append(("B", (chunks - 1 - chunk) * stages + rank, micro_batch))
        yield from [passes] if schedule.combined else ([one] for one in passes)


def _ends(stages: int, schedule: Schedule, micro_batches: int) -> dict[tuple, int]:
    """When each pass of a step is over, where transfers take no time."""
    waiting = [list(_steps(stages, rank, schedule, micro_batches)) for rank in range(stages)]
    last = stages * schedule.chunks - 1
    over: dict[tuple, int] = {}
    free = [0] * stages

    def input_end(kind: str, place: int, micro_batch: int) -> int | None:
        if place == (0 if kind == "F" else last):
            return 0 if kind == "F" else over.get(("F", last, micro_batch))
        return over.get((kind, place + (-1 if kind == "F" else 1), micro_batch))

    while any(waiting):
        passes_over = len(over)
        for rank, steps in enumerate(waiting):
            while steps:
                inputs = [input_end(*one) for one in steps[0]]
                if None in inputs:
                    break
                free[rank] = max(free[rank], *inputs)
                free[rank] += sum(FORWARD if one[0] == "F" else BACKWARD for one in steps[0])
                over |= dict.fromkeys(steps.pop(0), free[rank])
        if len(over) == passes_over:
            raise ValueError(f"{schedule} of {stages} stages waits for itself")
    return over


def _most_held(stages: int, rank: int, schedule: Schedule, micro_batches: int) -> tuple[int, int]:
    """The most activations, and the most gradients, at a time in one step."""
    over = _ends(stages, schedule, micro_batches)
    most = []
    for kind, step in (("F", -1), ("B", 1)):
        changes = []
        for place in range(rank, stages * schedule.chunks, stages):
            for micro_batch in range(micro_batches):
                sent = over.get((kind, place + step, micro_batch))
                if sent is not None:
                    # At one moment, what comes is counted before what goes.
                    changes += [(sent, -1), (over["B", place, micro_batch], 1)]
        held = highest = 0
        for _time, change in sorted(changes):
            held -= change
            highest = max(highest, held)
        most.append(highest)
    return most[0], most[1]


@cache
def messages_held(stages: int, rank: int, schedule: Schedule) -> tuple[int, int]:
    """The most activations, and the most gradients, that ``rank`` has been sent and still holds.

    Both are held until the backward pass that reads them is over. Transfers take no time and no
    send waits, so a schedule that has as much room never waits for it (a Kahn network that
    completes with bounded buffers does so in any timing).

    Raises:
        ValueError: a schedule in which every stage waits for another.
    """
    group = schedule.group or stages
    whole = group * max(3, -(-4 * stages // group))
    # A step of whole groups, and one that ends with the least rest that Megatron takes.
    counts = {whole, whole + stages % group}
    activations, gradients = zip(
        *(_most_held(stages, rank, schedule, count) for count in counts), strict=True
    )
    return max(activations), max(gradients)
