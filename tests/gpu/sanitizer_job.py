"""Every kernel once, forward and backward, at sizes that end inside tiles: for compute-sanitizer.

Tensors are allocated one by one (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that what is read beyond one
is nobody's memory, and what is read before it was written was not written by an earlier tensor.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_checks import operators, streams_inputs

from megatron_mhc import kernels
from megatron_mhc.kernels import launch_post_pre_hopper

CASES = (
    (4, 37, 1288, torch.bfloat16),  # groups of six blocks, the last nearly empty
    (4, 37, 264, torch.bfloat16),  # too narrow for groups
    (4, 9, 40, torch.float32),
    (8, 9, 72, torch.bfloat16),
)


class Zeroing:
    """torch where the single pass allocates X': initcheck does not see what bulk copies write."""

    empty_like = staticmethod(torch.zeros_like)

    def __getattr__(self, name):
        return getattr(torch, name)


def main() -> None:
    launch_post_pre_hopper.torch = Zeroing()
    begin, ran = time.monotonic(), 0
    for n, tokens, channels, dtype in CASES:
        inputs = streams_inputs((tokens,), n, channels, dtype, device="cuda")
        x, f, post, comb = inputs[:4]
        for _, function, at in operators(n):
            leaves = [inputs[i].detach().requires_grad_() for i in at]
            outputs = function(*leaves, backend="triton")
            torch.autograd.grad(outputs, leaves, [torch.randn_like(output) for output in outputs])
            ran += 1
        kernels.mhc_replay(x, [None, (f, post, comb)], [post, post], backend="triton")
        torch.cuda.synchronize()
        print(f"n {n}, {tokens} x {channels}: {time.monotonic() - begin:.0f} s", flush=True)
    print(f"ran {ran} operators")


if __name__ == "__main__":
    main()
