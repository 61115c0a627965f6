"""A sublayer's input u and its normalised form: dropped from what the sublayer saved.

Which saved tensors they are is told by their storage, so views of them are found too, in whatever
layer saved them. A norm reports what it gave: a norm module by a hook, and the one inside
Transformer Engine's LayerNormLinear by ``patches/te_normalization.py``.
"""

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar

import torch
from torch import Tensor

from .recompute import Discarded, Replay, replace_saved
from .saved_tensors import saved_between


class _View:
    """A view of a discarded tensor."""

    __slots__ = ("_discarded", "_offset", "_size", "_stride")

    def __init__(self, view: Tensor, base: Tensor, discarded: Discarded) -> None:
        self._discarded = discarded
        self._size, self._stride = view.size(), view.stride()
        self._offset = view.storage_offset() - base.storage_offset()

    def get(self) -> Tensor:
        base = self._discarded.get()
        return base.as_strided(self._size, self._stride, base.storage_offset() + self._offset)


def _address(tensor: Tensor) -> int | None:
    """Where a tensor's storage begins; None for subclasses, whose storage may be none."""
    if type(tensor) is not Tensor or not tensor.numel():
        return None
    return tensor.untyped_storage().data_ptr()


class _Sublayer:
    """What one sublayer computes from its input u [..., C], while it runs."""

    def __init__(self, u: Tensor, discarded: Discarded) -> None:
        self._u = u
        # The tensors are held: an address says something only while its storage is alive.
        self._known: dict[int | None, tuple[Tensor, Discarded]] = {_address(u): (u, discarded)}

    def add_norm(self, norm: Callable[[Tensor], Tensor], u: Tensor, y: Tensor) -> None:
        """Note that ``norm(u)`` gave y, if that is this sublayer's u."""
        if _address(y) is None or _address(u) != _address(self._u):
            return
        _, discarded = self._known[_address(u)]
        shape = u.shape

        def norm_again(u: Tensor) -> tuple[Tensor]:
            return (norm(u.view(shape)),)

        replay = Replay(norm_again, [discarded], [u.requires_grad])
        (stand_in,) = replay.discard([y], [u])
        self._known[_address(y)] = (y, stand_in)

    def discard_input(self, f: Tensor) -> None:
        """Drop u and its normalised form from what the sublayer that gave f saved."""
        for tensor, saved in saved_between([f], [known for known, _ in self._known.values()]):
            address = _address(tensor)
            if address in self._known and address is not None:
                base, discarded = self._known[address]
                if base.dtype == tensor.dtype:
                    replace_saved(saved, _View(tensor, base, discarded), _View.get)


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
