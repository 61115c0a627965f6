"""Megatron's schedules on paper: how many messages a stage holds at once."""

from collections.abc import Iterator
from functools import cache

FORWARD, BACKWARD = 1, 2
"""How long a chunk's passes take, in units of the forward pass."""


def _forward_order(micro_batches: int, chunks: int, group: int) -> list[tuple[int, int]]:
    """(chunk, micro-batch) of one rank's forward passes, which are every rank's."""
    return [
        (chunk, micro_batch)
        for first in range(0, micro_batches, group)
        for chunk in range(chunks)
        for micro_batch in range(first, min(first + group, micro_batches))
    ]


def _passes(
    stages: int, rank: int, chunks: int, group: int, micro_batches: int
) -> Iterator[tuple[str, int, int]]:
    """("F" or "B", place of the chunk among all stages, micro-batch) of a rank, in order."""
    forwards = _forward_order(micro_batches, chunks, group)
    warm_up = stages - rank - 1
    if chunks > 1:
        warm_up = 2 * warm_up + (chunks - 1) * group
    for index in range(len(forwards) + warm_up):
        if index < len(forwards):
            chunk, micro_batch = forwards[index]
            yield "F", chunk * stages + rank, micro_batch
        if 0 <= index - warm_up < len(forwards):
            chunk, micro_batch = forwards[index - warm_up]
            yield "B", (chunks - 1 - chunk) * stages + rank, micro_batch


def _ends(stages: int, chunks: int, group: int, micro_batches: int) -> dict[tuple, int]:
    """When each pass of a step is over, where transfers take no time."""
    waiting = [list(_passes(stages, rank, chunks, group, micro_batches)) for rank in range(stages)]
    last = stages * chunks - 1
    over: dict[tuple, int] = {}
    free = [0] * stages
    while any(waiting):
        for rank, passes in enumerate(waiting):
            while passes:
                kind, place, micro_batch = passes[0]
                needs = ("F", place - 1) if kind == "F" else ("B", place + 1)
                input_end = over.get((*needs, micro_batch))
                if input_end is None and place != (0 if kind == "F" else last):
                    break
                start = max(free[rank], input_end or 0)
                free[rank] = start + (FORWARD if kind == "F" else BACKWARD)
                over[tuple(passes.pop(0))] = free[rank]
    return over


@cache
def messages_held(stages: int, rank: int, chunks: int = 1, group: int = 0) -> tuple[int, int]:
    """The most activations, and the most gradients, that ``rank`` has been sent and still holds.

    Both are held until the backward pass that reads them is over. Transfers take no time and no
    send waits, so a schedule that has as much room never waits for it (a Kahn network that
    completes with bounded buffers does so in any timing).

    Args:
        stages, rank, chunks: of the pipeline. group: microbatch_group_size_per_vp_stage; 0 is
            ``stages``.
    """
    group = group or stages
    micro_batches = max(4 * stages, 3 * group)
    over = _ends(stages, chunks, group, micro_batches)
    most = []
    for kind, step in (("F", -1), ("B", 1)):
        changes = []
        for place in range(rank, stages * chunks, stages):
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
