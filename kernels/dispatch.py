"""Which implementation serves a call: ``backend="auto" | "triton" | "torch"``."""

import importlib.util
import logging
import os
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")
TRITON_STREAMS = (2, 4, 8)
# float16 streams compile and run, but were three times less exact than PyTorch's on an H200.
TRITON_DTYPES = (torch.bfloat16, torch.float32)

_HAVE_TRITON = importlib.util.find_spec("triton") is not None
_said: set[str] = set()


# Bytes of shared memory a block that the gradient for eight streams takes, the least on any GPU.
EIGHT_STREAMS_MEMORY = 144 * 1024


@lru_cache
def _device_problem(device: torch.device) -> str | None:
    """Why compiled Triton cannot run on ``device``, or None."""
    if not _HAVE_TRITON:
        return "triton is not installed"
    if device.type != "cuda":
        return f"the tensors are on {device.type}"
    if torch.version.hip:
        return "the kernels are for NVIDIA's GPUs"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"compute capability {major}.{minor} is less than 8.0"
    return None


@lru_cache
def _memory_problem(device: torch.device, n: int) -> str | None:
    """Why ``n`` streams are too many for the shared memory of ``device``, or None."""
    if n < 8:
        return None
    memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if memory >= EIGHT_STREAMS_MEMORY:
        return None
    return f"n={n} takes {EIGHT_STREAMS_MEMORY >> 10} KB of shared memory, there are {memory >> 10}"


# Constant to torch.compile, which looks through caches (and warns): what a machine is does not
# belong into a graph.
@torch.compiler.assume_constant_result
def _machine_problem(device: torch.device, n: int) -> str | None:
    return _device_problem(device) or _memory_problem(device, n)


@torch.compiler.assume_constant_result
def _say_once(problem: str) -> None:
    if problem not in _said:
        _said.add(problem)
        logger.warning("mHC kernels: PyTorch is in use, not Triton (%s)", problem)


def _triton_problem(
    backend: str,
    tensors: tuple[Tensor, ...],
    n: int | None,
    channels: int | None,
    residual_mixing: str,
    dtype: torch.dtype | None,
) -> str | None:
    """Why the Triton kernels cannot serve a call, in one line, or None."""
    if residual_mixing != "sinkhorn":
        return f"residual_mixing={residual_mixing!r} has no kernel"
    if n is not None and n not in TRITON_STREAMS:
        return f"n={n} is not one of {', '.join(map(str, TRITON_STREAMS))}"
    if channels is not None and channels % 8:
        return f"C={channels} is not a multiple of 8"
    if len({tensor.device for tensor in tensors}) > 1:
        return "the tensors are on several devices"
    dtypes = [tensor.dtype for tensor in tensors] if dtype is None else [dtype]
    for found in dtypes:
        if found not in TRITON_DTYPES:
            return f"{found} has no kernel"
    # Triton's interpreter is for tests that ask for it by name: nobody wants it chosen for them.
    if backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1":
        return None
    if tensors:
        device = tensors[0].device
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return _machine_problem(device, n or 0)


def check_backend(backend: str) -> None:
    """Raises ValueError unless ``backend`` is one of ``BACKENDS``."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")


def choose_backend(
    backend: str,
    tensors: tuple[Tensor, ...] = (),
    *,
    n: int | None = None,
    channels: int | None = None,
    residual_mixing: str = "sinkhorn",
    dtype: torch.dtype | None = None,
) -> str:
    """The implementation that serves a call, in words: "triton" or "torch".

    "auto" says once, in one line, why it did not take Triton; "triton" never falls back.

    Args:
        backend: one of ``BACKENDS``.
        tensors: the call's; without any, the answer is for this machine.
        n, channels, residual_mixing: of the call, where it has them.
        dtype: of the streams, where there are no tensors to tell.

    Raises:
        ValueError: backend is none of ``BACKENDS``.
        RuntimeError: backend is "triton" and Triton cannot serve the call.
    """
    check_backend(backend)
    if backend == "torch":
        return "torch"
    problem = _triton_problem(backend, tensors, n, channels, residual_mixing, dtype)
    if problem is None:
        return "triton"
    if backend == "triton":
        raise RuntimeError(f"backend='triton': {problem}; use backend='auto' or 'torch'")
    _say_once(problem)
    return "torch"
