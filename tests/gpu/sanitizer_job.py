"""Every kernel once, forward and backward, at sizes that end inside tiles: for compute-sanitizer.

Tensors are allocated one by one (PYTORCH_NO_CUDA_MEMORY_CACHING=1), so that what is read beyond one
is nobody's memory, and what is read before it was written was not written by an earlier tensor.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_checks import operators, output_weights, run, streams_inputs

from megatron_mhc import kernels


def main() -> None:
    ran = 0
    for n, tokens, channels, dtype in (
        (4, 37, 264, torch.bfloat16),  # two Hopper blocks, the second nearly empty
        (4, 21, 264, torch.float32),
        (4, 70, 40, torch.bfloat16),  # too narrow for bulk copies
        (2, 9, 136, torch.bfloat16),
        (8, 9, 72, torch.bfloat16),
    ):
        tensors = streams_inputs((tokens,), n, channels, dtype, 1.0, "cuda")
        for _, function, at in operators(n):
            inputs = [tensors[i] for i in at]
            run(function, inputs, output_weights(function, inputs), "triton")
            ran += 1
        x, f, post, comb = tensors[:4]
        with torch.no_grad():
            kernels.mhc_replay(x, [None, (f, post, comb)], [post, post], backend="triton")
        ran += 1
    torch.cuda.synchronize()
    print(f"ran {ran} operators")


if __name__ == "__main__":
    main()
