"""Merge of the streams and mapping products in one pass over X (forward of post, pre, post_pre)."""

import triton
import triton.language as tl

from .accumulate import accumulate


@triton.jit
def load_scalars(pointer, rows, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT per-token numbers of pointer [tokens, STRIDE] as a tuple of [BLOCK_T] vectors."""
    values = ()
    for j in tl.static_range(COUNT):
        values = values + (tl.load(pointer + rows * STRIDE + j),)
    return values


@triton.jit
def to_float(tiles, COUNT: tl.constexpr):
    """The COUNT tiles in float32."""
    wide = ()
    for j in tl.static_range(COUNT):
        wide = wide + (tiles[j].to(tl.float32),)
    return wide


@triton.jit
def load_tiles(pointer, offsets, mask, STRIDE: tl.constexpr, COUNT: tl.constexpr):
    """COUNT tiles [BLOCK_T, BLOCK_C] that lie STRIDE elements apart, in their own dtype."""
    tiles = ()
    for j in tl.static_range(COUNT):
        tiles = tiles + (tl.load(pointer + offsets + j * STRIDE, mask=mask, other=0.0),)
    return tiles


@triton.jit
def merge_stream(streams, f, post, comb, OUT: tl.constexpr, N: tl.constexpr):
    """X'[o] = post[o] f + sum_i comb[i, o] X[i] in float32; the order of sums is fixed here."""
    merged = post[OUT][:, None] * f
    for i in tl.static_range(N):
        merged = accumulate(merged, comb[i * N + OUT], streams[i])
    return merged


@triton.jit
def stack(values, COUNT: tl.constexpr):
    """COUNT (a power of two) equal tiles as one, along new last dimensions of 2 each."""
    for level in tl.static_range(COUNT.bit_length() - 1):
        joined = ()
        for k in tl.static_range(COUNT >> (level + 1)):
            joined = joined + (tl.join(values[k], values[k + (COUNT >> (level + 1))]),)
        values = joined
    return values[0]


@triton.jit
def concatenate(tiles, COUNT: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """COUNT tiles [B, C] side by side as [B, COUNT * C]: one matrix product, not COUNT."""
    stacked = tl.reshape(stack(tiles, COUNT), (B, C, COUNT))
    return tl.reshape(tl.permute(stacked, (0, 2, 1)), (B, COUNT * C))


@triton.jit(do_not_specialize=["tokens", "split_steps"])
def merge_map_kernel(
    x_ptr,
    f_ptr,
    post_ptr,
    comb_ptr,
    planes_ptr,
    x_next_ptr,
    products_ptr,
    squares_ptr,
    tokens,
    split_steps,
    N: tl.constexpr,
    C: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
    MERGE: tl.constexpr,
    MAP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """X' and, of X' (or of X without MERGE), the partial products with fn and the sum of squares.

    x [T, N, C], f [T, C], post [T, N], comb [T, N, N]; planes [PLANES * ROWS, N * C] is fn split
    by :mod:`.split_weight_kernel`. Writes x_next [T, N, C], products [splits, T, ROWS] and squares
    [splits, T]; program (t, s) owns BLOCK_T tokens and split s of the channels.
    """
    rows = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    # Loads clamp to the last token instead of masking: only stores need the mask.
    last = tl.zeros_like(rows) + tokens - 1
    rows = tl.minimum(rows, last)
    split = tl.program_id(1)
    start = split * split_steps * BLOCK_C
    stop = tl.minimum(start + split_steps * BLOCK_C, C)
    columns = tl.arange(0, BLOCK_C)
    plane = tl.arange(0, PLANES * ROWS)
    # The aggregation reads X' next: what stays in L2 until then is not read from memory.
    KEEP: tl.constexpr = "evict_last" if MAP else ""
    stacked = tl.arange(0, N * BLOCK_C)
    if MERGE:
        post = load_scalars(post_ptr, rows, N, N)
        comb = load_scalars(comb_ptr, rows, N * N, N * N)
    if MAP:
        products = tl.zeros((PLANES * ROWS, BLOCK_T), tl.float32)
        squares = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)

    # STAGES tiles are in flight: copied to shared memory while an earlier one is worked on.
    for c in tl.range(start, stop, BLOCK_C, num_stages=STAGES):
        channel = c + columns
        inside = channel < C if C % BLOCK_C else tl.full((BLOCK_C,), True, tl.int1)
        offsets = rows[:, None] * (N * C) + channel[None, :]
        mask = inside[None, :]
        tiles = load_tiles(x_ptr, offsets, mask, C, N)
        streams = to_float(tiles, N)
        if MERGE:
            f = tl.load(f_ptr + rows[:, None] * C + channel[None, :], mask=mask, other=0.0)
            f = f.to(tl.float32)
        if MAP:
            position = c + stacked % BLOCK_C
            weight = tl.load(
                planes_ptr
                + plane[:, None] * (N * C)
                + (stacked // BLOCK_C * C + position)[None, :],
                mask=(plane % ROWS < COUNT)[:, None] & (position < C)[None, :],
                other=0.0,
            )
        merged_streams = ()
        for o in tl.static_range(N):
            if MERGE:
                wide = merge_stream(streams, f, post, comb, o, N)
                stream = wide.to(x_next_ptr.dtype.element_ty)
                here = valid[:, None] & inside[None, :]
                tl.store(x_next_ptr + offsets + o * C, stream, mask=here, eviction_policy=KEEP)
            else:
                wide = streams[o]
                stream = tiles[o]
            if MAP:
                # Squares before rounding: nearer the truth, and a conversion less.
                squares += wide * wide
                merged_streams = merged_streams + (stream if PLANES == 2 else wide,)
        if MAP:
            side_by_side = concatenate(merged_streams, N, BLOCK_T, BLOCK_C)
            products = tl.dot(weight, tl.trans(side_by_side), products, input_precision=PRECISION)

    if MAP:
        if PLANES == 2:
            products = tl.sum(tl.reshape(products, (2, ROWS, BLOCK_T)), 0)
        row = tl.arange(0, ROWS)
        at = split.to(tl.int64) * tokens + rows
        tl.store(products_ptr + at[None, :] * ROWS + row[:, None], products, mask=valid[None, :])
        tl.store(squares_ptr + at, tl.sum(squares, 1), mask=valid)
