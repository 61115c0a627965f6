"""Slots of the copy transport in one process, how many a schedule needs, and what is refused."""

import gc
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_mhc import environment

sys.path.append(str(Path(__file__).resolve().parents[1] / "distributed"))
from host_engine import HostEngine  # noqa: E402

SHAPE, DTYPE = (3, 2, 8), torch.float32
BYTES = 3 * 2 * 8 * 4


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    """Megatron can be imported only after environment.prepare()."""
    environment.prepare()
    from megatron_mhc.pipeline import inbox, schedule_model, transport

    def make_tracks(group, wanted: str):
        return transport.make_tracks(group, wanted, schedule_model.Schedule(chunks=2), None)

    return SimpleNamespace(
        inbox=inbox, schedule_model=schedule_model, transport=transport, make_tracks=make_tracks
    )


@pytest.fixture
def ends(parts):
    """An inbox of two slots and its outlet."""
    inbox = parts.inbox.Inbox(HostEngine(), slots=2, size=BYTES, streams=(), seconds=0.05)
    outlet = parts.inbox.Outlet(HostEngine(), inbox.address, "activation", seconds=0.05)
    inbox.close_file()
    return inbox, outlet


def message(number: float) -> torch.Tensor:
    return torch.full(SHAPE, float(number))


def test_messages_come_in_order_and_whole(ends):
    inbox, outlet = ends
    for number in range(7):
        outlet.send(message(number))
        received = inbox.receive(SHAPE, DTYPE)
        assert torch.equal(received, message(number))
        del received


def test_a_slot_is_given_back_with_the_last_tensor_of_its_message(parts, ends):
    inbox, outlet = ends
    leaf = torch.empty(1).expand(SHAPE).detach().requires_grad_()
    outlet.send(message(1))
    outlet.send(message(2))
    leaf.data = inbox.receive(SHAPE, DTYPE)
    second = inbox.receive(SHAPE, DTYPE)
    loss = (leaf * leaf).sum()
    del leaf
    with pytest.raises(parts.inbox.NeighbourLost, match="all 2 slots of a neighbour were in use"):
        outlet.send(message(3))
    loss.backward()
    del loss
    gc.collect()
    outlet.send(message(3))
    assert torch.equal(second, message(2)), "another's message has not touched it"
    assert torch.equal(inbox.receive(SHAPE, DTYPE), message(3))


def test_every_stream_that_may_read_gives_a_slot_back(parts):
    """The sender must not write before the slowest of them."""

    class Streams(HostEngine):
        """One stream never comes to what it was told to write."""

        def write(self, word, value, stream=None):
            if stream != "stuck":
                super().write(word, value)

    inbox = parts.inbox.Inbox(Streams(), 1, BYTES, ("stuck",), seconds=0.05)
    outlet = parts.inbox.Outlet(HostEngine(), inbox.address, "gradient", seconds=0.05)
    inbox.close_file()
    outlet.send(message(1))
    received = inbox.receive(SHAPE, DTYPE)
    del received
    with pytest.raises(parts.inbox.NeighbourLost, match="slots"):
        outlet.send(message(2))


def test_a_message_that_does_not_come_is_an_error(parts, ends):
    inbox, _ = ends
    with pytest.raises(parts.inbox.NeighbourLost, match="waited for what its neighbour sends"):
        inbox.receive(SHAPE, DTYPE)


def test_a_message_that_does_not_fit_is_refused(ends):
    _, outlet = ends
    with pytest.raises(ValueError, match="expected a contiguous one of at most 512"):
        outlet.send(torch.zeros(129))
    with pytest.raises(ValueError, match="contiguous"):
        outlet.send(torch.zeros(4, 6).T)


def test_an_inbox_that_cannot_be_made_leaves_no_file(parts, monkeypatch, tmp_path):
    class Unmapped(HostEngine):
        def allocate(self, count):
            return 0

        def share(self, address):
            return b""

        def map_words(self, words):
            raise RuntimeError("cuMemHostRegister: CUDA_ERROR_OPERATING_SYSTEM")

    monkeypatch.setattr(parts.inbox, "FOLDER", tmp_path)
    with pytest.raises(RuntimeError, match="cuMemHostRegister"):
        parts.inbox.Inbox(Unmapped(), 2, BYTES, (), seconds=0.05)
    assert not list(tmp_path.iterdir())


def test_slots_are_those_that_the_schedule_fills(parts):
    def held(stages, rank, **schedule):
        schedule = parts.schedule_model.Schedule(**schedule)
        return parts.schedule_model.messages_held(stages, rank, schedule)

    # 1F1B: the last stage holds the activation it works on and one that has come.
    assert [held(2, rank) for rank in (0, 1)] == [(0, 1), (2, 0)]
    assert held(4, 1)[0] > held(4, 2)[0] > held(4, 3)[0]
    # Chunks: the first rank receives activations too, from the last.
    assert held(2, 0, chunks=2)[0] > 0
    # A larger group of micro-batches waits longer for its next chunk.
    assert held(2, 0, chunks=2, group=5)[0] > held(2, 0, chunks=2)[0]
    # Combined 1F1B is a forward pass further ahead.
    assert held(4, 0, chunks=2, combined=True)[0] == held(4, 0, chunks=2)[0] + 1


@pytest.mark.parametrize("combined", [False, True])
@pytest.mark.parametrize("more", [0, 1, 3])
def test_every_schedule_that_megatron_takes_ends(parts, combined, more):
    """Groups of as many micro-batches as there are stages, or more."""
    for stages in (2, 3, 4):
        for chunks in (2, 3):
            schedule = parts.schedule_model.Schedule(chunks, stages + more, combined)
            held = [parts.schedule_model.messages_held(stages, r, schedule) for r in range(stages)]
            assert all(gradients > 0 for _, gradients in held)


def test_a_schedule_that_waits_for_itself_is_refused(parts):
    """Combined 1F1B without chunks, which Megatron refuses too."""
    schedule = parts.schedule_model.Schedule(chunks=1, combined=True)
    with pytest.raises(ValueError, match=r"combined=True\) of 2 stages waits for itself"):
        parts.schedule_model.messages_held(2, 0, schedule)


@pytest.mark.parametrize("wanted", ["copy", "auto"])
def test_stages_that_are_not_on_gpus_cannot_copy(parts, wanted, monkeypatch):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "gloo")

    def gather(values, mine, group=None):
        values[:] = [mine, mine]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(parts.transport, "Tracks", lambda group, wraps: "tracks")
    group = SimpleNamespace(size=lambda: 2)
    if wanted == "auto":
        assert parts.make_tracks(group, wanted) == "tracks"
    else:
        with pytest.raises(parts.transport.TransportRefused, match="not on GPUs; use auto or nccl"):
            parts.make_tracks(group, wanted)


@pytest.mark.parametrize(
    ("hosts", "disabled", "why"),
    [(("a", "b"), "", "several hosts"), (("a", "a"), "1", "NCCL_P2P_DISABLE=1")],
)
def test_stages_that_cannot_reach_each_other_say_why(
    parts, monkeypatch, capsys, hosts, disabled, why
):
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setenv("NCCL_P2P_DISABLE", disabled)

    def gather(values, mine, group=None):
        values[:] = [mine] * 2 if group is None else [(mine[0], host) for host in hosts]

    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(parts.transport, "_fewest_sms", lambda group, wraps: "tracks")
    group = SimpleNamespace(size=lambda: 2)
    assert parts.make_tracks(group, "auto") == "tracks"
    said = capsys.readouterr().out
    assert "transfers go over NCCL, not by copy engines" in said
    assert why in said


def test_one_pipeline_that_cannot_copy_decides_for_all(parts, monkeypatch, capsys):
    """Else some ranks would wait for the others to make NCCL's groups."""
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group=None: 2)

    def gather(values, mine, group=None):
        assert mine is None, "this pipeline can"
        values[:] = [mine, "another cannot"]

    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    monkeypatch.setattr(parts.transport, "_copies", lambda *_: SimpleNamespace(said="copies"))
    monkeypatch.setattr(parts.transport, "_fewest_sms", lambda group, wraps: "tracks")
    assert parts.make_tracks("group", "auto") == "tracks"
    assert "another cannot" in capsys.readouterr().out


@pytest.mark.parametrize(("few", "chosen"), [(36.8, 2), (30.0, None)])
def test_nccl_takes_few_sms_where_they_are_as_fast(parts, monkeypatch, few, chosen):
    closed = []

    class Measured:
        def __init__(self, group, wraps, ctas):
            self.ctas = ctas

        def speed(self):
            return 36.9 if self.ctas is None else few

        def close(self):
            closed.append(self.ctas)

    monkeypatch.setattr(parts.transport, "Tracks", Measured)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda: 1)
    assert parts.transport._fewest_sms("group", wraps=True).ctas == chosen
    assert closed == [None if chosen else 2]
