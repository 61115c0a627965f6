"""Gradients of the streams: merge, aggregation and mapping summed in one pass."""

import triton
import triton.language as tl

from .merge_map_kernel import (
    concatenate,
    load_scalars,
    load_tiles,
    merge_stream,
    stack,
    to_float,
)


@triton.jit
def separate(tile, COUNT: tl.constexpr, B: tl.constexpr, C: tl.constexpr):
    """[B, COUNT * C] as a tuple of COUNT (a power of two) tiles [B, C]."""
    parts = (tl.permute(tl.reshape(tile, (B, COUNT, C)), (0, 2, 1)),)
    for level in tl.static_range(COUNT.bit_length() - 1):
        halves = ()
        for k in tl.static_range(1 << level):
            pairs = tl.reshape(parts[k], (B, C, 2, COUNT >> (level + 1)))
            low, high = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            halves = halves + (low, high)
        parts = halves
    tiles = ()
    for k in tl.static_range(COUNT):
        tiles = tiles + (tl.reshape(parts[k], (B, C)),)
    return tiles


@triton.jit
def load_dz(
    numbers_ptr,
    planes_ptr,
    rows,
    valid,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
):
    """dz [BLOCK_T, ROWS] of a tile, and its bf16 hi and lo where PLANES is 2; 0 if not valid."""
    row = tl.arange(0, ROWS)
    mask = valid[:, None]
    dz = (tl.load(numbers_ptr + rows[:, None] * WIDTH + row[None, :], mask=mask, other=0.0),)
    if PLANES == 2:
        at = rows[:, None] * (2 * ROWS) + row[None, :]
        hi = tl.load(planes_ptr + at, mask=mask, other=0.0)
        dz = dz + (hi, tl.load(planes_ptr + at + ROWS, mask=mask, other=0.0))
    return dz


@triton.jit(do_not_specialize=["tokens", "range_tokens"])
def streams_backward_kernel(
    x_ptr,
    f_ptr,
    post_ptr,
    comb_ptr,
    fn_ptr,
    dx_next_ptr,
    du_ptr,
    numbers_ptr,
    planes_ptr,
    dx_ptr,
    df_ptr,
    dpost_ptr,
    dcomb_ptr,
    dfn_ptr,
    tokens,
    range_tokens,
    N: tl.constexpr,
    C: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PLANES: tl.constexpr,
    MERGE: tl.constexpr,
    MAP: tl.constexpr,
    HAS_DX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Program (c, s): BLOCK_C channels of token range s. Per token, with X' the merged streams
    (formed again from X and f; X itself without MERGE) and dz, pre and the coefficient of
    :mod:`.mapping_backward_kernel`, whose rows of numbers also hold post and comb:

        dX'[o]     = dx_next[o] + pre[o] du + coefficient X'[o] + (dz @ fn)[o]
        df         = sum_o post[o] dX'[o]             dpost[o]    = f . dX'[o]
        dX[i]      = sum_o comb[i, o] dX'[o]          dcomb[i, o] = X[i] . dX'[o]

    Writes dx [T, N, C] (dX, or dX' without MERGE), df [T, C], this chunk's share of dpost
    [chunks, T, N] and dcomb [chunks, T, N, N], this range's share of dfn [ranges, COUNT, N * C].
    A block owns channels and walks the tokens, so that its slice of fn is read once and its slice
    of dfn stays in registers.
    """
    chunk = tl.program_id(0)
    piece = tl.program_id(1)
    channel = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C if C % BLOCK_C else tl.full((BLOCK_C,), True, tl.int1)
    row = tl.arange(0, ROWS)
    if MAP:
        # Streams side by side: one matrix product takes the channels of all of them.
        stacked = tl.arange(0, N * BLOCK_C)
        position = chunk * BLOCK_C + stacked % BLOCK_C
        weight_at = stacked // BLOCK_C * C + position
        weight_mask = (row < COUNT)[None, :] & (position < C)[:, None]
        weight = tl.load(
            fn_ptr + weight_at[:, None] + row[None, :] * (N * C), mask=weight_mask, other=0.0
        )
        sums = tl.zeros((N * BLOCK_C, ROWS), tl.float32)

    start = piece * range_tokens
    stop = tl.minimum(start + range_tokens, tokens)
    mask = inside[None, :]
    for t in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        rows = t + tl.arange(0, BLOCK_T).to(tl.int64)
        valid = rows < stop
        rows = tl.minimum(rows, tokens - 1)
        small = rows[:, None] * C + channel[None, :]
        wide = rows[:, None] * (N * C) + channel[None, :]
        store = valid[:, None] & inside[None, :]
        tiles = load_tiles(x_ptr, wide, mask, C, N)
        arriving = load_tiles(dx_next_ptr, wide, mask, C, N if HAS_DX else 0)
        f_ahead = load_tiles(f_ptr, small, mask, 0, 1 if MERGE else 0)
        du_ahead = load_tiles(du_ptr, small, mask, 0, 1 if MAP else 0)
        streams = to_float(tiles, N)
        arriving = to_float(arriving, N if HAS_DX else 0)
        if MERGE:
            f = f_ahead[0].to(tl.float32)
            if MAP:
                post = load_scalars(numbers_ptr + ROWS, rows, WIDTH, N)
                comb = load_scalars(numbers_ptr + ROWS + N, rows, WIDTH, N * N)
            else:
                post = load_scalars(post_ptr, rows, N, N)
                comb = load_scalars(comb_ptr, rows, N * N, N * N)
            df = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            dx = ()
            for _ in tl.static_range(N):
                dx = dx + (tl.zeros((BLOCK_T, BLOCK_C), tl.float32),)
        if MAP:
            du = du_ahead[0].to(tl.float32)
            pre = load_scalars(numbers_ptr + ROWS + N + N * N, rows, WIDTH, N)
            coefficients = load_scalars(numbers_ptr + ROWS + 2 * N + N * N, rows, WIDTH, 2)
            coefficient = coefficients[0] + coefficients[1]
            dz = load_dz(numbers_ptr, planes_ptr, rows, valid, ROWS, WIDTH, PLANES)
            product = tl.dot(weight, tl.trans(dz[0]), input_precision=PRECISION)
            mapped = separate(tl.trans(product), N, BLOCK_T, BLOCK_C)
            narrows = ()
        if MERGE:
            dposts = ()
            dcombs = ()
        for o in tl.static_range(N):
            if MAP:
                if MERGE:
                    merged = merge_stream(streams, f, post, comb, o, N)
                    narrow = merged.to(x_ptr.dtype.element_ty)
                else:
                    merged = streams[o]
                    narrow = tiles[o]
                g = mapped[o] + pre[o][:, None] * du + coefficient[:, None] * merged
                if HAS_DX:
                    g += arriving[o]
                narrows = narrows + (narrow if PLANES == 2 else merged,)
            else:
                g = arriving[o]
            if MERGE:
                df += post[o][:, None] * g
                dposts = dposts + (tl.sum(f * g, 1),)
                summed = ()
                for i in tl.static_range(N):
                    summed = summed + (dx[i] + comb[i * N + o][:, None] * g,)
                    dcombs = dcombs + (tl.sum(streams[i] * g, 1),)
                dx = summed
            else:
                tl.store(dx_ptr + wide + o * C, g.to(dx_ptr.dtype.element_ty), mask=store)
        if MERGE:
            tl.store(df_ptr + small, df.to(df_ptr.dtype.element_ty), mask=store)
            for i in tl.static_range(N):
                tl.store(dx_ptr + wide + i * C, dx[i].to(dx_ptr.dtype.element_ty), mask=store)
            first = chunk.to(tl.int64) * tokens
            j = tl.arange(0, N)
            tl.store(
                dpost_ptr + (first + rows)[:, None] * N + j[None, :],
                tl.reshape(stack(dposts, N), (BLOCK_T, N)),
                mask=valid[:, None],
            )
            ordered = ()
            for k in tl.static_range(N * N):
                ordered = ordered + (dcombs[(k % N) * N + k // N],)  # from (out, in) to (in, out)
            k = tl.arange(0, N * N)
            tl.store(
                dcomb_ptr + (first + rows)[:, None] * (N * N) + k[None, :],
                tl.reshape(stack(ordered, N * N), (BLOCK_T, N * N)),
                mask=valid[:, None],
            )
        if MAP:
            side_by_side = tl.trans(concatenate(narrows, N, BLOCK_T, BLOCK_C))
            if PLANES == 2:
                sums = tl.dot(side_by_side, dz[2], tl.dot(side_by_side, dz[1], sums))
            else:
                sums = tl.dot(side_by_side, dz[0], sums, input_precision=PRECISION)

    if MAP:
        share = dfn_ptr + piece.to(tl.int64) * (COUNT * N * C)
        at = weight_at[:, None] + row[None, :] * (N * C)
        tl.store(share + at, sums, mask=weight_mask)
