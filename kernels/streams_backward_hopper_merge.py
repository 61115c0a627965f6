"""The merging warps of streams_backward_hopper_kernel: X', and its products."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)

from .hopper_parts import arrive, columns, places_of_fn, separate, stack, to_float

ROWS = gl.constexpr(32)  # of dz, and columns before post, comb and pre in a token's numbers


@gluon.jit
def merge_tiles(
    rings, full, formed, products_empty, buffers, fn_ptr, part,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """X', dz @ fn and dz as bf16 hi + lo of every tile, for the warps that sum.

    Their tiles are of one block of channels, or the last of one and the first of the next.
    """
    lanes: gl.constexpr = B // 8
    tokens_a_warp: gl.constexpr = 32 // lanes
    # A thread has 8 channels of a token, of all streams.
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [tokens_a_warp, lanes], [num_warps, 1], [1, 0])
    streams3: gl.constexpr = gl.BlockedLayout(
        [1, N, 8], [tokens_a_warp, 1, lanes], [num_warps, 1, 1], [2, 1, 0]
    )
    row32: gl.constexpr = gl.BlockedLayout([1, 32], [tokens_a_warp, lanes], [num_warps, 1], [1, 0])
    token: gl.constexpr = gl.SliceLayout(1, plain)
    tf32: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, T, 8])
    weight_load: gl.constexpr = gl.BlockedLayout([1, 4], [32, 1], [num_warps, 1], [0, 1])
    split: gl.constexpr = gl.BlockedLayout([1, 8], [8, 4], [num_warps, 1], [1, 0])

    xs, fs, number_ring = rings
    weight, products, merged_ring, hi_tile, lo_tile = buffers
    zero = gl.zeros((N * B, T), gl.float32, layout=tf32)
    _, window, begin, steps, _, _ = part
    done = gl.to_tensor(0)
    while done < steps:
        chunk = (begin + done) // window
        until = gl.minimum((chunk + 1) * window - begin, steps)
        # The block's slice of fn, the first operand of dz @ fn: rows (stream, channel), columns k.
        # No product of the block of channels before is under way.
        at, inside = places_of_fn(chunk * B, N, C, B, ROWS, weight_load)
        weight.store(gl.load(fn_ptr + at, mask=inside, other=0.0))
        fence_async_shared()
        gl.thread_barrier()

        for step in range(done, until):
            slot = step % 3
            mbarrier.wait(full.index(slot), (step // 3) & 1)
            numbers = number_ring.index(slot)
            dz = numbers.slice(0, ROWS, dim=1)
            scalars = numbers.slice(ROWS, 32, dim=1).load(row32)
            scalars = columns(scalars, N + N * N, 32, T, token)  # post | comb
            f = to_float(fs.index(slot).load(plain))
            streams = separate(to_float(xs.index(slot).load(streams3)), N, T, B, plain)
            merged = ()
            for o in gl.static_range(N):
                stream = scalars[o][:, None] * f
                for i in gl.static_range(N):
                    stream += scalars[N + i * N + o][:, None] * streams[i]
                merged = merged + (stream.to(gl.bfloat16),)
            merged = gl.permute(gl.reshape(stack(merged, N), (T, B, N)), (2, 0, 1))
            merged_ring.index(step % 2).store(merged)
            # Waited for at once: beside a product under way the compiler gives a thread no more
            # registers than it begins with.
            product = warpgroup_mma(
                weight, dz.permute((1, 0)), warpgroup_mma_init(zero), use_acc=False, is_async=True
            )
            product = warpgroup_mma_wait(0, deps=(product,))
            whole = dz.load(split)
            hi = whole.to(gl.bfloat16)
            lo = (whole - to_float(hi)).to(gl.bfloat16)
            # The warps that sum have read the last tile's, and multiplied with its hi and lo.
            mbarrier.wait(products_empty.index(0), (step & 1) ^ 1)
            products.permute((1, 0)).store(product)
            hi_tile.store(hi)
            lo_tile.store(lo)
            fence_async_shared()
            gl.thread_barrier()
            arrive(formed.index(0))
        done = until
