"""Launches that call an earlier launch's compiled kernel take the one that Triton would take."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl
from triton.backends.nvidia import driver

from megatron_mhc.kernels import run_kernel as module
from megatron_mhc.kernels.run_kernel import Launch, Tiles
from megatron_mhc.kernels.workspace import Workspace


def copy(source_ptr, target_ptr, size, times, STEP: tl.constexpr):
    pass


class Compiled:
    """Stands for what Triton compiled; notes what it is launched with."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, launch=None, scratch=0):
        self.launches = []
        self.run = SimpleNamespace(
            launch=launch or partial(Compiled.note, self),
            launch_cooperative_grid=False,
            launch_pdl=False,
            global_scratch_size=scratch,
            profile_scratch_size=0,
        )

    def note(self, *arguments):
        self.launches.append(arguments)


class Kernel(triton.runtime.JITFunction):
    """A kernel whose own launches are counted, not made."""

    def __init__(self):
        super().__init__(copy, do_not_specialize=["size"])
        self.compiled, self.compile, self.arguments = [], Compiled, []

    def run(self, *arguments, grid, warmup, **options):
        self.arguments.append(arguments)
        self.compiled.append(self.compile())
        return self.compiled[-1]


@pytest.fixture
def kernel(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    monkeypatch.setattr(module, "TESTED_TRITON", triton.__version__)
    return Kernel()


memory = torch.zeros(64, dtype=torch.bfloat16)
aligned = memory[(-memory.data_ptr() % 16) // 2 :][:16]


def launch(kernel, *tensors, numbers=(3, 4), grid=(1,), **options):
    Launch(kernel, grid, numbers, **({"STEP": 8} | options))(*tensors)


def test_second_launch_calls_the_compiled_kernel(kernel):
    for size in (3, 1, 16):
        launch(kernel, aligned, None, numbers=(size, 4), grid=(2, 5), num_warps=4)
    assert len(kernel.compiled) == 1
    before = (2, 5, 1, 7, "function", False, False, None, None, "metadata", None, None, None)
    assert kernel.compiled[0].launches == [
        (*before, aligned.data_ptr(), None, size, 4, 8) for size in (1, 16)
    ]


def test_a_launch_is_compiled_after_one_with_the_same_constants(kernel):
    first, other = (Launch(kernel, (1,), (3, 4), STEP=step, num_warps=4) for step in (8, 16))
    assert not first.compiled
    launch(kernel, aligned, None, numbers=(5, 4), num_warps=4)
    assert first.compiled
    assert not other.compiled


def test_a_tensor_map_is_made_once_for_an_address(kernel, monkeypatch):
    maps, launches = [], []

    def make(descriptor, metadata):
        maps.append((descriptor, metadata))
        return [f"map {len(maps)}", *descriptor.shape, *descriptor.strides]

    def wrapped(launcher, tensordesc_meta):
        return lambda *arguments: (launcher, tensordesc_meta)

    def note(*arguments):
        launches.append(arguments[13:])

    monkeypatch.setattr(driver, "make_tensordesc_arg", make)
    monkeypatch.setattr(Tiles, "of", lambda self, tensor: self)
    kernel.compile = lambda: Compiled(wrapped(note, ["swizzle"]))
    step = Launch(kernel, (1,), (3, 4), (Tiles((2, 8), (2, 4), "layout"),), STEP=8)
    for tensor in (aligned, aligned, aligned, memory[32:], aligned):
        step(tensor, aligned)
    rest = (2, 8, 8, 1, aligned.data_ptr(), 3, 4, 8)
    assert launches == [(f"map {k}", *rest) for k in (1, 1, 2, 1)]
    assert [metadata for _, metadata in maps] == ["swizzle"] * 2
    assert len(kernel.compiled) == 1


def test_a_kernel_with_scratch_memory_gets_tritons_own_launch(kernel):
    kernel.compile = lambda: Compiled(scratch=8)
    for _ in range(2):
        launch(kernel, aligned, None)
    assert len(kernel.compiled) == 2


@pytest.mark.parametrize(
    ("tensors", "numbers", "options"),
    [
        ((aligned[1:], None), (3, 4), {}),  # alignment
        ((aligned.float(), None), (3, 4), {}),  # dtype
        ((aligned, aligned), (3, 4), {}),  # a tensor where there was none
        (((aligned, aligned), None), (3, 4), {}),  # two for one
        ((aligned, None), (2**40, 4), {}),  # 64 bits
        ((aligned, None), (3, 5), {}),  # a value that Triton compiles for
        ((aligned, None), (3, 4.0), {}),
        ((aligned, None), (3, 4), {"STEP": 16}),
        ((aligned, None), (3, 4), {"num_warps": 8}),
    ],
)
def test_what_triton_compiles_for_is_told_apart(kernel, tensors, numbers, options):
    launch(kernel, aligned, None)
    launch(kernel, *tensors, numbers=numbers, **options)
    assert len(kernel.compiled) == 2
    assert not any(compiled.launches for compiled in kernel.compiled)


def test_every_device_has_a_kernel_of_its_own(kernel, monkeypatch):
    launch(kernel, aligned, None)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1)
    launch(kernel, aligned, None)
    assert len(kernel.compiled) == 2
    assert not any(compiled.launches for compiled in kernel.compiled)


def test_a_part_of_a_workspace_is_launched_like_a_tensor(kernel):
    """By Triton as a tensor at its address, then by its address alone."""
    _, part = Workspace(((3,), torch.float32), ((2, 4), torch.bfloat16)).allocate(aligned)
    for _ in range(2):
        launch(kernel, part, None)
    (by_triton, *_), *rest = kernel.arguments
    assert not rest
    assert (by_triton.shape, by_triton.dtype) == ((2, 4), torch.bfloat16)
    assert by_triton.data_ptr() == part.data_ptr()
    assert kernel.compiled[0].launches[0][13] == part.data_ptr()


def test_other_tritons_and_listeners_get_tritons_own_launch(kernel, monkeypatch):
    for _ in range(2):
        launch(kernel, aligned, None)
    monkeypatch.setattr(module, "TESTED_TRITON", "2.")
    launch(kernel, aligned, None)
    monkeypatch.setattr(module, "TESTED_TRITON", triton.__version__)
    monkeypatch.setattr(triton.knobs.runtime.launch_enter_hook, "calls", [print])
    launch(kernel, aligned, None)
    assert len(kernel.compiled) == 3
    assert len(kernel.compiled[0].launches) == 1
