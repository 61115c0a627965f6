"""Replay before the backward pass asks: what a pipeline does while it waits for the gradient."""

import weakref

from .recompute import Mapped, form


class InFlight:
    """A forward pass through a stage whose last block waits for its backward pass.

    Holds nothing in memory: it is over when autograd has released the block.

    Args:
        mapped: of the stage's last mapping; None where its last block is kept.
    """

    def __init__(self, mapped: Mapped | None) -> None:
        self._last = None if mapped is None else weakref.ref(mapped.x.source)

    @property
    def waiting(self) -> bool:
        """Whether there is anything left to replay."""
        last = None if self._last is None else self._last()
        return last is not None and not last.done

    def replay(self) -> None:
        """Replay the stage's last block, norms too, on the current stream."""
        if not self.waiting:
            return
        mappings = self._last().chain()
        form(mappings)
        for mapping in mappings:
            for reference in mapping.followers:
                follower = reference()
                if follower is not None:
                    form([follower])
