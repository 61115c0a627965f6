"""The end of a pipeline stage: where its last merge is formed, and from where tensors are sent.

Megatron's schedule wants a tensor with its graph when the forward step returns, and does nothing
between that return and the send. So the block launches the merge, on the sending stream, and the
communicator issues the send from that stream: the main stream waits for neither.
"""

import contextlib
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from megatron_mhc.state import StreamState

from .replays import Replays


@dataclass(frozen=True)
class Completion:
    """How to ask whether a send is over, and how to wait for that on the host."""

    query: Callable[[], bool]
    wait: Callable[[], object]


def flat_output(state: StreamState, backend: str) -> Tensor:
    """What a stage sends, [s, b, n*C], formed on the current stream.

    Megatron frees what was sent, and asserts that it is no view.
    """
    return make_viewless_tensor(state.to_flat(backend), requires_grad=True, keep_graph=True)


def _same_memory(one: Tensor, other: Tensor) -> bool:
    return one.data_ptr() == other.data_ptr()


@functools.cache
def _priority_stream(device: int) -> torch.cuda.Stream:
    _least, greatest = torch.cuda.Stream.priority_range()
    return torch.cuda.Stream(device, priority=greatest)


class ProgramOrder:
    """The boundary without streams, for a CPU: what is called first runs first.

    Attributes:
        replays: the forward passes that recompute, noted by the blocks.
    """

    def __init__(self) -> None:
        self.replays = Replays()

    def form(self, state: StreamState, backend: str) -> Tensor:
        """The stage's output [s, b, n*C] of the model's dtype."""
        return flat_output(state, backend)

    def expect_gradient(self, received: Tensor) -> None:
        """Nothing to record: a gradient that is there is complete."""

    def sending(self, tensor: Tensor) -> contextlib.AbstractContextManager:
        """Around the call that sends ``tensor``."""
        return contextlib.nullcontext()

    def completion(self, handle) -> Completion:
        """When the send of ``handle`` has read its tensor."""
        return Completion(handle.is_completed, handle.wait)


class PriorityStream:
    """The boundary on CUDA: merges and sends on a stream of the highest priority.

    Autograd runs a node's backward on the stream of its forward, so the backward of the merge is on
    this stream too, and autograd orders it against its neighbours.

    Attributes:
        replays: the forward passes that recompute, noted by the blocks.
    """

    def __init__(self) -> None:
        self.replays = Replays()
        # Aliases, not addresses: memory that is held cannot come back as another tensor's.
        self._formed: Tensor | None = None
        self._gradient: tuple[Tensor, torch.cuda.Event] | None = None

    # The device is chosen after the command line is read, and a stream belongs to a device.
    @property
    def stream(self) -> torch.cuda.Stream:
        """Merges run here, and sends are issued behind them."""
        return _priority_stream(torch.cuda.current_device())

    @functools.cached_property
    def _completions(self) -> torch.cuda.Stream:
        return torch.cuda.Stream()

    def form(self, state: StreamState, backend: str) -> Tensor:
        """The stage's output [s, b, n*C], formed behind what the current stream holds now.

        The current stream does not wait for it. Only the communicator may read the output.
        """
        self.stream.wait_stream(torch.cuda.current_stream())
        for tensor in state.tensors():
            # Autograd need not save a merge's inputs, and in evaluation nothing does.
            tensor.record_stream(self.stream)
        with torch.cuda.stream(self.stream):
            output = flat_output(state, backend)
        self._formed = output.detach()
        return output

    def expect_gradient(self, received: Tensor) -> None:
        """Note the moment in which the gradient of ``received``, a leaf, is complete.

        Its send waits for that, not for what the backward pass launches after it.
        """

        def note(leaf: Tensor) -> None:
            ready = torch.cuda.Event()
            ready.record()
            self._gradient = (leaf.grad.detach(), ready)

        received.register_post_accumulate_grad_hook(note)

    @contextlib.contextmanager
    def sending(self, tensor: Tensor):
        """Makes this stream current, behind ``tensor`` and no more than that where it is known."""
        if self._gradient is not None and _same_memory(self._gradient[0], tensor):
            self.stream.wait_event(self._gradient[1])
            self._gradient = None
        elif self._formed is not None and _same_memory(self._formed, tensor):
            self._formed = None
        else:
            self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            yield

    def completion(self, handle) -> Completion:
        """When the send of ``handle`` has read its tensor; no stream of the model waits for it."""
        done = torch.cuda.Event()
        with torch.cuda.stream(self._completions):
            handle.wait()
            done.record()
        return Completion(done.query, done.synchronize)


def send_boundary() -> ProgramOrder | PriorityStream:
    """The boundary of --mhc-pipeline-overlap post on this machine."""
    return PriorityStream() if torch.cuda.is_available() else ProgramOrder()
