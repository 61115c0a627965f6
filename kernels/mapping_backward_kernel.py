"""Backward of the mappings: from the gradients of pre, post and comb to that of fn @ vec(X)."""

import triton
import triton.language as tl

from .sinkhorn_kernel import sinkhorn_backward


@triton.jit
def store_planes(pointer, offsets, value, mask, ROWS: tl.constexpr):
    """value as bf16 hi at ``offsets`` and lo ROWS further: 16 bits of mantissa in two planes."""
    hi = value.to(tl.bfloat16)
    tl.store(pointer + offsets, hi, mask=mask)
    tl.store(pointer + offsets + ROWS, (value - hi.to(tl.float32)).to(tl.bfloat16), mask=mask)


@triton.jit(do_not_specialize=["tokens"])
def mapping_backward_kernel(
    m_ptr,
    r_ptr,
    scale_ptr,
    base_ptr,
    dpre_ptr,
    dpost_ptr,
    dcomb_ptr,
    merge_post_ptr,
    merge_comb_ptr,
    numbers_ptr,
    planes_ptr,
    partial_ptr,
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
    """One program: BLOCK tokens. With L = m * scale + base and count mappings a token:

    dz = r * dm [T, count]                         gradient of fn @ vec(X)
    planes [T, 2 * ROWS]                           dz as bf16 hi and lo, zero-padded
    coefficient = -r^2 / (nC) * sum(dm * m) [T]    of X, from r
    partial [programs, 2, count]                   sums of dL and of dL * m over the tokens
    numbers [T, WIDTH]                             what the streams' gradient needs of a token:
        dz, padded with zeros to ROWS | post, comb of the merge (MERGE) | pre | coefficient
    """
    count: tl.constexpr = N if HEAD else (2 + N) * N
    rows = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    valid = rows < tokens
    i = tl.arange(0, N)
    partial = partial_ptr + tl.program_id(0) * (2 * count)

    mask = valid[:, None]
    r = tl.load(r_ptr + rows, mask=valid, other=0.0)
    at = rows[:, None] * count + i[None, :]
    m = tl.load(m_ptr + at, mask=mask, other=0.0)
    scale = tl.load(scale_ptr)
    gate = tl.sigmoid(m * scale + tl.load(base_ptr + i)[None, :])
    small = rows[:, None] * N + i[None, :]
    numbers = numbers_ptr + rows * WIDTH
    scalars = numbers + ROWS
    tl.store(scalars[:, None] + N + N * N + i[None, :], gate + eps, mask=mask)
    dl = tl.load(dpre_ptr + small, mask=mask, other=0.0) * gate * (1 - gate)
    dm = dl * scale
    tl.store(numbers[:, None] + i[None, :], r[:, None] * dm, mask=mask)
    planes_at = rows[:, None] * (2 * ROWS) + i[None, :]
    store_planes(planes_ptr, planes_at, r[:, None] * dm, mask, ROWS)
    row = tl.arange(0, ROWS)
    padding = mask & (row >= count)[None, :]
    tl.store(numbers[:, None] + row[None, :], tl.zeros((BLOCK, ROWS), tl.float32), mask=padding)
    store_planes(
        planes_ptr,
        rows[:, None] * (2 * ROWS) + row[None, :],
        tl.zeros((BLOCK, ROWS), tl.float32),
        padding,
        ROWS,
    )
    tl.store(partial + i, tl.sum(dl, 0))
    tl.store(partial + count + i, tl.sum(dl * m, 0))
    radial = tl.sum(dm * m, 1)

    if not HEAD:
        m = tl.load(m_ptr + at + N, mask=mask, other=0.0)
        scale = tl.load(scale_ptr + 1)
        gate = tl.sigmoid(m * scale + tl.load(base_ptr + N + i)[None, :])
        dl = tl.load(dpost_ptr + small, mask=mask, other=0.0) * 2 * gate * (1 - gate)
        dm = dl * scale
        tl.store(numbers[:, None] + N + i[None, :], r[:, None] * dm, mask=mask)
        store_planes(planes_ptr, planes_at + N, r[:, None] * dm, mask, ROWS)
        tl.store(partial + N + i, tl.sum(dl, 0))
        tl.store(partial + count + N + i, tl.sum(dl * m, 0))
        radial += tl.sum(dm * m, 1)

        ij = i[None, :, None] * N + i[None, None, :]
        at = rows[:, None, None] * count + 2 * N + ij
        mask = valid[:, None, None]
        m = tl.load(m_ptr + at, mask=mask, other=0.0)
        scale = tl.load(scale_ptr + 2)
        grad = tl.load(dcomb_ptr + rows[:, None, None] * (N * N) + ij, mask=mask, other=0.0)
        logits = m * scale + tl.load(base_ptr + 2 * N + ij)
        dl = sinkhorn_backward(logits, grad, eps, ITERATIONS)
        dm = dl * scale
        tl.store(numbers[:, None, None] + 2 * N + ij, r[:, None, None] * dm, mask=mask)
        planes_at = rows[:, None, None] * (2 * ROWS) + 2 * N + ij
        store_planes(planes_ptr, planes_at, r[:, None, None] * dm, mask, ROWS)
        ij = i[:, None] * N + i[None, :]
        tl.store(partial + 2 * N + ij, tl.sum(dl, 0))
        tl.store(partial + count + 2 * N + ij, tl.sum(dl * m, 0))
        radial += tl.sum(tl.sum(dm * m, 2), 1)

    coefficient = -r * r * radial / (N * C)
    tl.store(scalars + 2 * N + N * N, coefficient, mask=valid)
    if MERGE:
        j = tl.arange(0, N * N)
        mask = valid[:, None]
        post = tl.load(merge_post_ptr + small, mask=mask)
        tl.store(scalars[:, None] + i[None, :], post, mask=mask)
        comb = tl.load(merge_comb_ptr + rows[:, None] * (N * N) + j[None, :], mask=mask)
        tl.store(scalars[:, None] + N + j[None, :], comb, mask=mask)
