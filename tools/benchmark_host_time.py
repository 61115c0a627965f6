"""Times what a host does for an application on Hopper, on a CPU, with kernels that do nothing.

    python tools/benchmark_host_time.py

Everything runs but the launches: checks, autograd, allocations, what a launch is handed. Prints
microseconds an application, forward and backward, in a chain (benchmark_kernels.py), and what an
autograd function takes that does nothing but allocate tensors of the same number and shapes.
"""

import argparse
import statistics
import sys
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor

from megatron_mhc import kernels
from megatron_mhc.command_line import at_least, run_tool
from megatron_mhc.kernels import (
    launch,
    launch_backward,
    launch_backward_hopper,
    launch_post_pre_hopper,
    served,
)
from megatron_mhc.kernels.run_kernel import Launch

TOKENS, N, CHANNELS = 512, 4, 64  # small: large allocations on a CPU are calls of the system
OPTIONS = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6, "backend": "triton"}


class Nothing(torch.autograd.Function):
    """Allocates what an application returns and what its gradients are."""

    @staticmethod
    def forward(ctx, x, f, post, comb, fn, scale, base):
        outputs = tuple(map(torch.empty_like, (x, f, post, comb)))
        small = fn.new_empty(TOKENS, N), fn.new_empty(TOKENS, 24), fn.new_empty(TOKENS)
        ctx.mark_non_differentiable(*small)
        ctx.save_for_backward(x, f, post, comb, fn, scale, base, outputs[0], *small[1:])
        return *outputs, *small

    @staticmethod
    def backward(ctx, *grads):
        return tuple(map(torch.empty_like, ctx.saved_tensors[:7]))


def stand_ins(launches: list[str]) -> ExitStack:
    """As on Hopper, where a launch is noted in ``launches`` and nothing more."""

    def prepare(self, kernel, *arguments, **options):
        self._kernel = kernel

    def note(self, *tensors):
        launches.append(self._kernel.__name__)

    stack = ExitStack()
    here = [
        (torch.Tensor, "get_device", lambda tensor: 0),
        (torch._C, "_cuda_getDevice", lambda: 0),
    ]
    here += [(Launch, "__init__", prepare), (Launch, "__call__", note), (Launch, "compiled", True)]
    here += [(launch, "serves_hopper", lambda *_: True)]
    here += [(launch_backward, "serves_hopper", lambda *_: True)]
    here += [(launch_post_pre_hopper, "pays", lambda *_: True)]
    here += [(served, "choose_backend", lambda *_, **__: "triton")]
    for module in (launch_post_pre_hopper, launch_backward_hopper):
        here.append((module, "multiprocessors", lambda device: 132))
    for owner, name, value in here:
        stack.enter_context(patch.object(owner, name, value, create=True))
    return stack


def make_chain(length: int, application):
    """Forward and backward of ``length`` applications, as benchmark_kernels.py's."""
    shapes = ((TOKENS, N, CHANNELS), (TOKENS, CHANNELS), (TOKENS, N), (TOKENS, N, N))
    dtypes = (torch.bfloat16, torch.bfloat16, torch.float32, torch.float32)
    first = [torch.zeros(shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes)]
    mapping = kernels.mapping_shapes("sinkhorn", N, CHANNELS).values()
    mappings = [[torch.zeros(shape) for shape in mapping] for _ in range(length)]
    leaves = [*first, *(parameter for mapping in mappings for parameter in mapping)]
    for leaf in leaves:
        leaf.requires_grad_()
    weights = [torch.zeros_like(tensor) for tensor in first]

    def step() -> tuple[Tensor, ...]:
        outputs = first
        for mapping in mappings:
            outputs = application(*outputs[:4], *mapping)
        return torch.autograd.grad(outputs[:4], leaves, weights)

    return step


def microseconds(step, repetitions: int) -> float:
    """Median over ``repetitions`` of 20 steps each."""
    step()
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        for _ in range(20):
            step()
        times.append(1e6 * (time.perf_counter() - begin) / 20)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=at_least(1), default=15)
    parser.add_argument("--chain", type=at_least(1), default=8, help="applications in a chain")
    arguments = parser.parse_args()
    launches: list[str] = []

    def apply(*tensors):
        return kernels.mhc_post_pre(*tensors, **OPTIONS)

    length = arguments.chain
    with stand_ins(launches):
        step = make_chain(length, apply)
        step()
        for kernel, times in Counter(launches).items():
            print(f"{kernel}: {times / length:g} an application")
        ours = microseconds(step, arguments.repetitions) / length
    least = microseconds(make_chain(length, Nothing.apply), arguments.repetitions) / length
    print(f"an application, without its launches: {ours:.1f} us")
    print(f"a function that only allocates: {least:.1f} us")


if __name__ == "__main__":
    run_tool(main)
