"""Who takes the Hopper kernels; what they compute is tested in tests/gpu."""

import interpreter  # noqa: F401
import pytest
import torch
import triton

from megatron_mhc.kernels import hopper


@pytest.fixture
def device(monkeypatch):
    """A GPU of compute capability 9.0, as far as one can tell."""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    hopper.hopper.cache_clear()
    yield torch.device("cuda:0")
    hopper.hopper.cache_clear()


def test_only_hopper_and_only_without_the_interpreter(device, monkeypatch):
    monkeypatch.setattr(triton, "__version__", "3.6.1")
    assert hopper.hopper(device)
    hopper.hopper.cache_clear()
    assert not hopper.hopper(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not hopper.hopper(device)
    hopper.hopper.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert not hopper.hopper(device)


def test_an_untested_triton_is_said(device, monkeypatch, caplog):
    monkeypatch.setattr(triton, "__version__", "3.9.0")
    assert not hopper.hopper(device)
    assert "tested with Triton 3.6.x, this is 3.9.0" in caplog.text


def test_other_streams_take_the_kernel_for_all_gpus(monkeypatch):
    monkeypatch.setattr(hopper, "hopper", lambda device: True)
    streams = torch.zeros(2, 4, 8, dtype=torch.bfloat16)
    f = streams[:, 0]
    assert hopper.serves_hopper(streams, None, 4)
    assert hopper.serves_hopper(streams, f, 4)
    assert not hopper.serves_hopper(streams, f.float(), 4)
    assert not hopper.serves_hopper(streams.float(), None, 4)
    assert not hopper.serves_hopper(streams, f, 2)
