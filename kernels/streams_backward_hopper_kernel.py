"""Gradients of the streams on Hopper, in Gluon: what streams_backward_kernel computes, with its
copies and matrix products running beside the arithmetic.

One warp keeps rings of tiles full by bulk tensor copies; eight warps compute. In step k they put
X' of tile k into shared memory, start its product for d fn and the product dz @ fn of tile k + 1,
and form tile k's sums meanwhile. bfloat16 streams, n = 4.
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

from .hopper_parts import arrive, columns, make_barriers, places_of_fn, separate, stack

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
SWAP_4 = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 4, 0x1f, 0xffffffff;")
SWAP_2 = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 2, 0x1f, 0xffffffff;")
SWAP_1 = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 1, 0x1f, 0xffffffff;")


@gluon.jit
def sum_thread(value, T: gl.constexpr, B: gl.constexpr, LAYOUT: gl.constexpr):
    """Sums of 8 channels each, [T, B // 8]: what one thread has of value [T, B]."""
    total = gl.sum(gl.reshape(value, (T, B // 8, 8)), 2)
    return gl.convert_layout(total, LAYOUT, assert_trivial=True)


@gluon.jit
def fold(values, COUNT: gl.constexpr, upper, EXCHANGE: gl.constexpr):
    """Sums of COUNT values over pairs of lanes, shared out: the lane that is not ``upper`` keeps
    the first half of them. A third of the shuffles that full sums for every lane take.

    EXCHANGE: instruction that swaps a value between the lanes of a pair.
    """
    HALF: gl.constexpr = (COUNT + 1) // 2
    kept = ()
    for k in gl.static_range(COUNT // 2):
        mine = gl.where(upper, values[HALF + k], values[k])
        other = gl.where(upper, values[k], values[HALF + k])
        kept = kept + (mine + exchange(other, EXCHANGE),)
    if COUNT % 2:  # the middle one, for both
        kept = kept + (values[HALF - 1] + exchange(values[HALF - 1], EXCHANGE),)
    return kept


@gluon.jit
def exchange(value, EXCHANGE: gl.constexpr):
    """value, one element a thread, of the other lane of a pair."""
    return gl.inline_asm_elementwise(
        EXCHANGE, "=f,f", [value], dtype=gl.float32, is_pure=False, pack=1
    )


@gluon.jit
def load_tiles(
    sources, rings, full, empty, begin, steps, tiles,
    N: gl.constexpr, T: gl.constexpr, B: gl.constexpr,
):  # fmt: skip
    """The loading warp: tiles of x, dx_next, f and du two deep, the tokens' numbers three deep.
    Tile k - 3, whose numbers lie where tile k's go, was done when tile k - 1 could be loaded.
    """
    x, dx_next, f, du, numbers, planes = sources
    xs, gs, fs, dus, number_ring, plane_ring = rings
    x_full, g_full, f_full, du_full, number_full, plane_full = full
    wide: gl.constexpr = N * T * B * 2
    narrow: gl.constexpr = T * B * 2
    for step in range(steps):
        t = (begin + step) % tiles * T
        channel = (begin + step) // tiles * B
        slot = step % 3
        mbarrier.expect(number_full.index(slot), T * 64 * 4)
        mbarrier.expect(plane_full.index(slot), T * 64 * 2)
        bar = number_full.index(slot)
        tma.async_copy_global_to_shared(numbers, [t, 0], bar, number_ring.index(slot))
        bar = plane_full.index(slot)
        tma.async_copy_global_to_shared(planes, [t, 0], bar, plane_ring.index(slot))
        slot = step % 2
        mbarrier.wait(empty.index(slot), ((step // 2) & 1) ^ 1)
        mbarrier.expect(x_full.index(slot), wide)
        mbarrier.expect(g_full.index(slot), wide)
        mbarrier.expect(f_full.index(slot), narrow)
        mbarrier.expect(du_full.index(slot), narrow)
        tma.async_copy_global_to_shared(f, [t, channel], f_full.index(slot), fs.index(slot))
        tma.async_copy_global_to_shared(x, [t, 0, channel], x_full.index(slot), xs.index(slot))
        tma.async_copy_global_to_shared(du, [t, channel], du_full.index(slot), dus.index(slot))
        bar = g_full.index(slot)
        tma.async_copy_global_to_shared(dx_next, [t, 0, channel], bar, gs.index(slot))


@gluon.jit
def sum_tiles(
    targets, rings, full, empty, buffers, fn_ptr, dpost_ptr, dcomb_ptr, dfn_ptr,
    tokens, begin, steps, tiles, work,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """The computing warps; the equations are those of streams_backward_kernel. Their tiles are of
    one block of channels, or the last of one and the first of the next.
    """
    COUNT: gl.constexpr = (2 + N) * N
    ROWS: gl.constexpr = 32
    lanes: gl.constexpr = B // 8
    tokens_a_warp: gl.constexpr = 32 // lanes
    # A thread has 8 channels of one token (of all streams where there are streams).
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [tokens_a_warp, lanes], [num_warps, 1], [1, 0])
    streams3: gl.constexpr = gl.BlockedLayout(
        [1, N, 8], [tokens_a_warp, 1, lanes], [num_warps, 1, 1], [2, 1, 0]
    )
    row32: gl.constexpr = gl.BlockedLayout([1, 32], [tokens_a_warp, lanes], [num_warps, 1], [1, 0])
    spread: gl.constexpr = gl.BlockedLayout([1, 1], [tokens_a_warp, lanes], [num_warps, 1], [1, 0])
    token: gl.constexpr = gl.SliceLayout(1, plain)
    tf32: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, T, 8])
    bf16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    weight_load: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [num_warps, 1], [0, 1])

    dx_out, df_out = targets
    xs, gs, fs, dus, number_ring, plane_ring = rings
    x_full, g_full, f_full, du_full, number_full, plane_full = full
    weight, products, merged_tile, dx_tile, df_tile = buffers
    merged_flat = merged_tile._reinterpret(gl.bfloat16, [T, N * B], tile)
    merged_rows = merged_flat.permute((1, 0))
    done = gl.to_tensor(0)
    while done < steps:
        chunk = (begin + done) // tiles
        channel = chunk * B
        until = gl.minimum((chunk + 1) * tiles - begin, steps)
        # No warp is still at the products of the block of channels before.
        gl.thread_barrier()
        # The block's slice of fn, the first operand of dz @ fn: rows (stream, channel), columns k.
        at, inside = places_of_fn(channel, N, C, B, ROWS, weight_load)
        weight.store(gl.load(fn_ptr + at, mask=inside, other=0.0))
        sums = gl.zeros((N * B, ROWS), gl.float32, layout=bf16)
        zero = gl.zeros((N * B, T), gl.float32, layout=tf32)
        fence_async_shared()
        gl.thread_barrier()

        number_slot = done % 3
        mbarrier.wait(number_full.index(number_slot), (done // 3) & 1)
        dz = number_ring.index(number_slot).slice(0, ROWS, dim=1).permute((1, 0))
        product = warpgroup_mma(weight, dz, warpgroup_mma_init(zero), use_acc=False, is_async=True)
        product = warpgroup_mma_wait(0, deps=(product,))

        before = (begin - chunk * tiles) * T
        for step in range(done, until):
            t = before + step * T
            slot = step % 2
            phase = (step // 2) & 1
            number_slot = step % 3
            products.permute((1, 0)).store(product)
            mbarrier.wait(f_full.index(slot), phase)
            mbarrier.wait(x_full.index(slot), phase)
            numbers = number_ring.index(number_slot).slice(ROWS, 32, dim=1).load(row32)
            # post | comb | pre | the coefficient's two parts
            scalars = columns(numbers, N * N + 2 * N + 2, 32, T, token)
            coefficient = scalars[N * N + 2 * N] + scalars[N * N + 2 * N + 1]
            f = fs.index(slot).load(plain).to(gl.float32)
            streams = separate(xs.index(slot).load(streams3), N, T, B, plain)
            merged = ()
            for o in gl.static_range(N):
                stream = scalars[o][:, None] * f
                for i in gl.static_range(N):
                    stream += scalars[N + i * N + o][:, None] * streams[i].to(gl.float32)
                merged = merged + (stream.to(gl.bfloat16),)
            merged_tile.store(gl.permute(gl.reshape(stack(merged, N), (T, B, N)), (2, 0, 1)))
            fence_async_shared()
            tma.store_wait(0)
            gl.thread_barrier()

            mbarrier.wait(plane_full.index(number_slot), (step // 3) & 1)
            planes = plane_ring.index(number_slot)
            hi = planes.slice(0, ROWS, dim=1)
            lo = planes.slice(ROWS, ROWS, dim=1)
            running = warpgroup_mma(merged_rows, hi, warpgroup_mma_init(sums), is_async=True)
            running = warpgroup_mma(merged_rows, lo, running, is_async=True)
            following = (step + 1) % 3
            more = step + 1 < until
            mbarrier.wait(number_full.index(following), ((step + 1) // 3) & 1, pred=more)
            dz = number_ring.index(following).slice(0, ROWS, dim=1).permute((1, 0))
            product = warpgroup_mma(
                weight, dz, warpgroup_mma_init(product), use_acc=False, is_async=True
            )

            mbarrier.wait(du_full.index(slot), phase)
            mbarrier.wait(g_full.index(slot), phase)
            du = dus.index(slot).load(plain).to(gl.float32)
            arriving = separate(gs.index(slot).load(streams3), N, T, B, plain)
            df = gl.zeros((T, B), gl.float32, layout=plain)
            dx = ()
            for _ in gl.static_range(N):
                dx = dx + (df,)
            dposts = ()
            dcombs = ()
            for o in gl.static_range(N):
                g = products.slice(o * B, B, dim=1).load(plain) + arriving[o].to(gl.float32)
                g += scalars[N + N * N + o][:, None] * du
                stream = merged_flat.slice(o * B, B, dim=1).load(plain).to(gl.float32)
                g += coefficient[:, None] * stream
                df += scalars[o][:, None] * g
                dposts = dposts + (sum_thread(f * g, T, B, spread),)
                summed = ()
                for i in gl.static_range(N):
                    summed = summed + (dx[i] + scalars[N + i * N + o][:, None] * g,)
                    product_of = streams[i].to(gl.float32) * g
                    dcombs = dcombs + (sum_thread(product_of, T, B, spread),)
                dx = summed
            df_tile.store(df.to(gl.bfloat16))
            rounded = ()
            for i in gl.static_range(N):
                rounded = rounded + (dx[i].to(gl.bfloat16),)
            dx_tile.store(gl.permute(gl.reshape(stack(rounded, N), (T, B, N)), (0, 2, 1)))
            # Four warps at a time multiply, and wait for themselves: all must have, before the
            # barrier after which another tile takes the place of X'.
            sums = warpgroup_mma_wait(1, deps=(running,))
            fence_async_shared()
            gl.thread_barrier()
            # The tile's numbers are free too: the loading warp waits for this before the next.
            arrive(empty.index(slot))
            tma.async_copy_shared_to_global(df_out, [t, channel], df_tile)
            tma.async_copy_shared_to_global(dx_out, [t, 0, channel], dx_tile)

            # 20 sums over a token's 8 lanes: a lane ends with 3, one of them its neighbour's too.
            shares = ()
            for i in gl.static_range(N):
                for o in gl.static_range(N):
                    shares = shares + (dcombs[o * N + i],)
            shares = shares + dposts
            lane = gl.arange(0, lanes, layout=gl.SliceLayout(0, spread))[None, :]
            shares = fold(shares, 20, (lane & 4) != 0, SWAP_4)
            shares = fold(shares, 10, (lane & 2) != 0, SWAP_2)
            shares = fold(shares, 5, (lane & 1) != 0, SWAP_1)
            rows = t + gl.arange(0, T, layout=gl.SliceLayout(1, spread))
            valid = (rows < tokens)[:, None]
            token_share = (chunk.to(gl.int64) * tokens + rows)[:, None]
            first = (lane >> 2) * 10 + ((lane >> 1) & 1) * 5 + (lane & 1) * 3
            for j in gl.static_range(3):
                of_post = first + j - N * N
                at_comb = dcomb_ptr + token_share * (N * N) + first + j
                at_post = dpost_ptr + token_share * N + of_post
                mine = valid & (((lane & 1) == 0) | (j < 2))
                share_at = gl.where(of_post < 0, at_comb, at_post)
                gl.store(share_at, shares[j], mask=mine, eviction_policy="evict_last")
            product = warpgroup_mma_wait(0, deps=(product,))

        at, inside = places_of_fn(channel, N, C, B, ROWS, bf16)
        piece = (begin + done) // work - chunk * tiles // work
        gl.store(dfn_ptr + piece.to(gl.int64) * (COUNT * N * C) + at, sums, mask=inside)
        done = until
    tma.store_wait(0)


@gluon.jit(do_not_specialize=["tokens", "work"])
def streams_backward_hopper_kernel(
    x, f, dx_next, du, numbers, planes, dx, df, fn_ptr, dpost_ptr, dcomb_ptr, dfn_ptr,
    tokens, work,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """Tiles (T tokens, B channels), one block of channels after the other, are cut into ``work``
    for each program; otherwise as streams_backward_kernel.

    x, dx_next, dx [tokens, N, C], f, du, df [tokens, C], numbers and planes [tokens, 64] are tensor
    descriptors; dpost [chunks, tokens, N], dcomb [chunks, tokens, N, N] and dfn [.., COUNT,
    N * C] take the shares, dfn's in the order of the programs. Tiles past the end are filled with
    zeros and not written.
    """
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    tile3: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    words: gl.constexpr = gl.NVMMASharedLayout(128, 32, rank=2)
    tiles = gl.cdiv(tokens, T)
    begin = gl.program_id(0) * work
    steps = gl.minimum(work, gl.cdiv(C, B) * tiles - begin)

    xs = gl.allocate_shared_memory(gl.bfloat16, [2, T, N, B], tile3)
    gs = gl.allocate_shared_memory(gl.bfloat16, [2, T, N, B], tile3)
    fs = gl.allocate_shared_memory(gl.bfloat16, [2, T, B], tile)
    dus = gl.allocate_shared_memory(gl.bfloat16, [2, T, B], tile)
    number_ring = gl.allocate_shared_memory(gl.float32, [3, T, 64], words)
    plane_ring = gl.allocate_shared_memory(gl.bfloat16, [3, T, 64], tile)
    weight = gl.allocate_shared_memory(gl.float32, [N * B, 32], words)
    products = gl.allocate_shared_memory(gl.float32, [T, N * B], PRODUCTS_TILE)
    merged_tile = gl.allocate_shared_memory(gl.bfloat16, [N, T, B], tile3)
    dx_tile = gl.allocate_shared_memory(gl.bfloat16, [T, N, B], tile3)
    df_tile = gl.allocate_shared_memory(gl.bfloat16, [T, B], tile)
    full = (
        make_barriers(2, 1),
        make_barriers(2, 1),
        make_barriers(2, 1),
        make_barriers(2, 1),
        make_barriers(3, 1),
        make_barriers(3, 1),
    )
    empty = make_barriers(2, 1)
    fence_async_shared()
    gl.thread_barrier()

    rings = (xs, gs, fs, dus, number_ring, plane_ring)
    buffers = (weight, products, merged_tile, dx_tile, df_tile)
    # fmt: off
    gl.warp_specialize([
        (sum_tiles, ((dx, df), rings, full, empty, buffers, fn_ptr, dpost_ptr, dcomb_ptr, dfn_ptr,
                     tokens, begin, steps, tiles, work, N, C, T, B, num_warps)),
        (load_tiles, ((x, dx_next, f, du, numbers, planes), rings, full, empty,
                      begin, steps, tiles, N, T, B)),
    ], [1], [24])
    # fmt: on
