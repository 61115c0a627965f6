"""Fixed-order sums of per-block partial results: gradients without atomics, in one launch."""

import triton
import triton.language as tl


@triton.jit
def sum_parts(parts_ptr, out_ptr, block, parts, width, BLOCK_S: tl.constexpr, BLOCK: tl.constexpr):
    """out[j] = sum_s parts[s, j] for BLOCK columns j of parts [parts, width], in a fixed order."""
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    part = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, parts, BLOCK_S):
        s = first + part
        mask = (s < parts)[:, None] & (at < width)[None, :]
        total += tl.load(parts_ptr + s[:, None] * width + at[None, :], mask=mask, other=0.0)
    tl.store(out_ptr + at, tl.sum(total, 0), mask=at < width)


@triton.jit
def sum_mapping(
    parts_ptr,
    dscale_ptr,
    dbase_ptr,
    half,
    programs,
    N: tl.constexpr,
    COUNT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """dbase [COUNT] (half 0) or dscale [SEGMENTS] (half 1) from parts [programs, 2, COUNT]."""
    columns: tl.constexpr = triton.next_power_of_2(COUNT)
    column = tl.arange(0, columns)
    part = tl.arange(0, ROWS)
    totals = tl.zeros((ROWS, columns), tl.float32)
    for first in range(0, programs, ROWS):
        at = (2 * (first + part) + half)[:, None] * COUNT + column[None, :]
        mask = (first + part < programs)[:, None] & (column < COUNT)[None, :]
        totals += tl.load(parts_ptr + at, mask=mask, other=0.0)
    total = tl.sum(totals, 0)
    if half == 0:
        tl.store(dbase_ptr + column, total, mask=column < COUNT)
    else:
        for segment in tl.static_range(SEGMENTS):
            low = segment * N
            high = (segment + 1) * N if segment < 2 else COUNT
            inside = (column >= low) & (column < high)
            tl.store(dscale_ptr + segment, tl.sum(tl.where(inside, total, 0.0), 0))


@triton.jit(
    do_not_specialize=[
        "tokens", "ranges", "chunks", "programs", "fn_blocks", "comb_blocks"
    ]
)  # fmt: skip
def reduce_kernel(
    dfn_parts_ptr,
    dfn_ptr,
    dpost_parts_ptr,
    dpost_ptr,
    dcomb_parts_ptr,
    dcomb_ptr,
    mapping_parts_ptr,
    dscale_ptr,
    dbase_ptr,
    tokens,
    ranges,
    chunks,
    programs,
    fn_blocks,
    comb_blocks,
    N: tl.constexpr,
    C: tl.constexpr,
    COUNT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    """d fn of [ranges, COUNT, N * C], d post and d comb of [chunks, tokens, N] and [.., N * N], and
    d scale and d base of [programs, 2, COUNT]: each group of programs sums one of them. Without a
    merge there are no d post and d comb; without a mapping SEGMENTS is 0 and there is no other.
    """
    pid = tl.program_id(0)
    if SEGMENTS > 0:
        # First, because these two are long.
        if pid < 2:
            parts = mapping_parts_ptr
            sum_mapping(parts, dscale_ptr, dbase_ptr, pid, programs, N, COUNT, SEGMENTS, ROWS)
            return
        pid -= 2
        if pid < fn_blocks:
            sum_parts(dfn_parts_ptr, dfn_ptr, pid, ranges, COUNT * N * C, BLOCK_S, BLOCK)
            return
        pid -= fn_blocks
    if MERGE:
        if pid < comb_blocks:
            width = tokens.to(tl.int64) * (N * N)
            sum_parts(dcomb_parts_ptr, dcomb_ptr, pid, chunks, width, BLOCK_S, BLOCK)
        else:
            width = tokens.to(tl.int64) * N
            sum_parts(dpost_parts_ptr, dpost_ptr, pid - comb_blocks, chunks, width, BLOCK_S, BLOCK)
