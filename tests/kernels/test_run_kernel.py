"""Launches that call an earlier launch's compiled kernel take the one that Triton would take."""

import pytest
import torch
import triton
import triton.language as tl

from megatron_mhc.kernels import run_kernel as module
from megatron_mhc.kernels.run_kernel import run_kernel


def copy(source_ptr, target_ptr, size, times, STEP: tl.constexpr):
    pass


class Compiled:
    """Stands for what Triton compiled; notes what it is launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self):
        self.launches = []

    def run(self, *arguments):
        self.launches.append(arguments)


class Kernel(triton.runtime.JITFunction):
    """A kernel whose own launches are counted, not made."""

    def __init__(self):
        super().__init__(copy, do_not_specialize=["size"])
        self.compiled = []

    def run(self, *arguments, grid, warmup, **options):
        self.compiled.append(Compiled())
        return self.compiled[-1]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(module, "TESTED_TRITON", triton.__version__)
    return Kernel()


memory = torch.zeros(64, dtype=torch.bfloat16)
aligned = memory[(-memory.data_ptr() % 16) // 2 :][:16]


def test_second_launch_calls_the_compiled_kernel(kernel):
    for size in (3, 1, 16):
        run_kernel(kernel, (2, 5), aligned, None, size, 4, STEP=8, num_warps=4)
    assert len(kernel.compiled) == 1
    launches = kernel.compiled[0].launches
    assert launches == [
        (2, 5, 1, 7, "function", "metadata", None, None, None, aligned, None, size, 4, 8)
        for size in (1, 16)
    ]


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        ((aligned[1:], None, 3, 4), {"STEP": 8}),  # alignment
        ((aligned.float(), None, 3, 4), {"STEP": 8}),  # dtype
        ((aligned, aligned, 3, 4), {"STEP": 8}),  # a tensor where there was none
        (((aligned, aligned), None, 3, 4), {"STEP": 8}),  # two for one
        ((aligned, None, 2**40, 4), {"STEP": 8}),  # 64 bits
        ((aligned, None, 3, 5), {"STEP": 8}),  # a value that Triton compiles for
        ((aligned, None, 3, 4.0), {"STEP": 8}),
        ((aligned, None, 3, 4), {"STEP": 16}),
        ((aligned, None, 3, 4), {"STEP": 8, "num_warps": 8}),
    ],
)
def test_what_triton_compiles_for_is_told_apart(kernel, arguments, options):
    run_kernel(kernel, (1,), aligned, None, 3, 4, STEP=8)
    run_kernel(kernel, (1,), *arguments, **options)
    assert len(kernel.compiled) == 2
    assert not any(compiled.launches for compiled in kernel.compiled)


def test_other_tritons_and_listeners_get_tritons_own_launch(kernel, monkeypatch):
    for _ in range(2):
        run_kernel(kernel, (1,), aligned, None, 3, 4, STEP=8)
    monkeypatch.setattr(module, "TESTED_TRITON", "2.")
    run_kernel(kernel, (1,), aligned, None, 3, 4, STEP=8)
    monkeypatch.setattr(module, "TESTED_TRITON", triton.__version__)
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    run_kernel(kernel, (1,), aligned, None, 3, 4, STEP=8)
    assert len(kernel.compiled) == 3
    assert len(kernel.compiled[0].launches) == 1
