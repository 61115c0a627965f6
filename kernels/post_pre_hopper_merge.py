"""The merging warps of post_pre_hopper_kernel: X', and its products with fn, held in registers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    mma_v2,
    tma,
)

from .hopper_parts import arrive, columns, separate, stack, to_float
from .post_pre_hopper_groups import TILE_NUMBERS, read_tile

PART = gl.constexpr(8)  # tokens of a tile that are merged at a time


@gluon.jit
def weights_of(
    fn_ptr, rank, ROW: gl.constexpr, STREAM: gl.constexpr, N: gl.constexpr, C: gl.constexpr,
    B: gl.constexpr, COUNT: gl.constexpr, LAYOUT: gl.constexpr, OPERAND: gl.constexpr,
    W: gl.constexpr,
):  # fmt: skip
    """fn's rows ROW to ROW + 7 as operand [W, 8 bf16 hi | 8 lo, 2 streams x channels of a warp]."""
    WIDE: gl.constexpr = B // W
    w = gl.arange(0, W, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))[:, None][:, :, None]
    row = gl.arange(0, 8, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))[None, :][:, :, None]
    k = gl.arange(0, 2 * WIDE, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    k = k[None, :][:, None, :]
    channel = rank * B + w * WIDE + k % WIDE
    at = (ROW + row) * (N * C) + (STREAM + k // WIDE) * C + channel
    inside = (ROW + row < COUNT) & (channel < C)
    weight = gl.load(fn_ptr + at, mask=inside, other=0.0)
    hi = weight.to(gl.bfloat16)
    lo = (weight - hi.to(gl.float32)).to(gl.bfloat16)
    both = gl.permute(gl.join(hi, lo), (0, 3, 1, 2))
    return gl.convert_layout(gl.reshape(both, (W, 16, 2 * WIDE)), OPERAND, assert_trivial=True)


@gluon.jit
def operand_of(
    first, second, T: gl.constexpr, B: gl.constexpr, OPERAND: gl.constexpr, W: gl.constexpr
):  # fmt: skip
    """Two streams [T, B] as operand [W, 2 streams x channels of a warp, T]."""
    WIDE: gl.constexpr = B // W
    both = gl.reshape(gl.join(first, second), (T, W, WIDE, 2))
    both = gl.permute(both, (1, 3, 2, 0))
    return gl.convert_layout(gl.reshape(both, (W, 2 * WIDE, T)), OPERAND, assert_trivial=True)


@gluon.jit
def merge_tiles(
    x_next, rings, sums, square_sums, full, empty, f_empty, sums_full, sums_empty, numbers, fn_ptr,
    tiles, rank,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, W: gl.constexpr,
    RX: gl.constexpr, RF: gl.constexpr, RS: gl.constexpr, COUNT: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The merging warps. Each multiplies its own 32 channels with fn, by the matrix units
    (mma.sync): a thread's 8 channels of a token are its elements of an operand as they stand.
    PART tokens at a time: beside fn the registers do not hold more.
    """
    GROUPS: gl.constexpr = (COUNT + 7) // 8
    PAIRS: gl.constexpr = N // 2
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [1, W], [1, 0])
    streams3: gl.constexpr = gl.BlockedLayout([1, N, 8], [8, 1, 4], [1, 1, W], [2, 1, 0])
    row16: gl.constexpr = gl.BlockedLayout([1, 16], [8, 4], [1, W], [1, 0])
    row4: gl.constexpr = gl.BlockedLayout([1, 4], [8, 4], [1, W], [1, 0])
    token: gl.constexpr = gl.SliceLayout(1, plain)
    mma: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [W, 1, 1], [1, 16, 8])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 8)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    weight_layout: gl.constexpr = gl.DistributedLinearLayout(
        [[0, 0, 1], [0, 0, 2], [0, 0, 4], [0, 0, 32]],
        [[0, 0, 8], [0, 0, 16], [0, 1, 0], [0, 2, 0], [0, 4, 0]],
        [[1, 0, 0], [2, 0, 0], [4, 0, 0]],
        [],
        [8, 8, 64],
    )
    xs, fs, posts, combs = rings
    weights = ()
    for g in gl.static_range(GROUPS):
        for p in gl.static_range(PAIRS):
            weights = weights + (
                weights_of(fn_ptr, rank, g * 8, p * 2, N, C, B, COUNT, weight_layout, left, W),
            )

    k = gl.to_tensor(0)
    mbarrier.wait(full.index(0), 0)
    tile = read_tile(numbers, 0, W)
    while tile < tiles:
        slot = k % RX
        sums_slot = k % RS
        for first in gl.static_range(0, T, PART):
            x = xs.index(slot).slice(first, PART, 0)
            streams = separate(x.load(streams3), N, PART, B, plain)
            floats = ()
            for i in gl.static_range(N):
                floats = floats + (to_float(streams[i]),)
            squares = gl.zeros((PART, B), gl.float32, layout=plain)
            if MERGE:
                f_slot = k % RF
                comb = combs.index(f_slot).slice(first, PART, 0).load(row16)
                comb = columns(comb, N * N, N * N, PART, token)
                post = posts.index(f_slot).slice(first, PART, 0).load(row4)
                post = columns(post, N, N, PART, token)
                f = to_float(fs.index(f_slot).slice(first, PART, 0).load(plain))
                merged = ()
                for o in gl.static_range(N):
                    # Fused as in accumulate.py: the replay has the same bits.
                    stream = post[o][:, None] * f
                    for i in gl.static_range(N):
                        weight, _ = gl.broadcast(comb[i * N + o][:, None], stream)
                        stream = gl.fma(weight, floats[i], stream)
                    squares = gl.fma(stream, stream, squares)
                    merged = merged + (stream.to(gl.bfloat16),)
                # Every thread writes where it read.
                x.store(gl.permute(gl.reshape(stack(merged, N), (PART, B, N)), (0, 2, 1)))
            else:
                merged = streams
                for o in gl.static_range(N):
                    squares = gl.fma(floats[o], floats[o], squares)
            operands = ()
            for p in gl.static_range(PAIRS):
                pair = operand_of(merged[2 * p], merged[2 * p + 1], PART, B, right, W)
                operands = operands + (pair,)
            if first == 0:
                mbarrier.wait(sums_empty.index(sums_slot), ((k // RS) & 1) ^ 1)
            for g in gl.static_range(GROUPS):
                product = gl.zeros((W, 16, PART), gl.float32, layout=mma)
                for p in gl.static_range(PAIRS):
                    product = mma_v2(weights[g * PAIRS + p], operands[p], product)
                product = gl.sum(gl.reshape(product, (W, 2, 8, PART)), 1)
                sums[g].index(sums_slot).slice(first, PART, 2).store(product)
            square = gl.sum(gl.reshape(squares, (PART, W, B // W)), 2)
            square = gl.permute(square, (1, 0))
            square_sums.index(sums_slot).slice(first, PART, 1).store(square)
        if MERGE:
            fence_async_shared()
            tma.store_wait(0)
        gl.thread_barrier()
        arrive(sums_full.index(sums_slot))
        if MERGE:
            tma.async_copy_shared_to_global(x_next, [tile * T, 0, rank * B], xs.index(slot))
            # Its loads are over: X' needed them.
            arrive(f_empty.index(k % RF))
            # The copy before this one has read its X'.
            mbarrier.expect(empty.index((k + RX - 1) % RX), 0, pred=k > 0)
        k += 1
        mbarrier.wait(full.index(k % RX), (k // RX) & 1)
        tile = read_tile(numbers, k % TILE_NUMBERS, W)
    sums_slot = k % RS
    mbarrier.wait(sums_empty.index(sums_slot), ((k // RS) & 1) ^ 1)
    if MERGE:
        tma.store_wait(0)
    gl.thread_barrier()
    arrive(sums_full.index(sums_slot))
