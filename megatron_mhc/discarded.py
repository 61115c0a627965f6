"""Stand-ins for tensors that were dropped after the forward pass, in the place of saved tensors."""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from .recompute import Replay


class Discarded:
    """A tensor that was dropped after the forward pass, until its source forms it again.

    Attributes:
        source: the replay that gives the tensor, None once it has; tensor is None before.
    """

    __slots__ = ("__weakref__", "formed", "source", "stream", "tensor")

    def __init__(self, source: "Replay") -> None:
        self.source: Replay | None = source
        self.tensor: Tensor | None = None

    def take(self, tensor: Tensor, stream, formed: torch.cuda.Event | None) -> None:
        """The replayed tensor; on a GPU, the stream it was formed on, and the event of when."""
        self.tensor, self.stream, self.formed = tensor.detach(), stream, formed
        self.source = None

    def get(self) -> Tensor:
        """The tensor, replayed if need be, safe to read on the current stream. Every call gives an
        object of its own, which the caller may empty, as Transformer Engine does."""
        if self.tensor is None:
            self.source.run()
        if self.formed is not None:
            # A stage's last merge and its backward pass may be on a stream of their own.
            stream = torch.cuda.current_stream()
            if stream != self.stream:
                stream.wait_event(self.formed)
                self.tensor.record_stream(stream)
        return self.tensor.detach()


def replace_saved(saved, packed: object, unpack: Callable[[object], Tensor]) -> None:
    """Let autograd hold ``packed`` where it holds a saved tensor."""
    saved.register_hooks(lambda _: packed, unpack)


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


class Known:
    """Tensors of which it is decided whether they are kept or discarded, and so their views.

    They are told by their storage, in whatever layer saved them.
    """

    def __init__(self) -> None:
        # The tensors are held: an address says something only while its storage is alive.
        self._of: dict[int, tuple[Tensor, Discarded | None]] = {}

    def add(self, tensor: Tensor, stand_in: Discarded | None) -> None:
        """``stand_in`` is that of a tensor to discard, None of one that stays."""
        address = _address(tensor)
        if address is not None:
            self._of[address] = (tensor, stand_in)

    @staticmethod
    def can_tell(tensor: Tensor) -> bool:
        """Whether it has a storage to be told by."""
        return _address(tensor) is not None

    def stand_in(self, tensor: Tensor) -> Discarded | None:
        """Of a tensor that ``tensor`` shares its storage with, where that is to be discarded."""
        return self._of.get(_address(tensor), (None, None))[1]

    def tensors(self) -> list[Tensor]:
        return [tensor for tensor, _ in self._of.values()]

    def replace(self, tensor: Tensor, saved) -> bool:
        """Let the graph hold a stand-in for a saved tensor, if that is a view of one to discard.

        Returns:
            Whether the tensor is known, discarded or not.
        """
        base, stand_in = self._of.get(_address(tensor), (None, None))
        if base is None or base.dtype != tensor.dtype:
            return False
        if stand_in is not None:
            replace_saved(saved, _View(tensor, base, stand_in), _View.get)
        return True
