"""Replay before the backward pass asks: what a pipeline does while it waits for the gradient."""

import contextlib
import weakref

import torch

from .recompute import Mapped, form


class InFlight:
    """A forward pass through a stage whose last block waits for its backward pass.

    Holds nothing in memory: it is over when autograd has released the block.

    Args:
        mapped: of the stage's last mapping.
    """

    def __init__(self, mapped: Mapped) -> None:
        self._last = weakref.ref(mapped.x.source)
        self._made = None
        if torch.cuda.is_available():
            self._made = torch.cuda.current_stream().record_event()

    @property
    def waiting(self) -> bool:
        """Whether there is anything left to replay."""
        last = self._last()
        return last is not None and not last.done

    def replay(self, stream: torch.cuda.Stream | None = None) -> None:
        """Replay the stage's last block, norms too, without waiting for it.

        Args:
            stream: where to; None is the current one. It waits for the forward pass only. Whoever
                reads a replayed tensor waits for its own event.
        """
        if not self.waiting:
            return
        mappings = self._last().chain()
        with torch.cuda.stream(stream) if stream is not None else contextlib.nullcontext():
            if self._made is not None:
                torch.cuda.current_stream().wait_event(self._made)
            form(mappings)
            for mapping in mappings:
                for reference in mapping.followers:
                    follower = reference()
                    if follower is not None:
                        form([follower])
