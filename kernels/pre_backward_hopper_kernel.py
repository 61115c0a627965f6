"""Gradient of the streams of mhc_pre alone, on Hopper, in Gluon: what streams_backward_kernel
computes without a merge.

One warp keeps a ring of tiles full by bulk tensor copies; eight warps compute. X lies in shared
memory as the product for d fn takes it, and every thread works on the elements that dz @ fn gives
it. bfloat16 streams, n = 4.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .hopper_parts import arrive, columns, make_barriers, part_of, places_of_fn

BLOCK_T, BLOCK_C, NUM_WARPS = 64, 64, 8
TILE = gl.NVMMASharedLayout(128, 16, rank=2)
STREAMS_TILE = gl.NVMMASharedLayout(128, 16, rank=3)
DZ_TILE = gl.NVMMASharedLayout(128, 32, rank=2)
NUMBERS_TILE = gl.NVMMASharedLayout(0, 32, rank=2)
ROWS = gl.constexpr(32)  # of dz, and columns before post, comb and pre in a token's numbers


@gluon.jit
def load_tiles(
    sources, rings, full, empty, part,
    N: gl.constexpr, T: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """The loading warp, two tiles ahead."""
    x, du, dz, numbers, planes = sources
    xs, dus, dzs, pres, coefficients, plane_ring = rings
    BYTES: gl.constexpr = (N + 1) * T * B * 2 + T * (ROWS + 2 * N) * 4 + T * 2 * ROWS * 2
    PRE: gl.constexpr = ROWS + N + N * N
    first, window, begin, steps, _, _ = part
    for step in range(steps):
        t = (first + (begin + step) % window) * T
        channel = (begin + step) // window * B
        slot = step % 2
        bar = full.index(slot)
        mbarrier.wait(empty.index(slot), ((step // 2) & 1) ^ 1)
        mbarrier.expect(bar, BYTES)
        tma.async_copy_global_to_shared(dz, [t, 0], bar, dzs.index(slot))
        tma.async_copy_global_to_shared(x, [0, t, channel], bar, xs.index(slot))
        tma.async_copy_global_to_shared(planes, [t, 0], bar, plane_ring.index(slot))
        tma.async_copy_global_to_shared(du, [t, channel], bar, dus.index(slot))
        tma.async_copy_global_to_shared(numbers, [t, PRE], bar, pres.index(slot))
        tma.async_copy_global_to_shared(numbers, [t, PRE + N], bar, coefficients.index(slot))


@gluon.jit
def sum_tiles(
    dx_out, rings, full, empty, weight, dx_tiles, fn_ptr, dfn_ptr, part,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The computing warps; the equations are those of streams_backward_kernel. Their tiles are of
    one block of channels, or the last of one and the first of the next.
    """
    COUNT: gl.constexpr = (2 + N) * N
    # dz @ fn [T, N * B], as matrix units return it, and the same as [T, N, B]: bits of an element's
    # place in a thread, of the thread in its warp, and of the warp.
    tf32: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps // 2, 2], [16, N * B // 2, 8])
    own: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [8, 0, 0], [0, 0, 8], [0, 0, 16], [0, 0, 32], [0, 1, 0]],
        [[0, 0, 2], [0, 0, 4], [1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [[16, 0, 0], [32, 0, 0], [0, 2, 0]],
        [],
        [T, N, B],
    )
    row4: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 1], [0, 2], [8, 0]],
        [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]],
        [[16, 0], [32, 0], [0, 0]],
        [],
        [T, 4],
    )
    bf16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    weight_load: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [num_warps, 1], [0, 1])
    of_token: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, own))

    xs, dus, dzs, pres, coefficients, plane_ring = rings
    first, window, begin, steps, share, work = part
    zero = gl.zeros((T, N * B), gl.float32, layout=tf32)
    done = gl.to_tensor(0)
    while done < steps:
        chunk = (begin + done) // window
        channel = chunk * B
        until = gl.minimum((chunk + 1) * window - begin, steps)
        # The block's slice of fn, the second operand of dz @ fn: rows (stream, channel), columns k.
        # No warp is still at the products of the block of channels before: each ends behind a
        # barrier.
        at, inside = places_of_fn(channel, N, C, B, ROWS, weight_load)
        weight.store(gl.load(fn_ptr + at, mask=inside, other=0.0))
        sums = gl.zeros((N * B, ROWS), gl.float32, layout=bf16)
        fence_async_shared()
        gl.thread_barrier()

        before = (first + begin - chunk * window) * T
        for step in range(done, until):
            slot = step % 2
            mbarrier.wait(full.index(slot), (step // 2) & 1)
            x_tile = xs.index(slot)
            product = warpgroup_mma(
                dzs.index(slot), weight.permute((1, 0)), warpgroup_mma_init(zero), use_acc=False,
                is_async=True,
            )  # fmt: skip
            x_rows = x_tile._reinterpret(gl.bfloat16, [T, N * B], tile).permute((1, 0))
            planes = plane_ring.index(slot)
            hi = planes.slice(0, ROWS, dim=1)
            lo = planes.slice(ROWS, ROWS, dim=1)
            running = warpgroup_mma(x_rows, hi, warpgroup_mma_init(sums), is_async=True)
            running = warpgroup_mma(x_rows, lo, running, is_async=True)

            x = x_tile.permute((1, 0, 2)).load(own).to(gl.float32)
            du = dus.index(slot).load(gl.SliceLayout(1, own)).to(gl.float32)
            pre = pres.index(slot).load(gl.SliceLayout(2, own))
            parts = columns(coefficients.index(slot).load(row4), 2, 4, T, of_token)
            coefficient = parts[0] + parts[1]
            product = warpgroup_mma_wait(2, deps=(product,))
            g = gl.convert_layout(gl.reshape(product, (T, N, B)), own, assert_trivial=True)
            g += pre[:, :, None] * du[:, None, :]
            g += coefficient[:, None][:, :, None] * x
            dx_tile = dx_tiles.index(slot)
            dx_tile.permute((1, 0, 2)).store(g.to(gl.bfloat16))
            # Four warps at a time multiply, and wait for themselves: all must have, before the
            # barrier after which other tiles come in place of these.
            sums = warpgroup_mma_wait(0, deps=(running,))
            fence_async_shared()
            # The copy before this one has read its tile, which the next step writes.
            tma.store_wait(0)
            gl.thread_barrier()
            arrive(empty.index(slot))
            tma.async_copy_shared_to_global(dx_out, [0, before + step * T, channel], dx_tile)

        at, inside = places_of_fn(channel, N, C, B, ROWS, bf16)
        piece = share + (begin + done) // work - chunk * window // work
        gl.store(dfn_ptr + piece.to(gl.int64) * (COUNT * N * C) + at, sums, mask=inside)
        done = until
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "ranges", "length", "work"])
def pre_backward_hopper_kernel(
    x, du, dz, numbers, planes, dx, fn_ptr, dfn_ptr, tokens, ranges, length, work,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Tiles (T tokens, B channels) are shared out among the programs as part_of says; otherwise as
    streams_backward_kernel.

    x and dx [N, tokens, C] (the streams first), du [tokens, C], dz and numbers [tokens, 64] (both
    the tokens' numbers, in tiles of ROWS and of N columns) and planes [tokens, 64] are tensor
    descriptors; dfn [.., COUNT, N * C] takes the shares in the order of the programs. Tiles past
    the end are filled with zeros and not written.
    """
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    tile3: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    part = part_of(gl.cdiv(tokens, T), ranges, length, work, (C + B - 1) // B)

    xs = gl.allocate_shared_memory(gl.bfloat16, [2, N, T, B], tile3)
    dus = gl.allocate_shared_memory(gl.bfloat16, [2, T, B], tile)
    dzs = gl.allocate_shared_memory(gl.float32, [2, T, ROWS], words)
    pres = gl.allocate_shared_memory(gl.float32, [2, T, N], numbers.layout)
    coefficients = gl.allocate_shared_memory(gl.float32, [2, T, N], numbers.layout)
    plane_ring = gl.allocate_shared_memory(gl.bfloat16, [2, T, 2 * ROWS], tile)
    weight = gl.allocate_shared_memory(gl.float32, [N * B, ROWS], words)
    dx_tiles = gl.allocate_shared_memory(gl.bfloat16, [2, N, T, B], tile3)
    full = make_barriers(2, 1)
    empty = make_barriers(2, 1)
    fence_async_shared()
    gl.thread_barrier()

    rings = (xs, dus, dzs, pres, coefficients, plane_ring)
    # fmt: off
    gl.warp_specialize([
        (sum_tiles, (dx, rings, full, empty, weight, dx_tiles, fn_ptr, dfn_ptr, part, N, C, T, B,
                     num_warps)),
        (load_tiles, ((x, du, dz, numbers, planes), rings, full, empty, part, N, T, B)),
    ], [1], [24])
    # fmt: on
