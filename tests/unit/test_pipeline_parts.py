"""The parts of the pipeline that need no second process."""

import copy
import datetime
from types import SimpleNamespace

import pytest
import torch

from megatron_mhc import StreamState, environment


@pytest.fixture(scope="module")
def parts() -> SimpleNamespace:
    """The pipeline's names: Megatron can be imported only after environment.prepare()."""
    environment.prepare()
    from megatron_mhc.pipeline import ProgramOrder, boundary, outbox, slots
    from megatron_mhc.pipeline.tracks import Tracks
    from megatron_mhc.startup import _pipeline_line

    return SimpleNamespace(
        Completion=boundary.Completion,
        DeferredCommunicator=slots.DeferredCommunicator,
        DeferredGroups=slots.DeferredGroups,
        IN_FLIGHT=outbox.IN_FLIGHT,
        Outbox=outbox.Outbox,
        ProgramOrder=ProgramOrder,
        Tracks=Tracks,
        make_communicator=slots.make_communicator,
        pipeline_line=_pipeline_line,
        send_boundary=boundary.send_boundary,
    )


@pytest.fixture
def no_gpu(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


class Send:
    """A send whose end the test decides on."""

    def __init__(self) -> None:
        self.over = False
        self.waited_for = False

    def query(self) -> bool:
        return self.over

    def wait(self) -> None:
        self.waited_for = self.over = True


def test_memory_is_kept_while_a_send_reads_it_and_no_longer(parts):
    outbox, sends = parts.Outbox(), [Send() for _ in range(3)]
    for send in sends:
        outbox.add(parts.Completion(send.query, send.wait), torch.zeros(1))
    assert len(outbox) == 3
    sends[0].over = True
    outbox.add(parts.Completion(Send().query, print), torch.zeros(1))
    assert len(outbox) == 3
    assert not any(send.waited_for for send in sends[1:])


def test_too_many_sends_wait_for_the_oldest_only(parts):
    outbox, sends = parts.Outbox(), [Send() for _ in range(parts.IN_FLIGHT + 1)]
    for send in sends:
        outbox.add(parts.Completion(send.query, send.wait), torch.zeros(1))
    assert [send.waited_for for send in sends] == [True] + [False] * parts.IN_FLIGHT
    outbox.drain()
    assert all(send.waited_for for send in sends)
    assert len(outbox) == 0


def test_the_schedule_may_free_what_the_outbox_keeps():
    """Megatron frees a sent tensor by exchanging its data."""
    tensor = torch.arange(4.0)
    alias = tensor.detach()
    tensor.data = torch.empty(1)
    assert alias.tolist() == [0.0, 1.0, 2.0, 3.0]


def test_without_a_gpu_the_boundary_has_no_streams(parts, no_gpu):
    boundary = parts.send_boundary()
    assert isinstance(boundary, parts.ProgramOrder)
    streams = torch.randn(2, 3, 4, 8, requires_grad=True)
    output = boundary.form(StreamState(streams), "torch")
    assert output.shape == (2, 3, 32)
    assert output._base is None, "Megatron refuses to free a view"
    output.sum().backward()
    assert torch.equal(streams.grad, torch.ones_like(streams))


@pytest.mark.parametrize(("ctas", "expected"), [(None, 8), (2, 2)])
def test_tracks_take_the_pipelines_settings_of_nccl(parts, monkeypatch, ctas, expected):
    nccl = torch.distributed.ProcessGroupNCCL.Options()
    nccl.config.max_ctas = 8
    nccl._timeout = datetime.timedelta(minutes=33)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: "cuda:0")
    tracks = parts.Tracks.__new__(parts.Tracks)  # its groups need ranks
    tracks.ctas = ctas
    tracks.pp_group = SimpleNamespace(_get_backend=lambda device: SimpleNamespace(options=nccl))
    settings = tracks._settings()
    assert settings["backend"] == "nccl"
    assert settings["timeout"] == datetime.timedelta(minutes=33)
    assert settings["pg_options"].is_high_priority_stream
    assert settings["pg_options"].config.max_ctas == expected
    assert nccl.config.max_ctas == 8, "Megatron's own group keeps its settings"


def config(stages: int = 2, chunks: int | None = None) -> SimpleNamespace:
    return SimpleNamespace(
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks,
        hidden_size=64,
        overlap_p2p_comm=chunks is not None,
        batch_p2p_comm=chunks is None,
        overlap_p2p_comm_warmup_flush=False,
    )


def test_one_stage_needs_no_communicator(parts):
    assert parts.make_communicator(config(stages=1), 4, "post") is None


@pytest.mark.parametrize("chunks", [None, 2])
def test_overlap_post_sends_singly_and_receives_ahead(parts, no_gpu, chunks):
    settings = config(chunks=chunks)
    communicator = parts.make_communicator(settings, 4, "post")
    assert isinstance(communicator.boundary, parts.ProgramOrder)
    assert settings.batch_p2p_comm is False
    assert settings.overlap_p2p_comm_warmup_flush is (chunks is not None)


@pytest.mark.parametrize("chunks", [None, 2])
def test_overlap_none_leaves_megatrons_settings(parts, chunks):
    settings = config(chunks=chunks)
    communicator = parts.make_communicator(settings, 4, "none")
    assert communicator.boundary is None
    assert settings == config(chunks=chunks)


@pytest.mark.parametrize(
    ("chunks", "overlap", "expected"),
    [
        (None, "none", "2 stages, 1F1B; boundaries [s, b, 256] are merged and sent on the main"),
        (3, "post", "interleaved 1F1B, 3 chunks per stage; boundaries [s, b, 256] are merged and"),
    ],
)
def test_the_line_names_schedule_width_and_flag(parts, no_gpu, chunks, overlap, expected):
    settings = config(chunks=chunks)
    line = parts.pipeline_line(settings, parts.make_communicator(settings, 4, overlap), overlap)
    assert expected in line
    assert line.endswith(f"(--mhc-pipeline-overlap {overlap})")


def test_groups_are_looked_up_when_megatron_has_made_them(parts, monkeypatch):
    from megatron.core import parallel_state

    from tests.models import start_megatron

    groups = parts.DeferredGroups()
    monkeypatch.setattr(parallel_state, "model_parallel_is_initialized", lambda: False)
    assert groups.pp is None
    monkeypatch.undo()
    start_megatron()
    assert groups.pp is parallel_state.get_pipeline_model_parallel_group()
    assert groups.tp is parallel_state.get_tensor_model_parallel_group()


def test_copying_a_configuration_connects_nothing(parts):
    """Megatron copies and prints configurations before there are process groups."""
    copied = copy.deepcopy(parts.DeferredCommunicator(config(), 4))
    assert copied.num_streams == 4
    assert not hasattr(copied, "__len__")
    assert "pp_group" not in vars(copied)
