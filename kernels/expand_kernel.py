"""The entry: h repeated into n streams, and its gradient, their sum."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["tokens"])
def _expand_kernel(
    in_ptr,
    out_ptr,
    tokens,
    N: tl.constexpr,
    C: tl.constexpr,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    channel = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channel < C
    if BACKWARD:
        total = tl.zeros((BLOCK,), tl.float32)
        for i in tl.static_range(N):
            total += tl.load(in_ptr + (token * N + i) * C + channel, mask=mask, other=0.0)
        tl.store(out_ptr + token * C + channel, total.to(out_ptr.dtype.element_ty), mask=mask)
    else:
        h = tl.load(in_ptr + token * C + channel, mask=mask, other=0.0)
        for i in tl.static_range(N):
            tl.store(out_ptr + (token * N + i) * C + channel, h, mask=mask)


def launch_expand(tensor: Tensor, n: int, backward: bool) -> Tensor:
    """[T, C] to [T, n, C], or the gradient back; contiguous in and out, dtype kept."""
    tokens, channels = tensor.shape[0], tensor.shape[-1]
    shape = (tokens, channels) if backward else (tokens, n, channels)
    out = torch.empty(shape, dtype=tensor.dtype, device=tensor.device)
    if out.numel():
        block = min(2048, triton.next_power_of_2(channels))
        grid = (tokens, triton.cdiv(channels, block))
        _expand_kernel[grid](tensor, out, tokens, N=n, C=channels, BLOCK=block, BACKWARD=backward)
    return out
