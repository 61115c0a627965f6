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
    """
    at = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    there = tl.zeros_like(at) + parts
    part = tl.arange(0, BLOCK_S)
    total = tl.zeros((BLOCK_S, BLOCK), tl.float32)
    for first in range(0, most, BLOCK_S):
        s = first + part
        mask = (s[:, None] < there[None, :]) & (at < width)[None, :]
        total += tl.load(parts_ptr + s[:, None] * width + at[None, :], mask=mask, other=0.0)
    store(out_ptr + at, tl.sum(total, 0), at < width, ADD)


@triton.jit
def pieces_of(channel, channels, tiles, work):
    """How many pieces share a block's ``tiles`` where the tiles of all blocks of ``channels``, one
    block after the other, are cut into pieces of ``work``.
    """
    chunk = channel // channels
    return ((chunk + 1) * tiles - 1) // work - chunk * tiles // work + 1


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
    ADD: tl.constexpr,
):
    """dbase [COUNT] (half 0) or dscale [SEGMENTS] (half 1) from parts [programs, 2, COUNT], with
    ADD added to what is there.
    """
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
        store(dbase_ptr + column, total, column < COUNT, ADD)
    else:
        for segment in tl.static_range(SEGMENTS):
            low = segment * N
            high = (segment + 1) * N if segment < 2 else COUNT
            inside = (column >= low) & (column < high)
            store(dscale_ptr + segment, tl.sum(tl.where(inside, total, 0.0), 0), None, ADD)


# In Megatron's buffers main_grad is aligned in every way: one compiled kernel serves all, and with
# one number a thread it has no use for more.
@triton.jit(
    do_not_specialize=[
        "tokens", "most", "tiles", "work", "channels", "chunks", "programs", "fn_blocks",
        "comb_blocks",
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
    mapping_parts_ptr,
    dscale_ptr,
    dbase_ptr,
    tokens,
    most,
    tiles,
    work,
    channels,
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
    ADD: tl.constexpr,
):
    """d fn of [most, COUNT, N * C] (as many as pieces_of says), d post and d comb of
    [chunks, tokens, N] and [.., N * N], and d scale and d base of [programs, 2, COUNT]: each group
    of programs sums one of them. Without a merge there are no d post and d comb; without a mapping
    SEGMENTS is 0 and there is no other. With ADD the mapping's three are added to what is there.
    """
    pid = tl.program_id(0)
    if SEGMENTS > 0:
        # First, because these two are long.
        if pid < 2:
            parts = mapping_parts_ptr
            sum_mapping(parts, dscale_ptr, dbase_ptr, pid, programs, N, COUNT, SEGMENTS, ROWS, ADD)
            return
        pid -= 2
        if pid < fn_blocks:
            channel = (pid * BLOCK + tl.arange(0, BLOCK)) % C
            parts = pieces_of(channel, channels, tiles, work)
            sum_parts(dfn_parts_ptr, dfn_ptr, pid, most, parts, COUNT * N * C, BLOCK_S, BLOCK, ADD)
            return
        pid -= fn_blocks
    if MERGE:
        if pid < comb_blocks:
            width = tokens.to(tl.int64) * (N * N)
            sum_parts(dcomb_parts_ptr, dcomb_ptr, pid, chunks, chunks, width, BLOCK_S, BLOCK)
        else:
            width = tokens.to(tl.int64) * N
            block = pid - comb_blocks
            sum_parts(dpost_parts_ptr, dpost_ptr, block, chunks, chunks, width, BLOCK_S, BLOCK)
