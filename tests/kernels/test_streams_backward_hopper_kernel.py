"""Who takes the Hopper kernel; what it computes is tested in tests/gpu."""

import interpreter  # noqa: F401
import pytest
import torch
import triton

from megatron_mhc.kernels import launch_backward


@pytest.fixture
def device(monkeypatch):
    """A GPU of compute capability 9.0, as far as one can tell."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    launch_backward.hopper.cache_clear()
    yield torch.device("cuda:0")
    launch_backward.hopper.cache_clear()


def test_only_hopper_and_only_without_the_interpreter(device, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.6.1")
    assert launch_backward.hopper(device)
    launch_backward.hopper.cache_clear()
    assert not launch_backward.hopper(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not launch_backward.hopper(device)
    launch_backward.hopper.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not launch_backward.hopper(device)


def test_an_untested_triton_is_said(device, monkeypatch, caplog):
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert not launch_backward.hopper(device)
    assert "tested with Triton 3.6.x, this is 3.9.0" in caplog.text


def test_other_streams_take_the_kernel_for_all_gpus(monkeypatch):
    monkeypatch.setattr(launch_backward, "hopper", lambda device: True)
    streams = torch.zeros(2, 4, 8, dtype=torch.bfloat16)
    assert launch_backward.serves_hopper(streams, 4)
    assert not launch_backward.serves_hopper(streams.float(), 4)
    assert not launch_backward.serves_hopper(streams, 2)
