"""Fixed-order sums of per-block partial results: gradients without atomics, in one launch."""

import triton
import triton.language as tl


@triton.jit
def store(out_ptrs, total, mask, ADD: tl.constexpr):
    """out = total, or out += total."""
    if ADD:
        total += tl.load(out_ptrs, mask=mask)
    tl.store(out_ptrs, total, mask=mask)


@triton.jit
def sum_parts(
    parts_ptr,
    out_ptr,
    block,
    most,
    parts,
    width,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    ADD: tl.constexpr = False,
):
    """out[j] = sum_s parts[s, j] for BLOCK columns j of parts [most, width], in a fixed order; the
    columns have ``parts`` of them, one number or a vector. With ADD the sum is added to out.

    Parts are read once, and the L2 cache is told so: the streams' gradient asked it to keep them.
    """
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = tl.zeros_like(at) + parts
    part = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, most, BLOCK_S):
        s = first + part
        tile = tl.load(
            parts_ptr + s[:, None] * width + at[None, :],
            mask=(s[:, None] < there[None, :]) & (at < width)[None, :],
            other=0.0,
            eviction_policy="evict_first",
        )
        total += tl.sum(tile, 0)
    store(out_ptr + at, total, at < width, ADD)


@triton.jit
def shares_of(channel, channels, ranges, rest, work):
    """How many shares of d fn a channel has, of blocks of ``channels``: ``ranges``, and one of each
    piece that its block has of the ``rest`` tiles of all blocks, which one block after the other
    are cut into pieces of ``work``.
    """
    chunk = channel // channels
    pieces = ((chunk + 1) * rest - 1) // work - chunk * rest // work + 1
    return ranges + tl.where(rest > 0, pieces, 0)


@triton.jit
def sum_row(parts_ptr, out_ptr, count, ROWS: tl.constexpr, ADD: tl.constexpr):
    """out = the sum of parts [count]; with ADD it is added to out."""
    part = tl.arange(0, ROWS)
    totals = tl.zeros((ROWS,), tl.float32)
    for first in range(0, count, ROWS):
        totals += tl.load(parts_ptr + first + part, mask=first + part < count, other=0.0)
    store(out_ptr, tl.sum(totals, 0), None, ADD)


# In Megatron's buffers main_grad is aligned in every way: one compiled kernel serves all.
@triton.jit(
    do_not_specialize=[
        "tokens", "most", "ranges", "rest", "work", "chunks", "pre_programs", "programs",
        "comb_blocks", "post_blocks",
    ],
    do_not_specialize_on_alignment=["dfn_ptr", "dscale_ptr", "dbase_ptr"],
)  # fmt: skip
def reduce_kernel(
    dfn_parts_ptr,
    dfn_ptr,
    dpost_parts_ptr,
    dpost_ptr,
    dcomb_parts_ptr,
    dcomb_ptr,
    pre_parts_ptr,
    mapping_parts_ptr,
    dscale_ptr,
    dbase_ptr,
    tokens,
    most,
    ranges,
    rest,
    work,
    chunks,
    pre_programs,
    programs,
    comb_blocks,
    post_blocks,
    N: tl.constexpr,
    C: tl.constexpr,
    CHANNELS: tl.constexpr,
    COUNT: tl.constexpr,
    SEGMENTS: tl.constexpr,
    MERGE: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK: tl.constexpr,
    FN_BLOCK_S: tl.constexpr,
    FN_BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    ADD: tl.constexpr,
):
    """d fn of [most, COUNT, N * C] (as many as shares_of says for blocks of CHANNELS), d post and
    d comb of [chunks, tokens, N] and [.., N * N], and d base and d scale of [N + 1, pre_programs]
    and [COUNT - N + 2, programs]: each group of programs sums one of them. Without a merge there
    are no d post and d comb; without a mapping SEGMENTS is 0 and there is no other. With ADD the
    mapping's three are added to what is there.
    """
    pid = tl.program_id(0)
    if SEGMENTS > 0:
        # First, because these wait for one load after another.
        if pid <= N:
            parts = pre_parts_ptr + pid * pre_programs
            out = dbase_ptr + pid if pid < N else dscale_ptr
            sum_row(parts, out, pre_programs, ROWS, ADD)
            return
        pid -= N + 1
    if SEGMENTS > 1:
        of_merge: tl.constexpr = COUNT - N
        if pid < of_merge + 2:
            parts = mapping_parts_ptr + pid * programs
            out = dbase_ptr + N + pid if pid < of_merge else dscale_ptr + 1 + pid - of_merge
            sum_row(parts, out, programs, ROWS, ADD)
            return
        pid -= of_merge + 2
    if MERGE:
        if pid < comb_blocks:
            width = tokens.to(tl.int64) * (N * N)
            sum_parts(dcomb_parts_ptr, dcomb_ptr, pid, chunks, chunks, width, BLOCK_S, BLOCK)
            return
        pid -= comb_blocks
        if pid < post_blocks:
            width = tokens.to(tl.int64) * N
            sum_parts(dpost_parts_ptr, dpost_ptr, pid, chunks, chunks, width, BLOCK_S, BLOCK)
            return
        pid -= post_blocks
    if SEGMENTS > 0:
        channel = (pid * FN_BLOCK + tl.arange(0, FN_BLOCK)) % C
        parts = shares_of(channel, CHANNELS, ranges, rest, work)
        width = COUNT * N * C
        sum_parts(dfn_parts_ptr, dfn_ptr, pid, most, parts, width, FN_BLOCK_S, FN_BLOCK, ADD)
