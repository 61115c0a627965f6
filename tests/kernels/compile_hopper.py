"""Compiles the kernels in Gluon for sm_90 without a GPU; prints what ptxas says of each, in JSON:

TRITON_INTERPRET=0 python tests/kernels/compile_hopper.py "forward or backward, tokens, C, rows of
fn, merge" ...
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from hopper_driver import Hopper
from triton.runtime import driver
from triton.runtime.jit import MockTensor

driver.set_active(Hopper())

from megatron_mhc.kernels import launch_backward_hopper, launch_post_pre_hopper  # noqa: E402
from megatron_mhc.kernels.workspace import tensor_of  # noqa: E402


def idle_barriers(ttgir: str) -> int:
    """Barriers that no partition uses."""
    barriers = re.findall(r"(%\w+) = ttg\.local_alloc : \(\) -> !ttg\.memdesc<\w+xi64,", ttgir)
    used = re.findall(r"%\w+", re.search(r"ttg\.warp_specialize\((.*?)\)", ttgir)[1])
    assert barriers
    return len(set(barriers) - set(used))


def figures(compiled) -> dict:
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(compiled.asm["ptx"])
        command = [ptxas, "-v", "-arch=sm_90a", source, "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": int(re.search(r"(\d+) bytes spill stores", said)[1]),
        "shared": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
        "idle_barriers": idle_barriers(compiled.asm["ttgir"]),
    }


class CompileOnly:
    """A Launch that compiles."""

    compiled = True  # so that the backward pass is not begun

    def __init__(self, kernel, grid, numbers, tiles, **options) -> None:
        self._kernel, self._grid, self._numbers, self._tiles = kernel, grid, numbers, tiles
        self._options = options

    def __call__(self, *tensors: torch.Tensor) -> None:
        tensors = tuple(map(tensor_of, tensors))
        described = [tile.of(tensor) for tile, tensor in zip(self._tiles, tensors)]
        plain = [MockTensor(tensor.dtype) for tensor in tensors[len(described) :]]
        arguments = (*described, *plain, *self._numbers)
        compiled = self._kernel.run(*arguments, grid=self._grid, warmup=True, **self._options)
        print(json.dumps(figures(compiled)))


for module in (launch_post_pre_hopper, launch_backward_hopper):
    module.Launch = CompileOnly
    module.multiprocessors = lambda device: 132
for case in sys.argv[1:]:
    direction, *numbers = case.split(",")
    tokens, channels, count, merges = map(int, numbers)
    x = torch.empty(tokens, 4, channels, dtype=torch.bfloat16)
    f = x[:, 0].contiguous()
    fn = torch.empty(count, 4 * channels)
    if direction == "forward":
        merge = (f, torch.empty(tokens, 4), torch.empty(tokens, 4, 4)) if merges else None
        mapping = fn, torch.empty(3), torch.empty(count)
        launch_post_pre_hopper.post_pre_hopper(x, merge, mapping, 20, 1e-6, 1e-6)
    else:
        formed = torch.empty(tokens, 64), torch.empty(tokens, 64, dtype=torch.bfloat16)
        if merges:
            launch_backward_hopper.streams_backward_hopper(x, f, fn, x, f, formed[0])
        else:
            launch_backward_hopper.pre_backward_hopper(x, fn, f, *formed)
