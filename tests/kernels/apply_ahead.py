"""Applies an operator as on Hopper, on tensors of the CPU, and prints what compiled, in JSON:

    TRITON_INTERPRET=0 python tests/kernels/apply_ahead.py CASE ...

A case is words: "pre", "post_pre" or "head", "main_grad", "unused" (the streams after the merge),
"frozen" (nothing wants a gradient), "inference" (its mode), "broken" (a kernel of the backward pass
does not compile), "real" (otherwise the compiler's results are made up).
"""

import json
import sys
from pathlib import Path
from threading import current_thread

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import triton
from hopper_driver import Hopper, Launcher
from triton.runtime import driver

driver.set_active(Hopper())
torch._C._cuda_getDevice = torch._C._cuda_getCurrentRawStream = lambda *device: 0

from megatron_mhc.kernels import (  # noqa: E402
    compile_ahead,
    launch,
    launch_backward,
    launch_backward_hopper,
    launch_post_pre_hopper,
    ops,
)

for module in (launch_post_pre_hopper, launch_backward, launch_backward_hopper):
    module.multiprocessors = lambda device: 132
for module in (launch, launch_backward):
    module.serves_hopper = lambda x, f, n: True
really_compile = triton.compiler.compile


class Compiled:
    src = metadata = function = packed_metadata = None
    run = Launcher(None, None)

    def launch_metadata(self, *arguments):
        pass


def is_ahead(thread: str) -> bool:
    return thread.startswith("mhc-compile")


def compile(source, **options):
    (ahead if is_ahead(current_thread().name) else at_launch).append(source.name)
    if "broken" in case and source.name == "aggregate_backward_kernel":
        raise ValueError("broken")
    return really_compile(source, **options) if "real" in case else Compiled()


def apply(channels: int, tokens: int = 40) -> None:
    x = torch.zeros(tokens, 4, channels, dtype=torch.bfloat16)
    merge = x[:, 0].contiguous(), torch.zeros(tokens, 4), torch.zeros(tokens, 4, 4)
    mapping = torch.zeros(24, 4 * channels), torch.zeros(3), torch.zeros(24)
    for tensor in (x, *merge, *mapping):
        tensor.requires_grad_("frozen" not in case)
    if "main_grad" in case:
        for parameter in mapping:
            parameter.main_grad = torch.zeros_like(parameter)
    with torch.inference_mode("inference" in case):
        if "head" in case:
            fn, scale, base = mapping
            outputs = ops.head(x, fn[:4], scale[:1], base[:4], 1e-6, 1e-6, True)
        elif "pre" in case:
            outputs = ops.pre(x, *mapping, 20, 1e-6, 1e-6, True)
        else:
            outputs = ops.post_pre(x, *merge, *mapping, 20, 1e-6, 1e-6, True)
    wanted = [output for output in outputs["unused" in case :] if output.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, [torch.zeros_like(output) for output in wanted])


triton.compiler.compile = compile
for k, words in enumerate(sys.argv[1:]):
    case, ahead, at_launch, error = words.split(), [], [], None
    compile_ahead._begun.clear()
    Launcher.made_by.clear()
    try:
        apply(2048 + 256 * k)  # channels that no other case has compiled for
    except ValueError as raised:
        error = str(raised)
    left = [future.exception() for future in compile_ahead._begun.values()]  # once they are done
    found = {
        "ahead": sorted(ahead),
        "launchers": sum(map(is_ahead, Launcher.made_by)),
        "launch": at_launch,
        "left": len(left),
        "error": error,
    }
    print(json.dumps(found))
