"""Gradients of the streams: merge, aggregation and mapping summed in one pass."""

import triton
import triton.language as tl

from .merge_map_kernel import load_scalars, load_streams, merge_stream


@triton.jit(do_not_specialize=["tokens", "range_tokens"])
def streams_backward_kernel(
    x_ptr,
    f_ptr,
    post_ptr,
    comb_ptr,
    fn_ptr,
    dx_next_ptr,
    du_ptr,
    dz_ptr,
    coefficient_ptr,
    pre_ptr,
    dx_ptr,
    df_ptr,
    dmerge_ptr,
    dfn_ptr,
    tokens,
    range_tokens,
    N: tl.constexpr,
    C: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    MERGE: tl.constexpr,
    MAP: tl.constexpr,
    HAS_DX: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
    STAGES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Program (c, s): BLOCK_C channels of token range s. Per token, with X' the merged streams
    (formed again from X and f; X itself without MERGE) and dz, coefficient and pre of
    :mod:`.mapping_backward_kernel`:

        dX'[o]     = dx_next[o] + pre[o] du + coefficient X'[o] + (dz @ fn)[o]
        df         = sum_o post[o] dX'[o]             dpost[o]    = f . dX'[o]
        dX[i]      = sum_o comb[i, o] dX'[o]          dcomb[i, o] = X[i] . dX'[o]

    Writes dx [T, N, C] (dX, or dX' without MERGE), df [T, C], this chunk's share of dpost and
    dcomb to dmerge [chunks, N + N * N, T], this range's share of dfn to dfn [ranges, COUNT, N * C].
    A block owns channels and walks the tokens, so that its slice of fn is read once and its slice
    of dfn stays in registers.
    """
    chunk = tl.program_id(0)
    piece = tl.program_id(1)
    channel = chunk * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C if C % BLOCK_C else tl.full((BLOCK_C,), True, tl.int1)
    row = tl.arange(0, ROWS)
    if MAP:
        weights = ()
        sums = ()
        at = row[:, None] * (N * C) + channel[None, :]
        for o in tl.static_range(N):
            weight = tl.load(
                fn_ptr + at + o * C, mask=(row < COUNT)[:, None] & inside[None, :], other=0.0
            )
            weights = weights + (weight,)
            sums = sums + (tl.zeros((ROWS, BLOCK_C), tl.float32),)

    start = piece * range_tokens
    stop = tl.minimum(start + range_tokens, tokens)
    for t in tl.range(start, stop, BLOCK_T, num_stages=STAGES):
        rows = t + tl.arange(0, BLOCK_T).to(tl.int64)
        valid = rows < stop
        last = tl.zeros_like(rows) + tokens - 1
        rows = tl.minimum(rows, last)
        small = rows[:, None] * C + channel[None, :]
        wide = rows[:, None] * (N * C) + channel[None, :]
        mask = inside[None, :]
        store = valid[:, None] & inside[None, :]
        streams = load_streams(x_ptr, wide, mask, C, N)
        if HAS_DX:
            dstreams = load_streams(dx_next_ptr, wide, mask, C, N)
        if MERGE:
            f = tl.load(f_ptr + small, mask=mask, other=0.0).to(tl.float32)
            post = load_scalars(post_ptr, rows, N, N)
            comb = load_scalars(comb_ptr, rows, N * N, N * N)
            df = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
            dx = ()
            for i in tl.static_range(N):
                dx = dx + (tl.zeros((BLOCK_T, BLOCK_C), tl.float32),)
        if MAP:
            du = tl.load(du_ptr + small, mask=mask, other=0.0).to(tl.float32)
            pre = load_scalars(pre_ptr, rows, N, N)
            coefficient = tl.load(coefficient_ptr + rows)
            dz_at = rows[:, None] * COUNT + row[None, :]
            dz = tl.load(dz_ptr + dz_at, mask=valid[:, None] & (row < COUNT)[None, :], other=0.0)
            dz_t_at = rows[None, :] * COUNT + row[:, None]
            dz_t = tl.load(dz_ptr + dz_t_at, mask=valid[None, :] & (row < COUNT)[:, None], other=0.0)
            updated = ()
        for o in tl.static_range(N):
            if MAP:
                if MERGE:
                    narrow = merge_stream(streams, f, post, comb, o, N).to(x_ptr.dtype.element_ty)
                    merged = narrow.to(tl.float32)
                else:
                    merged = streams[o]
                    narrow = merged.to(x_ptr.dtype.element_ty)
                g = tl.dot(dz, weights[o], input_precision=PRECISION)
                g += pre[o][:, None] * du + coefficient[:, None] * merged
                if HAS_DX:
                    g += dstreams[o]
                if x_ptr.dtype.element_ty == tl.bfloat16:
                    # X' is exact in bf16; dz in two parts has 16 bits of mantissa.
                    hi = dz_t.to(tl.bfloat16)
                    lo = (dz_t - hi.to(tl.float32)).to(tl.bfloat16)
                    total = tl.dot(lo, narrow, tl.dot(hi, narrow, sums[o]))
                else:
                    total = tl.dot(dz_t, merged, sums[o], input_precision=PRECISION)
                updated = updated + (total,)
            else:
                g = dstreams[o]
            if MERGE:
                df += post[o][:, None] * g
                part = dmerge_ptr + chunk.to(tl.int64) * (N + N * N) * tokens + rows
                tl.store(part + o * tokens.to(tl.int64), tl.sum(f * g, 1), mask=valid)
                summed = ()
                for i in tl.static_range(N):
                    summed = summed + (dx[i] + comb[i * N + o][:, None] * g,)
                    tl.store(
                        part + (N + i * N + o) * tokens.to(tl.int64),
                        tl.sum(streams[i] * g, 1),
                        mask=valid,
                    )
                dx = summed
            else:
                tl.store(dx_ptr + wide + o * C, g.to(dx_ptr.dtype.element_ty), mask=store)
        if MERGE:
            tl.store(df_ptr + small, df.to(df_ptr.dtype.element_ty), mask=store)
            for i in tl.static_range(N):
                tl.store(dx_ptr + wide + i * C, dx[i].to(dx_ptr.dtype.element_ty), mask=store)
        if MAP:
            sums = updated

    if MAP:
        at = piece.to(tl.int64) * (COUNT * N * C) + row[:, None] * (N * C) + channel[None, :]
        for o in tl.static_range(N):
            tl.store(
                dfn_ptr + at + o * C, sums[o], mask=(row < COUNT)[:, None] & inside[None, :]
            )
