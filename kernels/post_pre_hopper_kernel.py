"""Merge, mapping products, mappings and aggregation on Hopper in one pass over X, in Gluon.

G blocks form a group (post_pre_hopper_groups.py). Each owns B channels of all four streams, with
its slice of fn in registers, and a group works through tiles of T tokens together: every block
merges its channels, keeps X' in shared memory, and leaves its share of the tile's 24 products and
squares in L2. When the shares of all G are there, each block sums them, forms pre, and aggregates
the X' that it kept, while its other warps are tiles ahead. bfloat16 streams, n = 4.

Warps: 8 merge and multiply (post_pre_hopper_merge.py); 4 aggregate; one each stores shares, loads,
forms pre, and forms post and comb (post_pre_hopper_mappings.py). What goes from one to the
next lies in rings: X, in whose place comes X', and pre RX tiles deep, f RF, sums of the merging
warps RS.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
)

from .hopper_parts import arrive, columns, make_barriers, separate, to_float
from .post_pre_hopper_groups import (
    MAIL,
    PUT,
    PUT_FOR_ALL,
    TILE_NUMBERS,
    ask_for_part,
    ask_for_rows,
    ask_for_share,
    draw,
    first_tile,
    put,
    read_tile,
    receive,
    take_ticket,
    write_tile,
)
from .post_pre_hopper_mappings import FIRST, QUICK, form_mappings, form_pre
from .post_pre_hopper_merge import merge_tiles

NUM_WARPS = 8
TILE = gl.NVMMASharedLayout(128, 16, rank=2)
STREAMS_TILE = gl.NVMMASharedLayout(128, 16, rank=3)
POST_TILE = gl.NVMMASharedLayout(0, 32, rank=2)
COMB_TILE = gl.NVMMASharedLayout(64, 32, rank=2)


@gluon.jit
def load_tiles(
    sources, rings, full, empty, f_empty, numbers, x_ptr, f_ptr, counts_ptr, mail_ptr, mark, tokens,
    tiles, length, long_ones, group, rank,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, RX: gl.constexpr,
    RF: gl.constexpr, G: gl.constexpr, MERGE: gl.constexpr,
):  # fmt: skip
    """The loading warp: the group's first chunk of tiles, then others, which the group's last block
    draws one ahead.

    While a tile is loaded the blocks ask L2 for the next one, each for a part of it in one piece:
    memory reads whole rows of X together. What is asked for earlier, L2 does not always keep.
    """
    x, f, post, comb = sources
    xs, fs, posts, combs = rings
    BYTES: gl.constexpr = N * T * B * 2 + (T * B * 2 + T * (N + N * N) * 4 if MERGE else 0)
    groups = gl.num_programs(0) // G
    channel = rank * B
    drawing = rank == G - 1
    end_of_f = tokens.to(gl.int64) * (2 * C)
    j = gl.to_tensor(0)
    k = gl.to_tensor(0)
    tile = first_tile(group, length, long_ones)
    end = first_tile(group + 1, length, long_ones)
    begins = gl.to_tensor(True)
    while tile < tiles:
        slot = k % RX
        mbarrier.wait(empty.index(slot), ((k // RX) & 1) ^ 1)
        if k == 1:
            # All blocks' first tiles come before anybody's second: their pre needs them all.
            mbarrier.wait(full.index(0), 0)
        write_tile(numbers, k % TILE_NUMBERS, tile)
        gl.thread_barrier()
        bar = full.index(slot)
        mbarrier.expect(bar, BYTES)
        t = tile * T
        tma.async_copy_global_to_shared(x, [t, 0, channel], bar, xs.index(slot))
        if MERGE:
            f_slot = k % RF
            mbarrier.wait(f_empty.index(f_slot), ((k // RF) & 1) ^ 1)
            tma.async_copy_global_to_shared(f, [t, channel], bar, fs.index(f_slot))
            tma.async_copy_global_to_shared(comb, [t, 0], bar, combs.index(f_slot))
            tma.async_copy_global_to_shared(post, [t, 0], bar, posts.index(f_slot))
        if drawing & begins:
            number = draw(counts_ptr, mail_ptr, mark, j + 1, groups)
            drawing = first_tile(number, length, long_ones) < tiles
        k += 1
        tile += 1
        begins = tile == end
        if begins:
            j += 1
            number = receive(mail_ptr, j)
            tile = first_tile(number, length, long_ones)
            end = first_tile(number + 1, length, long_ones)
        if tile < tiles:
            ask_for_part(x_ptr, tile, end_of_f * N, rank, T * N * C * 2, G)
            if MERGE:
                ask_for_part(f_ptr, tile, end_of_f, rank, T * C * 2, G)
    slot = k % RX
    mbarrier.wait(empty.index(slot), ((k // RX) & 1) ^ 1)
    write_tile(numbers, k % TILE_NUMBERS, tiles)
    gl.thread_barrier()
    arrive(full.index(slot))


@gluon.jit
def store_shares(
    sums, square_sums, sums_full, sums_empty, published, numbers, quick_ptr, rest_ptr, mark, tiles,
    rank,
    T: gl.constexpr, W: gl.constexpr, RX: gl.constexpr, RS: gl.constexpr, G: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """The storing warp: products and squares of a tile, summed over the merging warps, to quick
    [tiles, G, QUICK, T] and rest [tiles, G, ROWS, T].
    """
    GROUPS: gl.constexpr = (COUNT + 7) // 8
    ROWS: gl.constexpr = 8 * GROUPS - FIRST
    wide: gl.constexpr = gl.BlockedLayout([W, 1, 2], [1, 8, 4], [1, 1, 1], [2, 1, 0])
    flat: gl.constexpr = gl.BlockedLayout([W * T // 64, 2], [64 // T, T // 2], [1, 1], [1, 0])
    row = gl.arange(0, 8, layout=gl.SliceLayout(1, gl.SliceLayout(0, wide)))
    t = gl.arange(0, T, layout=gl.SliceLayout(0, gl.SliceLayout(0, wide)))
    in_share = row[:, None] * T + t[None, :]
    in_squares = 4 * T + gl.arange(0, T, layout=gl.SliceLayout(0, flat))
    quick = (row < FIRST)[:, None] & (t >= 0)[None, :]
    k = gl.to_tensor(0)
    mbarrier.wait(sums_full.index(0), 0)
    tile = read_tile(numbers, 0, 1)
    while tile < tiles:
        slot = k % RS
        block = tile.to(gl.int64) * G + rank
        block_quick_ptr = quick_ptr + block * (QUICK * T)
        block_rest_ptr = rest_ptr + (block * ROWS - FIRST) * T
        for g in gl.static_range(1, GROUPS):
            total = gl.sum(sums[g].index(slot).load(wide), 0)
            put(block_rest_ptr + g * 8 * T + in_share, total, mark, PUT)
        total = gl.sum(sums[0].index(slot).load(wide), 0)
        at = gl.where(quick, block_quick_ptr + in_share, block_rest_ptr + in_share)
        put(at, total, mark, PUT_FOR_ALL)
        square = gl.sum(square_sums.index(slot).load(flat), 0)
        put(block_quick_ptr + in_squares, square, mark, PUT_FOR_ALL)
        gl.thread_barrier()
        arrive(sums_empty.index(slot))
        arrive(published.index(k % RX))
        k += 1
        mbarrier.wait(sums_full.index(k % RS), (k // RS) & 1)
        tile = read_tile(numbers, k % TILE_NUMBERS, 1)
    arrive(published.index(k % RX))


@gluon.jit
def aggregate_tiles(
    xs, pre_ring, pre_full, empty, numbers, u_ptr, tokens, tiles, rank,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, RX: gl.constexpr,
    num_warps: gl.constexpr,
):  # fmt: skip
    """The aggregating warps: u of the X' that was kept, once its pre is there."""
    WARPS_C: gl.constexpr = B // 64
    WARPS_T: gl.constexpr = num_warps // WARPS_C
    plain: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS_T, WARPS_C], [1, 0])
    streams3: gl.constexpr = gl.BlockedLayout(
        [1, N, 8], [4, 1, 8], [WARPS_T, 1, WARPS_C], [2, 1, 0]
    )
    row4: gl.constexpr = gl.BlockedLayout([1, 4], [4, 8], [WARPS_T, WARPS_C], [1, 0])
    token: gl.constexpr = gl.SliceLayout(1, plain)
    channel = rank * B + gl.arange(0, B, layout=gl.SliceLayout(0, plain))
    in_tile = gl.arange(0, T, layout=token)
    inside = (channel < C)[None, :]
    k = gl.to_tensor(0)
    mbarrier.wait(pre_full.index(0), 0)
    tile = read_tile(numbers, 0, num_warps)
    while tile < tiles:
        slot = k % RX
        pre = columns(pre_ring.index(slot).permute((1, 0)).load(row4), N, N, T, token)
        streams = separate(xs.index(slot).load(streams3), N, T, B, plain)
        u = gl.zeros((T, B), gl.float32, layout=plain)
        for o in gl.static_range(N):
            weight, _ = gl.broadcast(pre[o][:, None], u)
            u = gl.fma(weight, to_float(streams[o]), u)  # as in accumulate.py
        rows = tile.to(gl.int64) * T + in_tile
        at = u_ptr + rows[:, None] * C + channel[None, :]
        gl.store(at, u.to(gl.bfloat16), mask=(rows < tokens)[:, None] & inside)
        # After the store, which needs every load of X' to be over: a barrier alone waits for loads
        # to be issued, and a bulk copy into their memory can be faster.
        gl.thread_barrier()
        arrive(empty.index(slot))
        k += 1
        mbarrier.wait(pre_full.index(k % RX), (k // RX) & 1)
        tile = read_tile(numbers, k % TILE_NUMBERS, num_warps)


@gluon.jit(do_not_specialize=["tokens", "mails", "length", "long_ones"])
def post_pre_hopper_kernel(
    x, f, post, comb, x_next, x_ptr, f_ptr, fn_ptr, scale_ptr, base_ptr, u_ptr, pre_ptr, m_ptr,
    r_ptr, post_ptr, comb_ptr, state_ptr, tokens, mails, length, long_ones, eps, norm_eps,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, B: gl.constexpr, RX: gl.constexpr,
    RF: gl.constexpr, RS: gl.constexpr, COUNT: gl.constexpr, ITERATIONS: gl.constexpr,
    MERGE: gl.constexpr, REGISTERS: gl.constexpr, num_warps: gl.constexpr,
):  # fmt: skip
    """What merge_map_kernel and aggregate_kernel compute.

    x, x_next [tokens, N, C], f [tokens, C], post [tokens, N] and comb [tokens, N * N] are tensor
    descriptors; without MERGE all are x. x_ptr and f_ptr: to x and f. fn [COUNT, N * C]; writes
    u [tokens, C], pre [tokens, N], m [tokens, COUNT], r [tokens] and, unless COUNT is N,
    post [tokens, N] and comb [tokens, N, N].

    state: int32 words, 0 or as the launch before left them, which must have had the same tokens, C
    and COUNT: tiles * G * (QUICK + ROWS) * T of shares, see ``store_shares``; MAIL + 2 * groups *
    mails of counts, with ``mails`` one more than there are chunks: ``long_ones`` of ``length``
    tiles, the rest of one. The grid is groups * G blocks. REGISTERS: of a thread of the warps that
    aggregate, store shares, form pre, load, and form mappings.
    """
    G: gl.constexpr = (C + B - 1) // B
    GROUPS: gl.constexpr = (COUNT + 7) // 8
    tile2: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=2)
    tile3: gl.constexpr = gl.NVMMASharedLayout(128, 16, rank=3)
    flat1: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    flat2: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    flat3: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    tiles = gl.cdiv(tokens, T)
    rest_ptr = state_ptr + tiles.to(gl.int64) * (G * QUICK * T)
    counts_ptr = rest_ptr + tiles.to(gl.int64) * (G * (8 * GROUPS - FIRST) * T)
    # The first tile, if blocks start in order: everybody waits for all of it.
    token = first_tile(gl.program_id(0) // G, length, long_ones).to(gl.int64) * T
    channel = gl.program_id(0) % G * B
    end = tokens.to(gl.int64) * (2 * C)
    first = (token * N * C + channel) * 2
    ask_for_rows(x_ptr, first, end * N, 2 * C, T * N, 2 * B, num_warps)
    if MERGE:
        ask_for_rows(f_ptr, (token * C + channel) * 2, end, 2 * C, T, 2 * B, num_warps)
    ticket, mark = take_ticket(counts_ptr)
    ask_for_share(fn_ptr, COUNT * N * C * 4, num_warps)
    group = ticket // G
    rank = ticket % G
    mails_of_all = gl.num_programs(0) // G * mails
    mail_ptr = counts_ptr + MAIL + group * mails
    next_mail_ptr = mail_ptr + (1 - mark) * mails_of_all
    mail_ptr += mark * mails_of_all

    xs = gl.allocate_shared_memory(gl.bfloat16, [RX, T, N, B], tile3)
    if MERGE:
        fs = gl.allocate_shared_memory(gl.bfloat16, [RF, T, B], tile2)
        posts = gl.allocate_shared_memory(gl.float32, [RF, T, N], post.layout)
        combs = gl.allocate_shared_memory(gl.float32, [RF, T, N * N], comb.layout)
        rings = (xs, fs, posts, combs)
        sources = (x, f, post, comb)
    else:
        rings = (xs, xs, xs, xs)
        sources = (x, x, x, x)
    # What shares an allocation the compiler keeps in order, by barriers.
    sums = ()
    for _ in gl.static_range(GROUPS):
        sums = sums + (gl.allocate_shared_memory(gl.float32, [RS, num_warps, 8, T], flat3),)
    square_sums = gl.allocate_shared_memory(gl.float32, [RS, num_warps, T], flat2)
    pre_ring = gl.allocate_shared_memory(gl.float32, [RX, N, T], flat2)
    numbers = gl.allocate_shared_memory(gl.int32, [TILE_NUMBERS, 1], flat1)
    queue_tile = gl.allocate_shared_memory(gl.int32, [2, 1], flat1)
    queue_r = gl.allocate_shared_memory(gl.float32, [2, T], flat1)
    full = make_barriers(RX, 1)
    # X' is given back by the warps that merge, when its copy has read it, and those that aggregate.
    empty = make_barriers(RX, 2 if MERGE else 1)
    sums_full = make_barriers(RS, 1)
    sums_empty = make_barriers(RS, 1)
    published = make_barriers(RX, 1)
    pre_full = make_barriers(RX, 1)
    # None that nobody uses: see make_barriers.
    f_empty = make_barriers(RF, 1) if MERGE else empty
    queue_full = make_barriers(2, 1) if COUNT > N else pre_full
    queue_empty = make_barriers(2, 1) if COUNT > N else pre_full
    fence_async_shared()
    gl.thread_barrier()

    queue = (queue_tile, queue_r)
    # fmt: off
    gl.warp_specialize([
        (merge_tiles, (x_next, rings, sums, square_sums, full, empty, f_empty, sums_full,
                       sums_empty, numbers, fn_ptr, tiles, rank, N, C, T, B, num_warps, RX, RF, RS,
                       COUNT, MERGE)),
        (aggregate_tiles, (xs, pre_ring, pre_full, empty, numbers, u_ptr, tokens, tiles, rank, N, C,
                           T, B, RX, 4)),
        (store_shares, (sums, square_sums, sums_full, sums_empty, published, numbers, state_ptr,
                        rest_ptr, mark, tiles, rank, T, num_warps, RX, RS, G, COUNT)),
        (form_pre, (pre_ring, pre_full, published, queue, queue_full, queue_empty, numbers,
                    state_ptr, mark, scale_ptr, base_ptr, pre_ptr, m_ptr, r_ptr, tokens, tiles,
                    rank, eps, norm_eps, N, C, T, RX, G, COUNT)),
        (load_tiles, (sources, rings, full, empty, f_empty, numbers, x_ptr, f_ptr, counts_ptr,
                      mail_ptr, mark, tokens, tiles, length, long_ones, group, rank, N, C, T, B, RX,
                      RF, G, MERGE)),
        (form_mappings, (queue, queue_full, queue_empty, rest_ptr, mark, next_mail_ptr, mails, rank,
                         scale_ptr, base_ptr, m_ptr, post_ptr, comb_ptr, tokens, tiles, eps, N, T,
                         G, COUNT, ITERATIONS)),
    ], [4, 1, 1, 1, 1], REGISTERS)
    # fmt: on
