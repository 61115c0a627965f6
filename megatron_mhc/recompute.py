"""Recompute what mHC adds: streams and sublayer inputs are dropped, and formed again in backward.

Of a block of sublayers the streams before its first mapping, every sublayer's output f and the
mappings are kept (paper section 4.3.2, Table 3). X', the aggregated input u and what the input norm
makes of it are discarded after the forward pass; the first of them that the backward pass asks for
forms those of the whole block again (:mod:`.recompute_mapping`), without the sublayers, and every
replayed value has the forward's bits.

How: autograd's graph stays as the forward pass built it, and the saved tensors in it that are to
go are replaced one by one by a :class:`~.discarded.Discarded`. Gradients are summed in the same
order, and what is not replaced (parameters, a sublayer's own activations) is untouched.
"""

import itertools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Self

import torch
from torch import Tensor

from .discarded import Discarded, Known, replace_saved
from .saved_tensors import saved_between


class Replay(ABC):
    """Forms discarded tensors again, from tensors that are kept or discarded themselves.

    Attributes:
        followers: what to form of its results where it is replayed ahead of the backward pass.
    """

    def __init__(self, inputs: Sequence[Tensor | Discarded]) -> None:
        self._inputs: list[Tensor | Discarded] | None = [
            i if isinstance(i, Discarded) else i.detach() for i in inputs
        ]
        # Weak: a tensor that nobody waits for any more is not kept.
        self._results: dict[int, weakref.ref[Discarded]] = {}
        self.followers: list[weakref.ref[Replay]] = []

    def result(self, index: int) -> Discarded:
        """A stand-in for one of the tensors that it gives."""
        result = Discarded(self)
        self._results[index] = weakref.ref(result)
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
        form(self.chain())

    def given(self) -> list[Tensor]:
        """What it is made from, which must have been formed."""
        return [i.get() if isinstance(i, Discarded) else i for i in self._inputs]

    @classmethod
    @abstractmethod
    def form_all(cls, replays: Sequence[Self]) -> None:
        """Run replays of this kind, each of which takes what the one before it gives."""

    def _finish(self, tensors: Sequence[Tensor], stream, formed: torch.cuda.Event | None) -> None:
        """Hand over what it has formed."""
        for index, reference in self._results.items():
            result = reference()
            if result is not None:
                result.take(tensors[index], stream, formed)
        self._inputs = None


def form(replays: Sequence[Replay]) -> None:
    """Run replays, in order, on the current stream."""
    for kind, group in itertools.groupby(replays, type):
        kind.form_all(list(group))


def now(given: Sequence[Tensor]) -> tuple[torch.cuda.Stream | None, torch.cuda.Event | None]:
    """The current stream and an event on it, where something was formed of ``given``."""
    if not given[0].is_cuda:
        return None, None
    stream, formed = torch.cuda.current_stream(), torch.cuda.Event()
    formed.record(stream)
    for tensor in given:  # they may be freed before this stream has read them
        tensor.record_stream(stream)
    return stream, formed


def discard_known(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor], known: Known
) -> tuple[list[tuple[int, object]], int]:
    """Drop known tensors from what autograd saved of a call.

    The small tensors of an autograd.Function stay: it saves what it needs, a mapping's coefficients
    or a norm's factor. PyTorch's own operations save every step on the way.

    Returns:
        What has yet to be discarded, of all saved tensors, each with its index among them; and how
        many there are.
    """
    unknown, count, large = [], 0, inputs[0].numel()
    for tensor, saved, of_function in saved_between(outputs, inputs):
        stays = of_function and tensor.numel() < large
        if not known.replace(tensor, saved) and not stays:
            unknown.append((count, saved))
        count += 1
    return unknown, count


class CallAgain(Replay):
    """A function that is called again, for what it gives and for what autograd saves of it.

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
        super().__init__(inputs)
        self._function = function
        self._requires_grad = requires_grad
        self._with_graph = torch.is_grad_enabled()  # not inside an autograd.Function
        self._gives = 0

    def discard_saved(
        self, outputs: Sequence[Tensor], inputs: Sequence[Tensor], known: Known
    ) -> None:
        """Drop what autograd saved of the call, known tensors for their own stand-ins.

        Args:
            outputs, inputs: the tensors of the call in the forward pass.
        """
        self.discard_unknown(outputs, *discard_known(outputs, inputs, known))

    def discard_unknown(
        self, outputs: Sequence[Tensor], unknown: Sequence[tuple[int, object]], count: int
    ) -> None:
        """Drop what :func:`discard_known` left."""
        for index, saved in unknown:
            replace_saved(saved, self.result(len(outputs) + index), Discarded.get)
        self._gives = len(outputs) + count

    @classmethod
    def form_all(cls, replays: Sequence[Self]) -> None:
        for replay in replays:
            replay._form()

    def _form(self) -> None:
        given = self.given()
        leaves = [
            tensor.detach().requires_grad_(flag) for tensor, flag in zip(given, self._requires_grad)
        ]
        with torch.set_grad_enabled(self._with_graph):
            outputs = self._function(*leaves)
        tensors = [*outputs, *(tensor for tensor, _, _ in saved_between(outputs, leaves))]
        if len(tensors) != self._gives:
            raise RuntimeError(
                f"the replay of {self._function} gave {len(tensors)} tensors, the forward pass "
                f"{self._gives}: it does not do the same thing twice"
            )
        self._finish(tensors, *now(given))
        self._function = None


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
    again = call_again(function, tensors, discarded)
    stand_ins = tuple(again.result(index) for index in range(len(outputs)))
    known = Known()
    for tensor, stand_in in zip([*outputs, *tensors], [*stand_ins, *discarded]):
        known.add(tensor, stand_in)
    again.discard_saved(outputs, tensors, known)
    return outputs, stand_ins


def call_again(
    function: Callable[..., Sequence[Tensor]],
    tensors: Sequence[Tensor],
    discarded: Sequence[Discarded | None],
) -> CallAgain:
    """The replay of ``function(*tensors)``; arguments as :func:`run`."""
    inputs = [
        tensor if stand_in is None else stand_in for stand_in, tensor in zip(discarded, tensors)
    ]
    return CallAgain(function, inputs, [tensor.requires_grad for tensor in tensors])


class Mapped(NamedTuple):
    """Stand-ins for what is discarded of a mapping: x [..., n, C] and u [..., C]."""

    x: Discarded
    u: Discarded
