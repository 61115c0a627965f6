"""Which forward pass is replayed ahead: that of the backward pass which comes next.

A replay needs nothing of the gradient that the backward pass waits for (paper section 4.3.3), so
it is put before that wait and runs while the gradient is on its way. On the main stream: that one
has nothing else to do then, and where the gradient is there already a stream beside it gains
nothing, since a matrix product leaves no room on an SM, and holds memory of its own
(docs/benchmarks/pipeline.md).
"""

import weakref
from collections import defaultdict

from torch import Tensor

from megatron_mhc.recompute_ahead import InFlight


class _Backward:
    """A hook of autograd: notes that the backward pass has begun. It goes with the graph."""

    begun = False

    def __call__(self, gradient: Tensor) -> None:
        self.begun = True


class _Noted:
    """A forward pass, and whether its backward pass is still to come."""

    def __init__(self, passed: InFlight, output: Tensor) -> None:
        self.passed = passed
        backward = _Backward()
        output.register_hook(backward)
        self._backward = weakref.ref(backward)

    @property
    def over(self) -> bool:
        """Whether its backward pass has begun, or nobody can ask for that any more."""
        backward = self._backward()
        return backward is None or backward.begun


class Replays:
    """The forward passes of a step whose stage recomputes, and the order of their backward passes.

    Megatron's schedules take groups of micro-batches; in each, chunks backwards, and a chunk's
    micro-batches in order. Without chunks that is the order of the forward passes.
    """

    def __init__(self) -> None:
        self.group = 1
        """Micro-batches that run one chunk in a row: microbatch_group_size_per_vp_stage."""
        self._passes: dict[int, list[_Noted]] = defaultdict(list)

    def begin(self, chunk: int, passed: InFlight, output: Tensor) -> None:
        """Note a forward pass that has just ended on the current stream, and gave ``output``."""
        if all(earlier.over for passes in self._passes.values() for earlier in passes):
            self._passes.clear()  # a new step
        self._passes[chunk].append(_Noted(passed, output))

    def next(self) -> InFlight | None:
        """The pass whose backward comes next; None if there is none, or it has not run yet."""
        if not self._passes:
            return None
        chunks = sorted(self._passes)
        # The first chunk is ahead of the others: a group that has begun its backward passes has
        # ended its forward passes there, so that the last one's true size is known.
        started = len(self._passes[chunks[0]])
        done = sum(noted.over for passes in self._passes.values() for noted in passes)
        first = 0
        while first < started:
            size = min(self.group, started - first)
            if done < size * len(chunks):
                passes = self._passes[chunks[-1 - done // size]]
                place = first + done % size
                return passes[place].passed if place < len(passes) else None
            done -= size * len(chunks)
            first += size
        return None

    def replay_next(self) -> bool:
        """Replay what the next backward pass needs first on the current stream, if it was not yet.

        Returns:
            Whether anything was replayed.
        """
        passed = self.next()
        if passed is None or not passed.waiting:
            return False
        passed.replay()
        return True


class ReplayedBefore:
    """The handle of a gradient's receive: before it is waited for, ``replay`` is called."""

    def __init__(self, handle, replay) -> None:
        self._handle = handle
        self._replay = replay

    def wait(self) -> None:
        """Wait for the gradient as the handle does."""
        self._replay()
        self._handle.wait()
