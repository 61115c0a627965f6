"""Times what a new shape costs on a GPU: compilation for new channels, none for new token counts.

    python tools/benchmark_compilation.py [--channels 3072 3584 6656] [--tokens 2048 2048 1000 4097]

Each line is one application (mhc_post_pre, n = 4, bf16 streams), forward and backward, with the
time of the host from its call until the GPU is done. Compiled kernels of earlier runs are not used.
"""

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mhc.command_line import at_least, check_gpu, run_tool  # noqa: E402


def seconds(tokens: int, channels: int) -> float:
    """The host's time for one application."""
    import torch

    from megatron_mhc import kernels

    make = {"device": "cuda"}
    tensors = [
        torch.randn(tokens, 4, channels, **make).bfloat16(),
        torch.randn(tokens, channels, **make).bfloat16(),
        torch.rand(tokens, 4, **make),
        torch.rand(tokens, 4, 4, **make),
        torch.randn(24, 4 * channels, **make) / 100,
        torch.ones(3, **make),
        torch.randn(24, **make),
    ]
    leaves = [tensor.requires_grad_() for tensor in tensors]
    torch.cuda.synchronize()
    begin = time.perf_counter()
    outputs = kernels.mhc_post_pre(*leaves, iterations=20, eps=1e-6, norm_eps=1e-6)
    torch.autograd.grad(outputs, leaves, [torch.ones_like(output) for output in outputs])
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", nargs="+", type=at_least(1), default=[3072, 3584, 6656])
    parser.add_argument("--tokens", nargs="+", type=at_least(1), default=[2048, 2048, 1000, 4097])
    arguments = parser.parse_args()
    check_gpu()
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache  # read when Triton is imported
        for channels in arguments.channels:
            for tokens in arguments.tokens:
                print(f"{tokens} x {channels}: {seconds(tokens, channels):.3f} s", flush=True)


if __name__ == "__main__":
    run_tool(main)
