"""Merges and aggregations of consecutive sublayers whose mappings are known, in one pass over X."""

import triton
import triton.language as tl

from .accumulate import accumulate
from .merge_map_kernel import load_scalars, load_tiles, merge_stream, to_float


@triton.jit
def load_mappings(post_ptr, comb_ptr, pre_ptr, rows, N: tl.constexpr, MERGE: tl.constexpr):
    """post, comb and pre of one sublayer as tuples of [BLOCK_T]; without MERGE, pre alone."""
    post = load_scalars(post_ptr, rows, N, N if MERGE else 0)
    comb = load_scalars(comb_ptr, rows, N * N, N * N if MERGE else 0)
    return post, comb, load_scalars(pre_ptr, rows, N, N)


@triton.jit(do_not_specialize=["tokens"])
def merge_aggregate_kernel(
    x_ptr,
    f_ptrs,
    post_ptrs,
    comb_ptrs,
    pre_ptrs,
    x_next_ptrs,
    u_ptrs,
    tokens,
    N: tl.constexpr,
    C: tl.constexpr,
    SUBLAYERS: tl.constexpr,
    FIRST_MERGES: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """For every sublayer k: X = merge(X, f[k], post[k], comb[k]); u[k] = sum_i pre[k][i] X[i].

    x [T, N, C]; a tuple of SUBLAYERS pointers each: f [T, C], post [T, N], comb [T, N, N] and pre
    [T, N]. Writes x_next [T, N, C] and u [T, C] of every sublayer. Without FIRST_MERGES the first
    one aggregates x as it is, and its f, post, comb and x_next are not touched. A program owns
    BLOCK_T tokens and BLOCK_C channels, and holds their streams from sublayer to sublayer.
    """
    chunks: tl.constexpr = (C + BLOCK_C - 1) // BLOCK_C
    pid = tl.program_id(0)
    rows = (pid // chunks).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    valid = rows < tokens
    last = tl.zeros_like(rows) + tokens - 1
    rows = tl.minimum(rows, last)
    channel = pid % chunks * BLOCK_C + tl.arange(0, BLOCK_C)
    inside = channel < C if C % BLOCK_C else tl.full((BLOCK_C,), True, tl.int1)
    mask = inside[None, :]
    stored = valid[:, None] & mask
    wide = rows[:, None] * (N * C) + channel[None, :]
    narrow = rows[:, None] * C + channel[None, :]

    # What does not depend on an earlier sublayer is asked for before the first result is stored:
    # the compiler moves no load across a store.
    streams = to_float(load_tiles(x_ptr, wide, mask, C, N), N)
    fs = ()
    for k in tl.static_range(SUBLAYERS):
        if k > 0 or FIRST_MERGES:
            fs = fs + (tl.load(f_ptrs[k] + narrow, mask=mask, other=0.0),)
        else:
            fs = fs + (0.0,)
    ahead = load_mappings(post_ptrs[0], comb_ptrs[0], pre_ptrs[0], rows, N, FIRST_MERGES)
    for k in tl.static_range(SUBLAYERS):
        post, comb, pre = ahead
        if k + 1 < SUBLAYERS:
            ahead = load_mappings(
                post_ptrs[k + 1], comb_ptrs[k + 1], pre_ptrs[k + 1], rows, N, True
            )
        if k > 0 or FIRST_MERGES:
            f = fs[k].to(tl.float32)
            merged = ()
            for o in tl.static_range(N):
                stream = merge_stream(streams, f, post, comb, o, N).to(x_ptr.dtype.element_ty)
                tl.store(x_next_ptrs[k] + wide + o * C, stream, mask=stored)
                merged = merged + (stream.to(tl.float32),)
            streams = merged
        u = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for j in tl.static_range(N):
            u = accumulate(u, pre[j], streams[j])
        tl.store(u_ptrs[k] + narrow, u.to(x_ptr.dtype.element_ty), mask=stored)
