"""What passes between sublayers: the streams, and the last sublayer's merge, not formed yet.

A sublayer hands on (X, pending merge of f with post and comb) instead of X'. Whoever needs X'
decides how it is formed: with the next sublayer's mappings in one kernel, before a send, or plain.
"""

from dataclasses import dataclass, replace

from torch import Tensor

from megatron_mhc import kernels

from . import recompute
from .discarded import Discarded
from .recompute import Mapped


@dataclass(frozen=True)
class PendingMerge:
    """A merge X'[o] = post[o] f + sum_i comb[i, o] X[i] whose inputs are known.

    Attributes:
        f: [..., C], the sublayer's output.
        post: [..., n] float32.
        comb: [..., n, n] float32, index (in, out).
    """

    f: Tensor
    post: Tensor
    comb: Tensor


@dataclass(frozen=True)
class StreamState:
    """The residual streams of every token, with at most one merge pending.

    Attributes:
        x: [..., n, C] in the model's dtype.
        pending: the merge that turns x into the streams, or None if x is the streams.
        discarded: stands in for x where it is recomputed, else None.
    """

    x: Tensor
    pending: PendingMerge | None = None
    discarded: Mapped | None = None

    @classmethod
    def expand(cls, h: Tensor, num_streams: int, backend: str = "auto") -> "StreamState":
        """The entry: the embedding h [..., C], once per stream."""
        return cls(kernels.mhc_expand(h, num_streams, backend=backend))

    @classmethod
    def from_flat(cls, flat: Tensor, num_streams: int) -> "StreamState":
        """Streams as they travel through Megatron, [s, b, n*C], stream-major.

        Raises:
            ValueError: the width is no multiple of the number of streams.
        """
        if flat.shape[-1] % num_streams:
            raise ValueError(f"width {flat.shape[-1]} does not hold {num_streams} streams")
        return cls(flat.unflatten(-1, (num_streams, -1)))

    def tensors(self) -> tuple[Tensor, ...]:
        """All that the streams are made from."""
        if self.pending is None:
            return (self.x,)
        return self.x, self.pending.f, self.pending.post, self.pending.comb

    @classmethod
    def from_tensors(cls, x: Tensor, *merge: Tensor) -> "StreamState":
        """The state that gave these :meth:`tensors`."""
        return cls(x, PendingMerge(*merge) if merge else None)

    def stand_ins(self) -> tuple[Discarded | None, ...]:
        """For each of :meth:`tensors`, its stand-in or None where it is kept: all but x always."""
        if self.discarded is None:
            return (None,) * len(self.tensors())
        return self.discarded.x, None, None, None

    def kept(self) -> "StreamState":
        """The same state, its tensors kept for the backward pass: a recomputed block starts."""
        return replace(self, discarded=None)

    def merged(self, backend: str = "auto") -> Tensor:
        """The streams [..., n, C], the merge formed."""
        if self.pending is None:
            return self.x

        def merge(*tensors: Tensor) -> tuple[Tensor]:
            return (kernels.mhc_post(*tensors, backend=backend),)

        if self.discarded is None:
            return merge(*self.tensors())[0]
        return recompute.run(merge, self.tensors(), self.stand_ins())[0][0]

    def to_flat(self, backend: str = "auto") -> Tensor:
        """The streams as they travel through Megatron, [s, b, n*C], the merge formed."""
        return self.merged(backend).flatten(-2)


@dataclass(frozen=True)
class Residual:
    """What a sublayer leaves aside while it computes: the streams it read, and how to merge.

    Attributes:
        x: [..., n, C], the streams that u was made from.
        post: [..., n] float32; comb: [..., n, n] float32, index (in, out).
        discarded: stand-ins for x and u where they are recomputed, else None.
    """

    x: Tensor
    post: Tensor
    comb: Tensor
    discarded: Mapped | None = None

    @property
    def u_stand_in(self) -> Discarded | None:
        """Stands in for the sublayer's input u where it is recomputed, else None."""
        return None if self.discarded is None else self.discarded.u

    def add(self, f: Tensor) -> StreamState:
        """The state after a sublayer that gave f [..., C]; its merge is left pending."""
        return StreamState(self.x, PendingMerge(f, self.post, self.comb), self.discarded)
