"""Backward of the mappings: from the gradients of pre, post and comb to that of fn @ vec(X)."""

import triton
import triton.language as tl

from .sinkhorn_kernel import sinkhorn_backward


@triton.jit
def store_dz(numbers_ptr, planes_ptr, rows, at, dz, mask, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """dz at place ``at`` of its tokens' numbers, and as bf16 hi and lo, which have 16 bits of
    mantissa together; ``rows`` and ``at`` broadcast to dz.
    """
    tl.store(numbers_ptr + rows * WIDTH + at, dz, mask=mask)
    hi = dz.to(tl.bfloat16)
    tl.store(planes_ptr + rows * (2 * ROWS) + at, hi, mask=mask)
    lo = (dz - hi.to(tl.float32)).to(tl.bfloat16)
    tl.store(planes_ptr + rows * (2 * ROWS) + at + ROWS, lo, mask=mask)


@triton.jit
def pre_backward(
    dpre,
    m,
    r,
    scale_ptr,
    base_ptr,
    numbers_ptr,
    planes_ptr,
    partial_ptr,
    program,
    programs,
    rows,
    valid,
    eps,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Pre's share of what :func:`mapping_backward` computes, from dpre and m [B, N] and r [B].

    partial [N + 1, programs] takes the sums of ``program``; r and dpre are finite if not valid.
    """
    i = tl.arange(0, N)
    mask = valid[:, None]
    scale = tl.load(scale_ptr)
    gate = tl.sigmoid(m * scale + tl.load(base_ptr + i)[None, :])
    dl = tl.where(mask, dpre * gate * (1 - gate), 0.0)
    dz = r[:, None] * (dl * scale)
    store_dz(numbers_ptr, planes_ptr, rows[:, None], i[None, :], dz, mask, ROWS, WIDTH)
    scalars = numbers_ptr + rows * WIDTH + ROWS + N + N * N
    tl.store(scalars[:, None] + i[None, :], gate + eps, mask=mask)
    along = tl.sum(dl * m, 1)
    tl.store(scalars + N, -r * r * (along * scale) / (N * C), mask=valid)
    tl.store(partial_ptr + i * programs + program, tl.sum(dl, 0))
    tl.store(partial_ptr + N * programs + program, tl.sum(along, 0))


@triton.jit
def mapping_backward(
    m_ptr,
    r_ptr,
    scale_ptr,
    base_ptr,
    dpost_ptr,
    dcomb_ptr,
    merge_post_ptr,
    merge_comb_ptr,
    numbers_ptr,
    planes_ptr,
    partial_ptr,
    program,
    programs,
    tokens,
    eps,
    N: tl.constexpr,
    C: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    MERGE: tl.constexpr,
    HEAD: tl.constexpr,
    ITERATIONS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """BLOCK tokens, the ``program``-th. With L = m * scale + base and count mappings a token, those
    of pre first, which :func:`pre_backward` takes:

    dz = r * dm [T, count]                         gradient of fn @ vec(X)
    planes [T, 2 * ROWS]                           dz as bf16 hi and lo, zero-padded
    coefficient = -r^2 / (nC) * sum(dm * m) [T]    of X, from r; in two parts, to be added
    partial [count - N + 2, programs]              sums over the tokens: of dL for each mapping;
                                                   of dL * m for all of post, for all of comb
    numbers [T, WIDTH]                             what the streams' gradient needs of a token:
        dz, padded with zeros to ROWS | post, comb of the merge (MERGE) | pre | coefficient of pre |
        coefficient of post and comb
    """
    count: tl.constexpr = N if HEAD else (2 + N) * N
    rest: tl.constexpr = count - N
    rows = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < tokens
    i = tl.arange(0, N)
    mask = valid[:, None]
    row = tl.arange(0, ROWS)
    padding = mask & (row >= count)[None, :]
    zeros = tl.zeros((BLOCK, ROWS), tl.float32)
    store_dz(numbers_ptr, planes_ptr, rows[:, None], row[None, :], zeros, padding, ROWS, WIDTH)
    scalars = numbers_ptr + rows * WIDTH + ROWS
    small = rows[:, None] * N + i[None, :]
    if MERGE:
        j = tl.arange(0, N * N)
        post = tl.load(merge_post_ptr + small, mask=mask)
        tl.store(scalars[:, None] + i[None, :], post, mask=mask)
        comb = tl.load(merge_comb_ptr + rows[:, None] * (N * N) + j[None, :], mask=mask)
        tl.store(scalars[:, None] + N + j[None, :], comb, mask=mask)
    coefficient = tl.zeros((BLOCK,), tl.float32)

    if not HEAD:
        r = tl.load(r_ptr + rows, mask=valid, other=0.0)
        m = tl.load(m_ptr + rows[:, None] * count + N + i[None, :], mask=mask, other=0.0)
        scale = tl.load(scale_ptr + 1)
        gate = tl.sigmoid(m * scale + tl.load(base_ptr + N + i)[None, :])
        dl = tl.load(dpost_ptr + small, mask=mask, other=0.0) * 2 * gate * (1 - gate)
        dz = r[:, None] * (dl * scale)
        at = N + i[None, :]
        store_dz(numbers_ptr, planes_ptr, rows[:, None], at, dz, mask, ROWS, WIDTH)
        sums = partial_ptr + program
        products = sums + rest * programs
        tl.store(sums + i * programs, tl.sum(dl, 0))
        along = tl.sum(dl * m, 1)
        tl.store(products, tl.sum(along, 0))
        radial = along * scale

        # Matrices flat in memory's order, so that each lies within a warp.
        ij = tl.arange(0, N * N)
        at = rows[:, None] * count + 2 * N + ij[None, :]
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        scale = tl.load(scale_ptr + 2)
        grad = tl.load(dcomb_ptr + rows[:, None] * (N * N) + ij[None, :], mask=mask, other=0.0)
        logits = m * scale + tl.load(base_ptr + 2 * N + ij)[None, :]
        shape: tl.constexpr = (BLOCK, N, N)
        dl = sinkhorn_backward(tl.reshape(logits, shape), tl.reshape(grad, shape), eps, ITERATIONS)
        dl = tl.reshape(dl, (BLOCK, N * N))
        dz = r[:, None] * (dl * scale)
        at = 2 * N + ij[None, :]
        store_dz(numbers_ptr, planes_ptr, rows[:, None], at, dz, mask, ROWS, WIDTH)
        tl.store(sums + (N + ij) * programs, tl.sum(dl, 0))
        along = tl.sum(dl * m, 1)
        tl.store(products + programs, tl.sum(along, 0))
        radial += along * scale
        coefficient = -r * r * radial / (N * C)
    tl.store(scalars + 2 * N + N * N + 1, coefficient, mask=valid)
