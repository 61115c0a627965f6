"""Sinkhorn-Knopp on n x n matrices held in registers, forward and backward (paper eq. 9)."""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sinkhorn_forward(logits, eps, ITERATIONS: tl.constexpr):
    """logits [B, n, n] to the doubly stochastic matrices [B, n, n]."""
    matrix = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    matrix = matrix / tl.sum(matrix, 2)[:, :, None] + eps
    matrix = matrix / (tl.sum(matrix, 1) + eps)[:, None, :]
    for _ in range(ITERATIONS - 1):
        matrix = matrix / (tl.sum(matrix, 2) + eps)[:, :, None]
        matrix = matrix / (tl.sum(matrix, 1) + eps)[:, None, :]
    return matrix


@triton.jit
def sinkhorn_backward(logits, grad, eps, ITERATIONS: tl.constexpr):
    """Gradient of the logits [B, n, n], the iteration replayed in registers.

    Only the divisors of the 2 * ITERATIONS normalisations are kept, n numbers each instead of
    n * n: with Y = M / d, the matrix before a normalisation is Y * d, and the step's gradient is
    dM = (dY - sum(dY * Y)) / d, the sum along the normalised dimension.
    """
    matrix = tl.exp(logits - tl.max(logits, 2)[:, :, None])
    softmax = matrix / tl.sum(matrix, 2)[:, :, None]
    matrix = softmax + eps
    columns = (tl.sum(matrix, 1) + eps,)
    matrix = matrix / columns[0][:, None, :]
    rows = ()
    for k in tl.static_range(ITERATIONS - 1):
        rows = rows + (tl.sum(matrix, 2) + eps,)
        matrix = matrix / rows[k][:, :, None]
        columns = columns + (tl.sum(matrix, 1) + eps,)
        matrix = matrix / columns[k + 1][:, None, :]

    for k in tl.static_range(ITERATIONS - 1):
        divisor = columns[ITERATIONS - 1 - k][:, None, :]
        grad = (grad - tl.sum(grad * matrix, 1)[:, None, :]) / divisor
        matrix = matrix * divisor
        divisor = rows[ITERATIONS - 2 - k][:, :, None]
        grad = (grad - tl.sum(grad * matrix, 2)[:, :, None]) / divisor
        matrix = matrix * divisor
    grad = (grad - tl.sum(grad * matrix, 1)[:, None, :]) / columns[0][:, None, :]
    return softmax * (grad - tl.sum(grad * softmax, 2)[:, :, None])


@triton.jit(do_not_specialize=["count"])
def _sinkhorn_kernel(
    logits_ptr,
    grad_ptr,
    out_ptr,
    count,
    eps,
    N: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
    BACKWARD: tl.constexpr,
):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, N)
    offsets = index[:, None, None] * (N * N) + i[None, :, None] * N + i[None, None, :]
    mask = (index < count)[:, None, None]
    logits = tl.load(logits_ptr + offsets, mask=mask, other=0.0)
    if BACKWARD:
        grad = tl.load(grad_ptr + offsets, mask=mask, other=0.0)
        out = sinkhorn_backward(logits, grad, eps, ITERATIONS)
    else:
        out = sinkhorn_forward(logits, eps, ITERATIONS)
    tl.store(out_ptr + offsets, out, mask=mask)


_BLOCK = 8  # matrices a warp: 4 lanes each at n = 4


def launch_sinkhorn(logits: Tensor, grad: Tensor | None, iterations: int, eps: float) -> Tensor:
    """Forward (``grad`` None) or backward on contiguous float32 [B, n, n]; same shape back."""
    out = torch.empty_like(logits)
    count, n = logits.shape[:2]
    if count:
        _sinkhorn_kernel[(triton.cdiv(count, _BLOCK),)](
            logits,
            grad,
            out,
            count,
            eps,
            N=n,
            ITERATIONS=iterations,
            BLOCK=_BLOCK,
            BACKWARD=grad is not None,
            num_warps=1,
        )
    return out
