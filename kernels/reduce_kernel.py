"""Fixed-order sums of per-block partial results: gradients without atomics."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["parts", "groups"])
def reduce_kernel(
    partial_ptr,
    out_ptr,
    parts,
    groups,
    VECTOR: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[j] = sum_s partial[s, j] in an order that is always the same.

    partial [parts, groups * VECTOR] float32; VECTOR tells the compiler how rows are aligned.
    """
    width = groups.to(tl.int64) * VECTOR
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, parts, BLOCK_S):
        s = first + part
        mask = (s < parts)[:, None] & (at < width)[None, :]
        total += tl.load(partial_ptr + s[:, None] * width + at[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + at, tl.sum(total, 0), mask=at < width)


@triton.jit(do_not_specialize=["programs"])
def reduce_mapping_kernel(
    partial_ptr,
    dscale_ptr,
    dbase_ptr,
    programs,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """dbase [COUNT] and dscale [SEGMENTS] from partial [programs, 2, COUNT]; one program."""
    column = tl.arange(0, COLUMNS)
    part = tl.arange(0, BLOCK)
    bases = tl.zeros((BLOCK, COLUMNS), tl.float32)
    scales = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for first in range(0, programs, BLOCK):
        at = (first + part)[:, None] * (2 * COUNT) + column[None, :]
        mask = (first + part < programs)[:, None] & (column < COUNT)[None, :]
        bases += tl.load(partial_ptr + at, mask=mask, other=0.0)
        scales += tl.load(partial_ptr + at + COUNT, mask=mask, other=0.0)
    tl.store(dbase_ptr + column, tl.sum(bases, 0), mask=column < COUNT)
    scale = tl.sum(scales, 0)
    for segment in tl.static_range(SEGMENTS):
        low = segment * N
        high = (segment + 1) * N if segment < 2 else COUNT
        inside = (column >= low) & (column < high)
        tl.store(dscale_ptr + segment, tl.sum(tl.where(inside, scale, 0.0), 0))
