"""Stand-ins for CUDA, for a machine without a GPU: tests, and small runs to see the thing work.

Imported only when ``torch.cuda.is_available()`` is false. It says so, in one line. Megatron asks
for device "cuda" by name in some 200 places, so "cuda" means "cpu" from here on in this process;
what only orders or times GPU work does nothing. What Megatron itself must change for the CPU is in
``patches/cpu_*.py``.
"""

import contextlib
import sys
import types

import torch
import torch._dynamo
from torch.overrides import TorchFunctionMode

_mode: TorchFunctionMode | None = None


class _CudaMeansCpu(TorchFunctionMode):
    """Rewrites device arguments, and reports CPU tensors under the CUDA type names."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is torch.Tensor.cuda:
            return args[0]
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": "cpu"}
        if function is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], "cpu", *args[2:])
        if kwargs.get("pin_memory"):  # for copies to a GPU; it needs CUDA's driver
            kwargs = {**kwargs, "pin_memory": False}
        if function is torch.distributed.all_to_all_single:
            # Megatron makes lists of those sizes that were on a GPU.
            kwargs = {
                name: value.tolist()
                if name.endswith("split_sizes") and value is not None
                else value
                for name, value in kwargs.items()
            }
        result = function(*args, **kwargs)
        # Megatron's optimizers tell fp32 from bf16 by these names, and know only CUDA's.
        if function is torch.Tensor.type and len(args) == 1 and not kwargs:
            return result.replace("torch.", "torch.cuda.")
        return result


def _is_cuda(device) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    return isinstance(device, str) and device.startswith("cuda")


class _Stream:
    """A stream that runs everything at once, as the CPU does; also an event."""

    cuda_stream = 0

    def __init__(self, *args, **kwargs) -> None: ...

    def _nothing(self, *args, **kwargs) -> None:
        return None

    record = wait = wait_event = wait_stream = synchronize = _nothing

    def record_event(self, event=None):
        return event or _Stream()

    def query(self) -> bool:
        return True

    @staticmethod
    def priority_range() -> tuple[int, int]:
        return 0, 0

    def elapsed_time(self, other) -> float:
        return 0.0


def _returning(value):
    """A new function each time: torch._dynamo refuses one function under two torch names."""

    def stand_in(*args, **kwargs):
        return value

    return stand_in


def stand_in_for_cuda() -> None:
    """Make "cuda" mean the CPU for the rest of this process; a second call does nothing."""
    global _mode
    if _mode is not None:
        return
    print(
        "mHC: no GPU here, the CPU stands in for CUDA (for tests and small runs)", file=sys.stderr
    )

    replacements = {
        "current_device": _returning("cpu"),
        "device_count": _returning(1),
        "set_device": _returning(None),
        # From compute capability 10 on, Megatron asks nothing of CUDA_DEVICE_MAX_CONNECTIONS.
        "get_device_properties": _returning(types.SimpleNamespace(major=10, minor=0)),
        "synchronize": _returning(None),
        "empty_cache": _returning(None),
        "Stream": _Stream,
        "Event": _Stream,
        "stream": lambda stream: contextlib.nullcontext(),
        "current_stream": lambda device=None: _Stream(),
        "default_stream": lambda device=None: _Stream(),
        "set_stream": _returning(None),
        "memory_allocated": _returning(0),
        "max_memory_allocated": _returning(0),
        "memory_reserved": _returning(0),
        "max_memory_reserved": _returning(0),
        "device_memory_used": _returning(0),
        "reset_peak_memory_stats": _returning(None),
        "manual_seed": lambda seed: torch.manual_seed(seed),
        "get_rng_state": lambda device=None: torch.get_rng_state(),
        "set_rng_state": lambda state, device=None: torch.set_rng_state(state),
    }
    for name, replacement in replacements.items():
        setattr(torch.cuda, name, replacement)
    torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.nvtx.range_push = _returning(None)
    torch.cuda.nvtx.range_pop = _returning(None)
    torch.nn.Module.cuda = lambda module, device=None: module
    torch.Tensor.record_stream = _returning(None)

    # Megatron compiles and warms up its fused functions: half a minute of C++ for a small model.
    torch._dynamo.config.disable = True

    _mode = _CudaMeansCpu()
    _mode.__enter__()

    # backward() is itself a call that the mode handles, and a mode is off inside its handler; but
    # Megatron's recomputation runs layers in the backward pass.
    run_backward = torch.autograd._engine_run_backward

    def run_backward_in_mode(*args, **kwargs):
        with _mode:
            return run_backward(*args, **kwargs)

    torch.autograd._engine_run_backward = run_backward_in_mode
