"""The two warps of post_pre_hopper_kernel that turn products with fn into mappings."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from .hopper_parts import arrive
from .post_pre_hopper_groups import TILE_NUMBERS, empty_mail, read_tile, write_tile

# A block's share of a tile has QUICK rows, four products and the squares, for which every block
# waits, and elsewhere the rest: the products from row FIRST of fn on.
QUICK, FIRST = gl.constexpr(5), gl.constexpr(4)


@gluon.jit
def poll_quick(quick_ptr, mark, T: gl.constexpr, G: gl.constexpr, LAYOUT: gl.constexpr):
    """Sums of the group's quick shares [G, QUICK, T] in a fixed order, of the products for pre
    [4, T], and of the squares [T]; and whether some are not there yet.

    Eight blocks' at a time, each number by one thread, all asked for before any is used.
    """
    PART: gl.constexpr = 128 // T
    flat: gl.constexpr = gl.BlockedLayout([1, 4], [PART, T // 4], [1, 1], [1, 0])
    two: gl.constexpr = gl.SliceLayout(0, LAYOUT)
    part = gl.arange(0, PART, layout=gl.SliceLayout(1, gl.SliceLayout(2, LAYOUT)))
    part = part[:, None][:, :, None]
    row = gl.arange(0, 4, layout=gl.SliceLayout(0, gl.SliceLayout(2, LAYOUT)))
    row = row[None, :][:, :, None]
    t = gl.arange(0, T, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))
    t = t[None, :][:, None, :]
    flat_part = gl.arange(0, PART, layout=gl.SliceLayout(1, flat))[:, None]
    flat_t = gl.arange(0, T, layout=gl.SliceLayout(0, flat))[None, :]
    product = gl.zeros((PART, 4, T), gl.float32, layout=LAYOUT)
    square = gl.zeros((PART, T), gl.float32, layout=flat)
    late_product = gl.zeros((PART, 4, T), gl.int32, layout=LAYOUT)
    late_square = gl.zeros((PART, T), gl.int32, layout=flat)
    product_at = quick_ptr + part * (QUICK * T) + row * T + t
    square_at = quick_ptr + flat_part * (QUICK * T) + 4 * T + flat_t
    for first in gl.static_range(0, G, PART):
        step = first * (QUICK * T)
        if first + PART <= G:
            products = gl.load(product_at + step, volatile=True)
            squares = gl.load(square_at + step, volatile=True)
        else:
            inside = first + part + 0 * row + 0 * t < G
            flat_inside = first + flat_part + 0 * flat_t < G
            products = gl.load(product_at + step, mask=inside, other=mark, volatile=True)
            squares = gl.load(square_at + step, mask=flat_inside, other=mark, volatile=True)
        products = products ^ mark
        squares = squares ^ mark
        late_product = late_product | products
        late_square = late_square | squares
        product += products.to(gl.float32, bitcast=True)
        square += squares.to(gl.float32, bitcast=True)
    late = gl.maximum(
        gl.max(gl.reshape(late_product & 1, (PART * 4 * T,)), 0),
        gl.max(gl.reshape(late_square & 1, (PART * T,)), 0),
    )
    squares = gl.convert_layout(gl.sum(square, 0), gl.SliceLayout(0, two), assert_trivial=True)
    return gl.sum(product, 0), squares, late != 0


@gluon.jit
def poll_rows(
    rows_ptr, first, mark, PART: gl.constexpr, COUNT: gl.constexpr, ROWS: gl.constexpr,
    T: gl.constexpr, G: gl.constexpr, LAYOUT: gl.constexpr,
):  # fmt: skip
    """What PART blocks, from ``first`` on, put into COUNT of their ROWS rows of T numbers: sums
    [COUNT, T], and whether some are not there yet.
    """
    two: gl.constexpr = gl.SliceLayout(2, LAYOUT)
    g = gl.arange(0, PART, layout=gl.SliceLayout(1, two))[:, None][:, :, None]
    row = gl.arange(0, COUNT, layout=gl.SliceLayout(0, two))[None, :][:, :, None]
    t = gl.arange(0, T, layout=gl.SliceLayout(0, gl.SliceLayout(1, LAYOUT)))[None, :][:, None, :]
    in_rows = row * T + t
    inside = first + g + 0 * in_rows < G
    at = rows_ptr + (first + g) * (ROWS * T) + in_rows
    words = gl.load(at, mask=inside, other=mark, volatile=True) ^ mark
    late = gl.max(gl.reshape(words & 1, (PART * COUNT * T,)), 0)
    return gl.sum(words.to(gl.float32, bitcast=True), 0), late != 0


@gluon.jit
def sum_rest(rest_ptr, mark, N: gl.constexpr, T: gl.constexpr, G: gl.constexpr):
    """Sums of the group's other shares [G, N + N * N, T] in a fixed order, of the products for post
    [N, T] and for comb [N * N, T], once all are there.
    """
    ROWS: gl.constexpr = N + N * N
    PART: gl.constexpr = 4
    posts: gl.constexpr = gl.BlockedLayout(
        [PART // 2, 1, 4], [2, 64 // T, T // 4], [1, 1, 1], [2, 1, 0]
    )
    combs: gl.constexpr = gl.BlockedLayout(
        [PART, 1, 4], [1, 128 // T, T // 4], [1, 1, 1], [2, 1, 0]
    )
    post = gl.zeros((N, T), gl.float32, layout=gl.SliceLayout(0, posts))
    comb = gl.zeros((N * N, T), gl.float32, layout=gl.SliceLayout(0, combs))
    for first in range(0, G, PART):
        part_of_post, part_of_comb = post, comb
        missing = gl.to_tensor(True)
        while missing:
            part_of_post, no_post = poll_rows(rest_ptr, first, mark, PART, N, ROWS, T, G, posts)
            part_of_comb, no_comb = poll_rows(
                rest_ptr + N * T, first, mark, PART, N * N, ROWS, T, G, combs
            )
            missing = no_post | no_comb
        post += part_of_post
        comb += part_of_comb
    return post, comb


@gluon.jit
def form_pre(
    pre_ring, pre_full, published, queue, queue_full, queue_empty, numbers,
    quick_ptr, mark, scale_ptr, base_ptr, pre_ptr, m_ptr, r_ptr,
    tokens, tiles, rank, eps, norm_eps,
    N: gl.constexpr, C: gl.constexpr, T: gl.constexpr, RX: gl.constexpr, G: gl.constexpr,
    COUNT: gl.constexpr,
):  # fmt: skip
    """pre of every tile of the group, as soon as all quick shares are there. The rest of a tile's
    mappings is for one block, in turn.
    """
    layout: gl.constexpr = gl.BlockedLayout(
        [16 // T, 1, 4], [32 // T, 4, T // 4], [1, 1, 1], [2, 1, 0]
    )
    two: gl.constexpr = gl.SliceLayout(0, layout)
    scale = gl.load(scale_ptr)
    row = gl.arange(0, 4, layout=gl.SliceLayout(1, two))
    base = gl.load(base_ptr + row)
    in_tile = gl.arange(0, T, layout=gl.SliceLayout(0, two))
    queue_tile, queue_r = queue
    queued = gl.to_tensor(0)
    turn = gl.to_tensor(0)
    k = gl.to_tensor(0)
    mbarrier.wait(published.index(0), 0)
    tile = read_tile(numbers, 0, 1)
    while tile < tiles:
        slot = k % RX
        tile_ptr = quick_ptr + tile.to(gl.int64) * (G * QUICK * T)
        product = gl.zeros((4, T), gl.float32, layout=two)
        square = gl.zeros((T,), gl.float32, layout=gl.SliceLayout(0, two))
        missing = gl.to_tensor(True)
        while missing:
            product, square, missing = poll_quick(tile_ptr, mark, T, G, layout)
        r = gl.rsqrt(square / (N * C) + norm_eps)
        m = r[None, :] * product
        pre = 1 / (1 + gl.exp(-(m * scale + base[:, None]))) + eps
        pre_ring.index(slot).store(pre)
        gl.thread_barrier()
        arrive(pre_full.index(slot))
        if turn == rank:
            rows = tile.to(gl.int64) * T + in_tile
            valid = (row < N)[:, None] & (rows < tokens)[None, :]
            gl.store(pre_ptr + rows[None, :] * N + row[:, None], pre, mask=valid)
            gl.store(m_ptr + rows[None, :] * COUNT + row[:, None], m, mask=valid)
            gl.store(r_ptr + rows, r, mask=rows < tokens)
            if COUNT > N:
                mbarrier.wait(queue_empty.index(queued % 2), ((queued // 2) & 1) ^ 1)
                queue_r.index(queued % 2).store(r)
                write_tile(queue_tile, queued % 2, tile)
                gl.thread_barrier()
                arrive(queue_full.index(queued % 2))
                queued += 1
        turn = gl.where(turn == G - 1, 0, turn + 1)
        k += 1
        mbarrier.wait(published.index(k % RX), (k // RX) & 1)
        tile = read_tile(numbers, k % TILE_NUMBERS, 1)
    arrive(pre_full.index(k % RX))
    if COUNT > N:
        mbarrier.wait(queue_empty.index(queued % 2), ((queued // 2) & 1) ^ 1)
        write_tile(queue_tile, queued % 2, tiles)
        gl.thread_barrier()
        arrive(queue_full.index(queued % 2))


@gluon.jit
def reciprocal(value):
    """1 / value to one unit in the last place: a launch ends with a tile's Sinkhorn, and a division
    takes six instructions.
    """
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [value], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def sinkhorn(logits, eps, ITERATIONS: gl.constexpr):
    """sinkhorn_forward in Gluon, which does not take Triton's functions."""
    matrix = gl.exp(logits - gl.max(logits, 2)[:, :, None])
    matrix = matrix * reciprocal(gl.sum(matrix, 2))[:, :, None] + eps
    matrix = matrix * reciprocal(gl.sum(matrix, 1) + eps)[:, None, :]
    for _ in range(ITERATIONS - 1):
        matrix = matrix * reciprocal(gl.sum(matrix, 2) + eps)[:, :, None]
        matrix = matrix * reciprocal(gl.sum(matrix, 1) + eps)[:, None, :]
    return matrix


@gluon.jit
def form_mappings(
    queue, queue_full, queue_empty, rest_ptr, mark, next_mail_ptr, mails, rank, scale_ptr, base_ptr,
    m_ptr, post_ptr, comb_ptr,
    tokens, tiles, eps,
    N: gl.constexpr, T: gl.constexpr, G: gl.constexpr, COUNT: gl.constexpr,
    ITERATIONS: gl.constexpr,
):  # fmt: skip
    """post and comb of the tiles whose mappings are this block's to do."""
    empty_mail(next_mail_ptr, mails, rank, G)
    if COUNT > N:  # the head has none
        # A token is two threads': of the sums of an iteration, half of one kind crosses them.
        square: gl.constexpr = gl.BlockedLayout([1, 2, 4], [16, 2, 1], [1, 1, 1], [2, 1, 0])
        flat: gl.constexpr = gl.SliceLayout(2, square)
        vector: gl.constexpr = gl.SliceLayout(1, flat)
        queue_tile, queue_r = queue
        in_tile = gl.arange(0, T, layout=vector)
        i = gl.arange(0, N, layout=gl.SliceLayout(0, flat))
        j = gl.arange(0, N, layout=gl.SliceLayout(0, gl.SliceLayout(1, square)))
        ij = i[None, :][:, :, None] * N + j[None, :][:, None, :]
        k = gl.to_tensor(0)
        mbarrier.wait(queue_full.index(0), 0)
        tile = read_tile(queue_tile, 0, 1)
        while tile < tiles:
            slot = k % 2
            r = queue_r.index(slot).load(vector)
            gl.thread_barrier()
            arrive(queue_empty.index(slot))
            tile_ptr = rest_ptr + tile.to(gl.int64) * (G * (N + N * N) * T)
            post, comb = sum_rest(tile_ptr, mark, N, T, G)
            post = gl.convert_layout(gl.permute(post, (1, 0)), flat)
            comb = gl.convert_layout(gl.reshape(gl.permute(comb, (1, 0)), (T, N, N)), square)
            post = r[:, None] * post
            comb = r[:, None][:, :, None] * comb
            rows = tile.to(gl.int64) * T + in_tile
            valid = (rows < tokens)[:, None]
            wide = valid[:, :, None] & (ij >= 0)
            valid = valid & (i >= 0)[None, :]
            gl.store(m_ptr + rows[:, None] * COUNT + (N + i)[None, :], post, mask=valid)
            gl.store(m_ptr + rows[:, None][:, :, None] * COUNT + 2 * N + ij, comb, mask=wide)
            # Scales and bases for every tile anew: the warp's registers do not keep them.
            post = post * gl.load(scale_ptr + 1) + gl.load(base_ptr + N + i)[None, :]
            post = 2 * (1 / (1 + gl.exp(-post)))
            gl.store(post_ptr + rows[:, None] * N + i[None, :], post, mask=valid)
            comb = comb * gl.load(scale_ptr + 2) + gl.load(base_ptr + 2 * N + ij)
            comb = sinkhorn(comb, eps, ITERATIONS)
            gl.store(comb_ptr + rows[:, None][:, :, None] * (N * N) + ij, comb, mask=wide)
            k += 1
            mbarrier.wait(queue_full.index(k % 2), (k // 2) & 1)
            tile = read_tile(queue_tile, k % 2, 1)
