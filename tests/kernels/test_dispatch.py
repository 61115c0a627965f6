"""Which implementation serves a call, and that a user can tell."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_mhc.kernels import choose_backend, dispatch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def gpu(monkeypatch):
    """As on a GPU that Triton supports, as far as dispatch can see."""
    for problem in ("_device_problem", "_memory_problem"):
        monkeypatch.setattr(dispatch, problem, lambda *_: None)
    monkeypatch.setattr(dispatch, "_said", set())


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_auto_takes_triton_where_it_serves(gpu, n, dtype):
    x = torch.zeros(3, n, 16, dtype=dtype)
    assert choose_backend("auto", (x,), n=n, channels=16) == "triton"


@pytest.mark.parametrize(
    ("dtype", "n", "channels", "mixing", "reason"),
    [
        (torch.float16, 4, 16, "sinkhorn", "torch.float16 has no kernel"),
        (torch.float64, 4, 16, "sinkhorn", "torch.float64 has no kernel"),
        (torch.bfloat16, 3, 16, "sinkhorn", "n=3 is not one of 2, 4, 8"),
        (torch.bfloat16, 4, 12, "sinkhorn", "C=12 is not a multiple of 8"),
        (torch.bfloat16, 4, 16, "identity", "residual_mixing='identity' has no kernel"),
    ],
)
def test_auto_says_why_not_and_triton_refuses(gpu, caplog, dtype, n, channels, mixing, reason):
    tensors = (torch.zeros(3, n, channels, dtype=dtype),)
    call = {"n": n, "channels": channels, "residual_mixing": mixing}
    assert choose_backend("auto", tensors, **call) == "torch"
    assert f"PyTorch is in use, not Triton ({reason})" in caplog.text
    with pytest.raises(RuntimeError, match="backend='triton': .*use backend='auto' or 'torch'"):
        choose_backend("triton", tensors, **call)


def test_one_device_for_all_tensors(gpu, caplog):
    tensors = torch.zeros(3, 4, 16), torch.zeros(24, 64, device="meta")
    assert choose_backend("auto", tensors, n=4, channels=16) == "torch"
    assert "the tensors are on several devices" in caplog.text


@pytest.mark.parametrize(("memory", "backend"), [(227, "triton"), (163, "triton"), (99, "torch")])
def test_eight_streams_take_shared_memory(monkeypatch, memory, backend):
    """99 KB: compute capability 8.6, 8.9 and 12.0."""
    properties = SimpleNamespace(shared_memory_per_block_optin=memory * 1024)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(dispatch, "_device_problem", lambda device: None)
    dispatch._memory_problem.cache_clear()
    assert choose_backend("auto", (torch.zeros(3, 8, 16),), n=8) == backend
    assert choose_backend("auto", (torch.zeros(3, 4, 16),), n=4) == "triton"
    dispatch._memory_problem.cache_clear()


def test_rocm_is_not_taken_for_cuda(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "6.4")
    dispatch._device_problem.cache_clear()
    assert "NVIDIA" in dispatch._device_problem(torch.device("cuda:0"))
    dispatch._device_problem.cache_clear()


def test_dispatch_is_no_obstacle_to_torch_compile():
    """In a process of its own: the CPU stand-ins of other tests turn torch.compile off."""
    program = """
import warnings
import torch
from megatron_mhc import kernels
warnings.filterwarnings("error", message=".*lru_cache.*")
x, h = torch.randn(3, 4, 8), torch.randn(3, 8)
mapping = [torch.randn(*s) for s in kernels.mapping_shapes("sinkhorn", 4, 8).values()]
compiled = torch.compile(lambda *a: kernels.mhc_pre(*a)[0], fullgraph=True, backend="eager")
torch.testing.assert_close(compiled(x, *mapping), kernels.mhc_pre(x, *mapping)[0])
print("same")
"""
    run = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert run.stdout.strip() == "same", run.stderr
