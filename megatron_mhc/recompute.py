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

import contextlib
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
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
            _replace(saved, self._result(), Discarded.get)
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


def _replace(saved, packed: object, unpack: Callable[[object], Tensor]) -> None:
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
        """Replay the stage's last block, norms and final merge too, without waiting for it.

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
            for mapping in mappings:
                mapping.form()
                for reference in mapping.followers:
                    follower = reference()
                    if follower is not None and follower not in mappings:
                        follower.form()


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
                    _replace(saved, _View(tensor, base, discarded), _View.get)


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
