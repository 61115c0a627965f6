"""Gradients of the streams on Hopper, in Gluon: what streams_backward_kernel computes, with merges,
sums, copies and matrix products beside each other.

Warps: 4 merge, a tile ahead, and multiply with fn (streams_backward_hopper_merge.py); 8 do all that
follows (streams_backward_hopper_sums.py); one each loads, and copies results out. What goes from
one to the next lies in rings: X, f and the tokens' numbers three tiles deep, dX' and du, in whose
place come dX and df, and X' two. bfloat16 streams, n = 4.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from .hopper_parts import arrive, make_barriers, part_of
from .streams_backward_hopper_merge import ROWS, merge_tiles
from .streams_backward_hopper_sums import sum_tiles

BLOCK_T, BLOCK_C, NUM_WARPS = 32, 64, 8
TILE = gl.NVMMASharedLayout(128, 16, rank=2)
STREAMS_TILE = gl.NVMMASharedLayout(128, 16, rank=3)
NUMBERS_TILE = gl.NVMMASharedLayout(128, 32, rank=2)
# dz @ fn [T, N * B] in float32, bits of an element's place to (token, column). Banks are bits 0 to
# 4: neither the matrix units' writes (8 columns of 4 tokens at a time) nor the reads that follow (4
# columns of every second 4, of one token) collide in them.
PRODUCTS_TILE = gl.constexpr(
    gl.SharedLinearLayout(
        [[0, 1], [0, 2], [0, 8], [0, 16], [0, 32], [0, 12], [1, 0], [2, 16], [4, 32]]
        + [[8, 0], [16, 0], [0, 64], [0, 128]]
    )
)
# Of a thread of the warps that merge, load and copy out; those that sum have the rest.
REGISTERS = gl.constexpr((136, 24, 24))


@gluon.jit
def load_tiles(
    sources, rings, full, g_full, g_empty, part,
    N: gl.constexpr, T: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """The loading warp. What belongs to a tile whose dX is copied out has been read: when dX' of
    tile k may take the place of tile k - 2's, so may X of tile k + 1.
    """
    x, f, numbers, dx_next, du = sources
    xs, fs, number_ring, gs, dus = rings
    first, window, begin, steps, _, _ = part
    STREAMS: gl.constexpr = (N + 1) * T * B * 2
    for step in range(steps):
        t = (first + (begin + step) % window) * T
        channel = (begin + step) // window * B
        slot = step % 3
        bar = full.index(slot)
        mbarrier.expect(bar, STREAMS + T * 2 * ROWS * 4)
        tma.async_copy_global_to_shared(x, [t, 0, channel], bar, xs.index(slot))
        tma.async_copy_global_to_shared(f, [t, channel], bar, fs.index(slot))
        tma.async_copy_global_to_shared(numbers, [t, 0], bar, number_ring.index(slot))
        slot = step % 2
        bar = g_full.index(slot)
        mbarrier.wait(g_empty.index(slot), ((step // 2) & 1) ^ 1)
        mbarrier.expect(bar, STREAMS)
        tma.async_copy_global_to_shared(dx_next, [t, 0, channel], bar, gs.index(slot))
        tma.async_copy_global_to_shared(du, [t, channel], bar, dus.index(slot))


@gluon.jit
def store_tiles(targets, gs, dus, out_full, g_empty, part, T: gl.constexpr, B: gl.constexpr):
    """The warp that copies dX and df out."""
    dx, df = targets
    first, window, begin, steps, _, _ = part
    for step in range(steps):
        t = (first + (begin + step) % window) * T
        channel = (begin + step) // window * B
        slot = step % 2
        mbarrier.wait(out_full.index(slot), (step // 2) & 1)
        tma.async_copy_shared_to_global(dx, [t, 0, channel], gs.index(slot))
        tma.async_copy_shared_to_global(df, [t, channel], dus.index(slot))
        tma.store_wait(0)
        arrive(g_empty.index(slot))


@gluon.jit(do_not_specialize=["tokens", "ranges", "length", "work"])
def streams_backward_hopper_kernel(
    x, f, dx_next, du, numbers, dx, df, fn_ptr, dpost_ptr, dcomb_ptr, dfn_ptr,
    tokens, ranges, length, work,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Tiles (T tokens, B channels) are shared out among the programs as part_of says; otherwise as
    streams_backward_kernel.

    x, dx_next, dx [tokens, N, C], f, du, df [tokens, C] and numbers [tokens, 64] are tensor
    descriptors; dpost [chunks, tokens, N], dcomb [chunks, tokens, N, N] and dfn [.., COUNT,
    N * C] take the shares, dfn's in the order of the programs. Tiles past the end are filled with
    zeros and not written.
    """
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    tile3: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    half: gl.constexpr = gl.NVMMASharedLayout(64, 16, rank=2)
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    part = part_of(gl.cdiv(tokens, T), ranges, length, work, (C + B - 1) // B)

    xs = gl.allocate_shared_memory(gl.bfloat16, [3, T, N, B], tile3)
    fs = gl.allocate_shared_memory(gl.bfloat16, [3, T, B], tile)
    number_ring = gl.allocate_shared_memory(gl.float32, [3, T, 2 * ROWS], words)
    gs = gl.allocate_shared_memory(gl.bfloat16, [2, T, N, B], tile3)
    dus = gl.allocate_shared_memory(gl.bfloat16, [2, T, B], tile)
    merged_ring = gl.allocate_shared_memory(gl.bfloat16, [2, N, T, B], tile3)
    weight = gl.allocate_shared_memory(gl.float32, [N * B, ROWS], words)
    products = gl.allocate_shared_memory(gl.float32, [T, N * B], PRODUCTS_TILE)
    hi_tile = gl.allocate_shared_memory(gl.bfloat16, [T, ROWS], half)
    lo_tile = gl.allocate_shared_memory(gl.bfloat16, [T, ROWS], half)
    full = make_barriers(3, 1)
    g_full = make_barriers(2, 1)
    g_empty = make_barriers(2, 1)
    out_full = make_barriers(2, 1)
    formed = make_barriers(1, 1)
    products_empty = make_barriers(1, 1)
    fence_async_shared()
    gl.thread_barrier()

    rings = (xs, fs, number_ring, gs, dus)
    # fmt: off
    gl.warp_specialize([
        (sum_tiles, (rings, full, g_full, formed, products_empty, out_full,
                     (products, merged_ring, hi_tile, lo_tile), dpost_ptr, dcomb_ptr, dfn_ptr,
                     tokens, part, N, C, T, B, num_warps)),
        (merge_tiles, ((xs, fs, number_ring), full, formed, products_empty,
                       (weight, products, merged_ring, hi_tile, lo_tile), fn_ptr, part, N,
                       C, T, B, 4)),
        (load_tiles, ((x, f, numbers, dx_next, du), rings, full, g_full, g_empty, part,
                      N, T, B)),
        (store_tiles, ((dx, df), gs, dus, out_full, g_empty, part, T, B)),
    ], [4, 1, 1], REGISTERS)
    # fmt: on
