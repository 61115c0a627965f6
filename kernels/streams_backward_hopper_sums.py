"""The summing warps of streams_backward_hopper_kernel: the gradients, from X' and its products."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    mma_v2,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .hopper_parts import arrive, columns, places_of_fn, separate, stack, to_float
from .streams_backward_hopper_merge import ROWS

# Swaps values of lanes that are 4 apart.
SWAP_4 = gl.constexpr("shfl.sync.bfly.b32 $0, $1, 4, 0x1f, 0xffffffff;")


@gluon.jit
def left_operand(first, second, T: gl.constexpr, B: gl.constexpr, OPERAND: gl.constexpr):
    """Two tiles [T, B] as operand [T // 4, 2 tiles x 4 tokens x 2 halves, B // 2 channels]."""
    both = gl.reshape(gl.join(first, second), (T // 4, 4, 2, B // 2, 2))
    both = gl.reshape(gl.permute(both, (0, 4, 1, 2, 3)), (T // 4, 16, B // 2))
    return gl.convert_layout(both, OPERAND, assert_trivial=True)


@gluon.jit
def right_operand(tile, T: gl.constexpr, B: gl.constexpr, OPERAND: gl.constexpr):
    """A tile [T, B] as operand [T // 4, B // 2 channels, 4 tokens x 2 halves]."""
    tile = gl.permute(gl.reshape(tile, (T // 4, 4, 2, B // 2)), (0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(tile, (T // 4, B // 2, 8)), OPERAND, assert_trivial=True)


@gluon.jit
def dots(left, right, upper, T: gl.constexpr, MMA: gl.constexpr, LAYOUT: gl.constexpr):
    """Dot products over the channels of the halves of tokens, of two tiles with one: two
    [T // 4, 4 tokens x 2 halves, 4], where the last index is the token. upper: of which the half is
    the second.

    The matrix units multiply every half of four tokens with every other, of which an eighth is
    asked for: the elements with one token and half in row and column.
    """
    zero = gl.zeros((T // 4, 16, 8), gl.float32, layout=MMA)
    product = gl.reshape(mma_v2(left, right, zero), (T // 4, 2, 8, 4, 2))
    pair = gl.split(gl.permute(product, (0, 2, 3, 4, 1)))
    found = ()
    for k in gl.static_range(2):
        even, odd = gl.split(pair[k])
        even = gl.convert_layout(even, LAYOUT, assert_trivial=True)
        odd = gl.convert_layout(odd, LAYOUT, assert_trivial=True)
        found = found + (gl.where(upper, odd, even),)
    return found


@gluon.jit
def fold(lowers, uppers, COUNT: gl.constexpr, upper):
    """Sums over the two lanes of a pair, 4 lanes apart: the one that is not ``upper`` has those of
    ``lowers``, the other those of ``uppers``.
    """
    sums = ()
    for k in gl.static_range(COUNT):
        mine = gl.where(upper, uppers[k], lowers[k])
        other = gl.where(upper, lowers[k], uppers[k])
        other = gl.inline_asm_elementwise(
            SWAP_4, "=f,f", [other], dtype=gl.float32, is_pure=False, pack=1
        )
        sums = sums + (mine + other,)
    return sums


@gluon.jit
def put_rows(pointer, values, mask, COUNT: gl.constexpr, W: gl.constexpr):
    """Every thread's COUNT (a power of two) values [W, 8, 4], next to each other."""
    rows: gl.constexpr = gl.BlockedLayout(
        [1, 1, 1, COUNT], [1, 8, 4, 1], [W, 1, 1, 1], [3, 2, 1, 0]
    )
    first: gl.constexpr = gl.SliceLayout(3, rows)
    row = gl.reshape(stack(values, COUNT), (W, 8, 4, COUNT))
    row = gl.convert_layout(row, rows, assert_trivial=True)
    column = gl.arange(
        0, COUNT, layout=gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, rows)))
    )
    column = column[None, :][:, None, :][:, :, None, :]
    at = gl.convert_layout(pointer, first, assert_trivial=True)[:, :, :, None] + column
    mask = gl.convert_layout(mask, first, assert_trivial=True)[:, :, :, None] & (column >= 0)
    gl.store(at, row, mask=mask, eviction_policy="evict_last")


@gluon.jit
def sum_tiles(
    rings, full, g_full, formed, products_empty, out_full, buffers, dpost_ptr, dcomb_ptr,
    dfn_ptr, tokens, part,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """dX and df in place of dX' and du, d fn, and a tile's shares of d post and d comb; the
    equations are those of streams_backward_kernel.
    """
    COUNT: gl.constexpr = (2 + N) * N
    lanes: gl.constexpr = B // 8
    tokens_a_warp: gl.constexpr = 32 // lanes
    # A thread has 8 channels of one token, of all streams.
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [tokens_a_warp, lanes], [num_warps, 1], [1, 0])
    streams3: gl.constexpr = gl.BlockedLayout(
        [1, N, 8], [tokens_a_warp, 1, lanes], [num_warps, 1, 1], [2, 1, 0]
    )
    row32: gl.constexpr = gl.BlockedLayout([1, 32], [tokens_a_warp, lanes], [num_warps, 1], [1, 0])
    token: gl.constexpr = gl.SliceLayout(1, plain)
    tile: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    bf16: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, ROWS, 16])
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [num_warps, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    dot: gl.constexpr = gl.BlockedLayout([1, 1, 1], [1, 8, 4], [num_warps, 1, 1], [2, 1, 0])

    first, window, begin, steps, share, work = part
    xs, fs, number_ring, gs, dus = rings
    products, merged_ring, hi_tile, lo_tile = buffers
    # What a thread has of the dots: those of a token and half, if that token of its warp's four is
    # the number that its lane's last two bits are.
    of_warp = gl.arange(0, T // 4, layout=gl.SliceLayout(1, gl.SliceLayout(2, dot)))
    row = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, dot)))
    column = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(1, dot)))
    of_warp = of_warp[:, None][:, :, None]
    row = row[None, :][:, :, None]
    column = column[None, :][:, None, :]
    half = (row & 1) + 0 * of_warp + 0 * column
    in_tile = 4 * of_warp + row // 2 + 0 * column
    own = row // 2 == column
    sums = gl.zeros((N * B, ROWS), gl.float32, layout=bf16)
    for step in range(steps):
        chunk = (begin + step) // window
        t = (first + (begin + step) % window) * T
        slot = step % 3
        g_slot = step % 2
        mbarrier.wait(full.index(slot), (step // 3) & 1)
        numbers = number_ring.index(slot).slice(ROWS, 32, dim=1).load(row32)
        # post | comb | pre | the coefficient's two parts
        scalars = columns(numbers, N * N + 2 * N + 2, 32, T, token)
        coefficient = scalars[N * N + 2 * N] + scalars[N * N + 2 * N + 1]
        mbarrier.wait(g_full.index(g_slot), (step // 2) & 1)
        du = to_float(dus.index(g_slot).load(plain))
        arriving = separate(gs.index(g_slot).load(streams3), N, T, B, plain)
        mbarrier.wait(formed.index(0), step & 1)
        merged = merged_ring.index(g_slot)._reinterpret(gl.bfloat16, [T, N * B], tile)
        merged_rows = merged.permute((1, 0))
        running = warpgroup_mma(merged_rows, hi_tile, warpgroup_mma_init(sums), is_async=True)
        running = warpgroup_mma(merged_rows, lo_tile, running, is_async=True)
        # The gradient of X'.
        g = ()
        for o in gl.static_range(N):
            total = products.slice(o * B, B, dim=1).load(plain) + to_float(arriving[o])
            total += scalars[N + N * N + o][:, None] * du
            stream = to_float(merged.slice(o * B, B, dim=1).load(plain))
            g = g + (total + coefficient[:, None] * stream,)
        sums = warpgroup_mma_wait(0, deps=(running,))
        gl.thread_barrier()
        arrive(products_empty.index(0))

        df = gl.zeros((T, B), gl.float32, layout=plain)
        for o in gl.static_range(N):
            df += scalars[o][:, None] * g[o]
        # Every thread writes where it read.
        dus.index(g_slot).store(df.to(gl.bfloat16))
        dx = ()
        for i in gl.static_range(N):
            total = gl.zeros((T, B), gl.float32, layout=plain)
            for o in gl.static_range(N):
                total += scalars[N + i * N + o][:, None] * g[o]
            dx = dx + (total.to(gl.bfloat16),)
        dx = gl.permute(gl.reshape(stack(dx, N), (T, B, N)), (0, 2, 1))
        gs.index(g_slot).store(dx)

        lefts = ()
        for k in gl.static_range(N // 2):
            pair = left_operand(g[2 * k].to(gl.bfloat16), g[2 * k + 1].to(gl.bfloat16), T, B, left)
            lefts = lefts + (pair,)
        sources = separate(xs.index(slot).load(streams3), N, T, B, plain)
        sources = sources + (fs.index(slot).load(plain),)
        shares = ()
        for i in gl.static_range(N + 1):
            source = right_operand(sources[i], T, B, right)
            for k in gl.static_range(N // 2):
                shares = shares + dots(lefts[k], source, half != 0, T, mma, dot)
        # Then a lane has two rows of a token's d comb and d post of two streams; another the rest.
        lowers = shares[: 2 * N] + shares[N * N : N * N + 2]
        uppers = shares[2 * N : N * N] + shares[N * N + 2 :]
        shares = fold(lowers, uppers, 2 * N + 2, half != 0)
        # This gives back X and f too, whose dots have been exchanged: no load of them is under way.
        # A barrier alone waits for loads to be issued, and a bulk copy into their memory can be
        # faster.
        fence_async_shared()
        gl.thread_barrier()
        arrive(out_full.index(g_slot))
        rows = t + in_tile
        token_share = chunk.to(gl.int64) * tokens + rows
        valid = own & (rows < tokens)
        at = dcomb_ptr + (token_share * N + 2 * half) * N
        put_rows(at, shares[: 2 * N], valid, 2 * N, num_warps)
        put_rows(dpost_ptr + token_share * N + 2 * half, shares[2 * N :], valid, 2, num_warps)

        if ((begin + step + 1) % window == 0) | (step == steps - 1):
            fn_at, inside = places_of_fn(chunk * B, N, C, B, ROWS, bf16)
            piece = share + (begin + step) // work - chunk * window // work
            gl.store(dfn_ptr + piece.to(gl.int64) * (COUNT * N * C) + fn_at, sums, mask=inside)
            sums = gl.zeros((N * B, ROWS), gl.float32, layout=bf16)
