"""Recompute what mHC adds: streams and sublayer inputs are dropped, and formed again in backward.

Of a block of sublayers only the streams before its first mapping and every sublayer's output f are
kept (paper section 4.3.2, Table 3). X', the coefficients, the aggregated input u and what the
input norm makes of it are discarded after the forward pass; the first of them that the backward
pass asks for runs the block's mappings again, by the very operators of the forward pass and
without the sublayers, so that every replayed value has the forward's bits.

How: autograd's graph stays as the forward pass built it, and the saved tensors in it that are to
go are replaced one by one by a :class:`Discarded`. No graph is built twice, gradients are summed
in the same order, and what is not replaced (parameters, a sublayer's own activations) is untouched.
"""

import weakref
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .saved_tensors import saved_between


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


class Replay:
    """One call whose results are discarded, and what it takes to make it again.

    Args:
        function: gives the same tensors for the same inputs, without random numbers.
        inputs: what it was called with, kept or discarded themselves.
        requires_grad: of each input.
    """

    def __init__(
        self,
        function: Callable[..., Sequence[Tensor]],
        inputs: Sequence[Tensor | Discarded],
        requires_grad: Sequence[bool],
    ) -> None:
        self._function = function
        self._inputs: list[Tensor | Discarded] | None = [
            i if isinstance(i, Discarded) else i.detach() for i in inputs
        ]
        self._requires_grad = requires_grad
        self._with_graph = torch.is_grad_enabled()  # not inside an autograd.Function
        # Weak: a tensor that nobody waits for any more is not kept, and not replayed for nobody.
        self._results: list[weakref.ref[Discarded]] = []
        self.followers: list[weakref.ref[Replay]] = []  # what takes its results
        if self.previous is not None:
            self.previous.followers.append(weakref.ref(self))

    def discard(self, outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> tuple[Discarded, ...]:
        """Drop what autograd saved of the call; returns stand-ins for its outputs.

        Args:
            outputs, inputs: the tensors of the call in the forward pass.
        """
        stand_ins = tuple(self._result() for _ in outputs)
        for _, saved in saved_between(outputs, inputs):
            replace_saved(saved, self._result(), Discarded.get)
        return stand_ins

    def _result(self) -> Discarded:
        result = Discarded(self)
        self._results.append(weakref.ref(result))
        return result

    @property
    def done(self) -> bool:
        """Whether it has run."""
        return self._inputs is None

    @property
    def previous(self) -> "Replay | None":
        """The replay that has to run before this one, or None."""
        sources = (i.source for i in self._inputs if isinstance(i, Discarded))
        return next((source for source in sources if source is not None), None)

    def chain(self) -> list["Replay"]:
        """What has not run yet from the block's first replay up to this one, in order."""
        replays, replay = [], self
        while replay is not None and not replay.done:
            replays.append(replay)
            replay = replay.previous
        return replays[::-1]

    def run(self) -> None:
        """Form everything discarded that is still waited for, after what it is made from."""
        for replay in self.chain():
            replay.form()

    def form(self) -> None:
        """Run the call again on the current stream; what it takes must have been formed.

        Raises:
            RuntimeError: the call saved something else than in the forward pass.
        """
        given = [i.get() if isinstance(i, Discarded) else i for i in self._inputs]
        leaves = [
            tensor.detach().requires_grad_(flag) for tensor, flag in zip(given, self._requires_grad)
        ]
        with torch.set_grad_enabled(self._with_graph):
            outputs = self._function(*leaves)
        tensors = [*outputs, *(tensor for tensor, _ in saved_between(outputs, leaves))]
        if len(tensors) != len(self._results):
            raise RuntimeError(
                f"the replay of {self._function} gave {len(tensors)} tensors, the forward pass "
                f"{len(self._results)}: it does not do the same thing twice"
            )
        stream = formed = None
        if given[0].is_cuda:
            stream, formed = torch.cuda.current_stream(), torch.cuda.Event()
            formed.record(stream)
            for tensor in given:  # they may be freed before this stream has read them
                tensor.record_stream(stream)
        for reference, tensor in zip(self._results, tensors):
            result = reference()
            if result is not None:
                result.take(tensor, stream, formed)
        self._inputs = self._function = None


def replace_saved(saved, packed: object, unpack: Callable[[object], Tensor]) -> None:
    """Let autograd hold ``packed`` where it holds a saved tensor."""
    saved.register_hooks(lambda _: packed, unpack)


def run(
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    discarded: Sequence[Discarded | None],
) -> tuple[Sequence[Tensor], tuple[Discarded, ...]]:
    """Call a function and discard all that it gives and saves.

    Args:
        function: of tensors, gives a tuple of tensors; without random numbers.
        tensors: what to call it with.
        discarded: for each of them its stand-in, or None to keep it for the replay.

    Returns:
        Its outputs, for the forward pass, and their stand-ins, for later replays.
    """
    outputs = function(*tensors)
    inputs = [
        tensor if stand_in is None else stand_in for stand_in, tensor in zip(discarded, tensors)
    ]
    replay = Replay(function, inputs, [tensor.requires_grad for tensor in tensors])
    return outputs, replay.discard(outputs, tensors)


class Mapped(NamedTuple):
    """Stand-ins for what a mapping gives: streams, the sublayer's input and the merge's mappings.

    The tensors are x [..., n, C], u [..., C], post [..., n] and comb [..., n, n].
    """

    x: Discarded
    u: Discarded
    post: Discarded
    comb: Discarded
