"""Mappings from the products with fn, and the aggregation u = sum_i pre[i] X[i]."""

import triton
import triton.language as tl

from .accumulate import accumulate
from .sinkhorn_kernel import sinkhorn_forward


@triton.jit
def sum_splits(pointer, at, tokens, splits, STRIDE: tl.constexpr):
    """Sum over the leading dimension of pointer [splits, tokens, STRIDE], in order."""
    total = tl.load(pointer + at)
    for s in range(1, splits):
        total += tl.load(pointer + at + s * tokens.to(tl.int64) * STRIDE)
    return total


@triton.jit(do_not_specialize=["tokens", "splits", "map_programs"])
def aggregate_kernel(
    x_ptr,
    products_ptr,
    squares_ptr,
    scale_ptr,
    base_ptr,
    u_ptr,
    pre_ptr,
    m_ptr,
    r_ptr,
    post_ptr,
    comb_ptr,
    tokens,
    splits,
    map_programs,
    eps,
    norm_eps,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    HEAD: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """u [T, C] and pre [T, N] of x [T, N, C]; m [T, count], r [T] for the backward; post and comb
    unless HEAD.

    The first ``map_programs`` programs compute the mappings of BLOCK_M tokens each, so that
    Sinkhorn's latency hides behind the others, which stream BLOCK_T tokens of X each.
    """
    count: tl.constexpr = N if HEAD else (2 + N) * N
    pid = tl.program_id(0)
    i = tl.arange(0, N)
    if pid < map_programs:
        rows = pid.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        valid = rows < tokens
        last = tl.zeros_like(rows) + tokens - 1
        rows = tl.minimum(rows, last)
        squares = sum_splits(squares_ptr, rows, tokens, splits, 1)
        r = tl.rsqrt(squares / (N * C) + norm_eps)
        tl.store(r_ptr + rows, r, mask=valid)
        at = rows[:, None] * ROWS
        m = r[:, None] * sum_splits(products_ptr, at + i[None, :], tokens, splits, ROWS)
        tl.store(m_ptr + rows[:, None] * count + i[None, :], m, mask=valid[:, None])
        if not HEAD:
            m = r[:, None] * sum_splits(products_ptr, at + N + i[None, :], tokens, splits, ROWS)
            tl.store(m_ptr + rows[:, None] * count + N + i[None, :], m, mask=valid[:, None])
            post = 2 * tl.sigmoid(m * tl.load(scale_ptr + 1) + tl.load(base_ptr + N + i)[None, :])
            tl.store(post_ptr + rows[:, None] * N + i[None, :], post, mask=valid[:, None])

            # Matrices flat in memory's order, so that each lies within a warp.
            ij = tl.arange(0, N * N)[None, :]
            m = r[:, None] * sum_splits(products_ptr, at + 2 * N + ij, tokens, splits, ROWS)
            tl.store(m_ptr + rows[:, None] * count + 2 * N + ij, m, mask=valid[:, None])
            logits = m * tl.load(scale_ptr + 2) + tl.load(base_ptr + 2 * N + ij)
            comb = sinkhorn_forward(tl.reshape(logits, (BLOCK_M, N, N)), eps, ITERATIONS)
            comb = tl.reshape(comb, (BLOCK_M, N * N))
            tl.store(comb_ptr + rows[:, None] * (N * N) + ij, comb, mask=valid[:, None])
        return

    # Last tokens first: they are the ones the pass before this left in L2.
    blocks = tl.num_programs(0) - map_programs
    block = blocks - 1 - (pid - map_programs)
    rows = block.to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    last = tl.zeros_like(rows) + tokens - 1
    rows = tl.minimum(rows, last)
    squares = sum_splits(squares_ptr, rows, tokens, splits, 1)
    r = tl.rsqrt(squares / (N * C) + norm_eps)
    scale = tl.load(scale_ptr)
    pre = ()
    for j in tl.static_range(N):
        m = r * sum_splits(products_ptr, rows * ROWS + j, tokens, splits, ROWS)
        pre = pre + (tl.sigmoid(m * scale + tl.load(base_ptr + j)) + eps,)
        tl.store(pre_ptr + rows * N + j, pre[j], mask=valid)
    for c in range(0, C, BLOCK_C):
        channel = c + tl.arange(0, BLOCK_C)
        inside = channel < C if C % BLOCK_C else tl.full((BLOCK_C,), True, tl.int1)
        u = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for j in tl.static_range(N):
            at = rows[:, None] * (N * C) + j * C + channel[None, :]
            stream = tl.load(
                x_ptr + at, mask=inside[None, :], other=0.0, eviction_policy="evict_first"
            )
            u = accumulate(u, pre[j], stream)
        tl.store(
            u_ptr + rows[:, None] * C + channel[None, :],
            u.to(u_ptr.dtype.element_ty),
            mask=valid[:, None] & inside[None, :],
        )
