"""What PriorityStream orders against what, on streams that only write down what they are told."""

import contextlib

import pytest
import torch

from megatron_mhc import StreamState, environment
from megatron_mhc.state import PendingMerge


class FakeEvent:
    def __init__(self) -> None:
        self.place = None

    def record(self, stream=None) -> None:
        self.place = f"{(stream or FakeStream.current).name} at {len(FakeStream.log)}"

    query = synchronize = record


class FakeStream:
    """A stream that logs; ``current`` is torch.cuda.current_stream()."""

    log: list[tuple] = []
    made: list["FakeStream"] = []
    current: "FakeStream"

    def __init__(self, device=None, priority: int = 0, name: str = "") -> None:
        self.name = name or f"stream of priority {priority}"
        FakeStream.made.append(self)

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, -5

    def wait_stream(self, other: "FakeStream") -> None:
        FakeStream.log.append((self.name, "waits for", other.name))

    def wait_event(self, event: FakeEvent) -> None:
        FakeStream.log.append((self.name, "waits for event on", event.place))


@contextlib.contextmanager
def entered(stream: FakeStream):
    before, FakeStream.current = FakeStream.current, stream
    yield
    FakeStream.current = before


@pytest.fixture
def boundary(monkeypatch):
    environment.prepare()
    from megatron_mhc.pipeline import PriorityStream
    from megatron_mhc.pipeline.boundary import _priority_stream

    FakeStream.log, FakeStream.made = [], []
    FakeStream.current = FakeStream(name="main")
    monkeypatch.setattr(torch.cuda, "Stream", FakeStream)
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: FakeStream.current)
    monkeypatch.setattr(
        torch.Tensor,
        "record_stream",
        lambda tensor, stream: FakeStream.log.append((tuple(tensor.shape), "used on", stream.name)),
    )
    _priority_stream.cache_clear()
    yield PriorityStream()
    _priority_stream.cache_clear()


HIGH = "stream of priority -5"


def state() -> StreamState:
    x, f = torch.randn(3, 2, 4, 8), torch.randn(3, 2, 8)
    return StreamState(x, PendingMerge(f, torch.rand(3, 2, 4), torch.rand(3, 2, 4, 4)))


def send(boundary, tensor: torch.Tensor) -> str:
    """Where a send of ``tensor`` is issued from."""
    with boundary.sending(tensor.detach()):
        return FakeStream.current.name


def test_a_merge_waits_for_its_inputs_and_keeps_their_memory(boundary):
    output = boundary.form(state(), "torch")
    assert output.shape == (3, 2, 32)
    assert FakeStream.log[0] == (HIGH, "waits for", "main")
    used = {shape for shape, what, stream in FakeStream.log[1:] if stream == HIGH}
    assert used == {(3, 2, 4, 8), (3, 2, 8), (3, 2, 4), (3, 2, 4, 4)}
    assert FakeStream.current.name == "main", "the main stream goes on"


def test_a_merged_output_is_sent_behind_its_merge_alone(boundary):
    output = boundary.form(state(), "torch")
    FakeStream.log.clear()
    assert send(boundary, output) == HIGH
    assert FakeStream.log == []


def test_a_tensor_from_elsewhere_is_waited_for(boundary):
    boundary.form(state(), "torch")
    FakeStream.log.clear()
    assert send(boundary, torch.randn(3, 2, 32)) == HIGH
    assert FakeStream.log == [(HIGH, "waits for", "main")]


def test_a_gradient_is_sent_behind_the_moment_it_was_complete(boundary):
    received = torch.randn(3, 2, 32, requires_grad=True)
    boundary.expect_gradient(received)
    (received * 2).sum().backward()
    for _ in range(3):  # what the backward pass does after that
        FakeStream.log.append(("main", "works", ""))
    assert send(boundary, received.grad) == HIGH
    assert FakeStream.log[3:] == [(HIGH, "waits for event on", "main at 0")]


def test_an_event_serves_one_send(boundary):
    received = torch.randn(3, 2, 32, requires_grad=True)
    boundary.expect_gradient(received)
    (received * 2).sum().backward()
    send(boundary, received.grad)
    FakeStream.log.clear()
    send(boundary, received.grad)
    assert FakeStream.log == [(HIGH, "waits for", "main")]


def test_no_stream_of_the_model_waits_for_a_send(boundary):
    class Handle:
        def wait(self):
            FakeStream.log.append((FakeStream.current.name, "waits for", "NCCL"))

    high = boundary.stream
    completion = boundary.completion(Handle())
    ((where, _, _),) = FakeStream.log
    assert where not in ("main", high.name)
    assert completion.query.__self__.place == f"{where} at 1"
