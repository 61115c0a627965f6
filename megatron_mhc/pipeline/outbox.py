"""Sends on their way: their memory is kept until they have read it, and no stream waits."""

from collections import deque

from torch import Tensor

from .boundary import Completion

IN_FLIGHT = 4
"""Sends before the host waits for the oldest: two micro-batches, forward and backward.

The allocator gives memory that two streams used back when the GPU is done with it, so a host that
runs a whole step ahead would hold the boundaries of a whole step.
"""


class Outbox:
    """The sends of one stage that are not over."""

    def __init__(self) -> None:
        self._sends: deque[tuple[Completion, Tensor]] = deque()

    def __len__(self) -> int:
        return len(self._sends)

    def add(self, completion: Completion, tensor: Tensor) -> None:
        """Keep ``tensor`` until its send is over; wait on the host where too many are not."""
        self._sends.append((completion, tensor))
        while self._sends and (len(self._sends) > IN_FLIGHT or self._sends[0][0].query()):
            self._release_oldest()

    def drain(self) -> None:
        """Wait on the host until every send is over."""
        while self._sends:
            self._release_oldest()

    def _release_oldest(self) -> None:
        completion, _tensor = self._sends[0]
        completion.wait()
        self._sends.popleft()
