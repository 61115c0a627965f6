"""A sublayer's input u and its normalised form: dropped from what the sublayer saved.

A norm reports what it gave: a norm module by a hook, and the one inside
Transformer Engine's LayerNormLinear by ``patches/te_normalization.py``.
"""

import contextlib
import weakref
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from .discarded import Discarded, Known
from .recompute import CallAgain
from .saved_tensors import saved_between


class _Sublayer:
    """What one sublayer computes from its input u [..., C], while it runs."""

    def __init__(self, u: Tensor, discarded: Discarded) -> None:
        self._discarded = discarded
        self._known = Known()
        self._known.add(u, discarded)

    def add_norm(self, norm: Callable[[Tensor], Tensor], u: Tensor, y: Tensor) -> None:
        """Note that ``norm(u)`` gave y, if that is this sublayer's u."""
        if self._known.stand_in(u) is not self._discarded or not Known.can_tell(y):
            return
        shape = u.shape

        def norm_again(u: Tensor) -> tuple[Tensor]:
            return (norm(u.view(shape)),)

        again = CallAgain(norm_again, [self._discarded], [u.requires_grad])
        if self._discarded.source is not None:
            self._discarded.source.followers.append(weakref.ref(again))
        self._known.add(y, again.result(0))
        again.discard_saved([y], [u], self._known)

    def discard_input(self, f: Tensor) -> None:
        """Drop u and its normalised form from what the sublayer that gave f saved."""
        for tensor, saved, _ in saved_between([f], self._known.tensors()):
            self._known.replace(tensor, saved)


_running: ContextVar[_Sublayer | None] = ContextVar("the sublayer that runs now", default=None)


@contextlib.contextmanager
def sublayer(u: Tensor, discarded: Discarded | None) -> Iterator[Callable[[Tensor], None]]:
    """The sublayer of input u runs inside the block; norms report to it what they gave.

    Args:
        u: [..., C]. discarded: its stand-in, or None where nothing is recomputed.

    Yields:
        What to call with the sublayer's output f: drops u and its normalised form.
    """
    if discarded is None:
        yield lambda f: None
        return
    running = _Sublayer(u, discarded)
    token = _running.set(running)
    try:
        yield running.discard_input
    finally:
        _running.reset(token)


def report_norm(norm: Callable[[Tensor], Tensor], u: Tensor, y: Tensor) -> None:
    """What a norm calls after it gave y = norm(u); does nothing outside a recomputed sublayer.

    Args:
        norm: is called again in the backward pass, with the replayed u.
        u: the norm's input, or a view of all of it. y: its output.
    """
    running = _running.get()
    if running is not None:
        running.add_norm(norm, u, y)


def reporting(norm: torch.nn.Module) -> None:
    """Have a norm module report what it gives."""
    norm.register_forward_hook(
        lambda module, inputs, output: report_norm(module.forward, inputs[0], output)
    )
