"""How blocks of post_pre_hopper_kernel form groups, draw tiles, and wait for each other.

A block's number is the ticket it takes when it starts, so the blocks of group g, with tickets g G
to g G + G - 1, are all running once the last of them is. Chunk g of the tiles is theirs; only that
last block draws others for the group. So at any time at most one group waits for blocks that are
not running yet, while those before it end and leave room: wherever the hardware puts blocks and
whatever else holds multiprocessors, the launch ends as long as G of them become free.

Waits between blocks have no limit, as those at barriers within a block have none. A limit would end
in wrong results, or in a trap that takes the process's CUDA context along, perhaps because somebody
stopped the GPU in a debugger for longer than we foresaw.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# What a launch finds in every word of its state: a count of none, mail that is not there, and as
# float32 a NaN that no arithmetic makes.
UNSET = gl.constexpr(-1)
# int32 words, a line of L2 each: tickets taken, chunks of tiles drawn after every group's first.
# From MAIL on the groups' mail, where these chunks are announced.
TICKET, DRAWN, MAIL = gl.constexpr(0), gl.constexpr(32), gl.constexpr(64)
COUNTED = gl.constexpr(8)  # tiles whose shares a block counts at once
TILE_NUMBERS = gl.constexpr(32)  # a block's tiles in work, at least RX + COUNTED

LINE = gl.constexpr(128)  # bytes of L2

# Until *$1 >= $2: its value.
WAIT = gl.constexpr("""{
.reg .pred reached;
again:
ld.acquire.gpu.global.s32 $0, [$1];
setp.ge.s32 reached, $0, $2;
@!reached bra again;
}""")
PUBLISH = gl.constexpr("st.release.gpu.global.u32 [$1], $2; mov.u32 $0, $2;")
PREFETCH = gl.constexpr("prefetch.global.L2 [$1]; mov.u32 $0, 0;")
PREFETCH_PART = gl.constexpr("""{
.reg .pred one;
elect.sync _|one, 0xffffffff;
@one cp.async.bulk.prefetch.L2.global [$1], $2;
mov.u32 $0, 0;
}""")
FENCE = gl.constexpr("fence.acq_rel.gpu; mov.u32 $0, $1;")
PUT = gl.constexpr("st.relaxed.gpu.global.f32 [$1], $2; mov.u32 $0, 0;")


@gluon.jit
def count_up(pointer):
    """One more; how many there were."""
    return gl.atomic_add(pointer, 1, sem="relaxed", scope="gpu") - UNSET


@gluon.jit
def wait_for(pointer, least):
    """Waits for pointer to be ``least`` or more, and returns it. What was written before that, by
    other blocks too, is seen after.
    """
    return gl.inline_asm_elementwise(
        WAIT, "=&r,l,r,~{memory}", [pointer.to(gl.int64), least],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def draw(state_ptr, mail_ptr, j, groups):
    """Draws the next chunk of tiles as the group's chunk j, and tells the group; its number."""
    chunk = groups + count_up(state_ptr + DRAWN)
    gl.inline_asm_elementwise(
        PUBLISH, "=r,l,r,~{memory}", [(mail_ptr + j).to(gl.int64), chunk],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return chunk


@gluon.jit
def receive(mail_ptr, j):
    """Number of the group's chunk j."""
    return wait_for(mail_ptr + j, 0)


@gluon.jit
def first_tile(number, length, long_ones):
    """First tile of chunk ``number``: ``long_ones`` have ``length`` tiles, those after them one, so
    that groups end together.
    """
    return gl.where(number < long_ones, number * length, long_ones * length + number - long_ones)


@gluon.jit
def ask_for(pointer, at, end):
    """Asks L2 for the lines with bytes ``at`` of what has ``end`` bytes from pointer on."""
    gl.inline_asm_elementwise(
        PREFETCH, "=r,l", [pointer.to(gl.int64) + gl.minimum(at, end - 1)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def ask_for_rows(
    pointer, first, end, stride, ROWS: gl.constexpr, BYTES: gl.constexpr, num_warps: gl.constexpr
):
    """Asks L2 for ``BYTES`` of each of ``ROWS`` rows, from byte ``first`` on, ``stride`` apart."""
    PARTS: gl.constexpr = BYTES // LINE
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    line = gl.arange(0, ROWS * PARTS, layout=layout)
    ask_for(pointer, first + line // PARTS * stride + line % PARTS * LINE, end)


@gluon.jit
def ask_for_share(pointer, BYTES: gl.constexpr, num_warps: gl.constexpr):
    """Asks L2 for ``BYTES`` from pointer on, each block for its share."""
    STEP: gl.constexpr = 32 * num_warps
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    lane = gl.arange(0, STEP, layout=layout)
    for line in range(gl.program_id(0) * STEP, BYTES // LINE, gl.num_programs(0) * STEP):
        ask_for(pointer, (line + lane).to(gl.int64) * LINE, BYTES)


@gluon.jit
def ask_for_part(pointer, tile, end, rank, BYTES: gl.constexpr, G: gl.constexpr):
    """Asks L2 for the block's part, in one piece, of a tile: ``BYTES`` of what has ``end`` bytes
    from pointer on. By one warp.
    """
    PART: gl.constexpr = (BYTES + 16 * G - 1) // (16 * G) * 16
    first = rank * PART
    at = tile.to(gl.int64) * BYTES + first
    size = gl.minimum(gl.minimum(PART, BYTES - first).to(gl.int64), end - at).to(gl.int32)
    if size > 0:
        gl.inline_asm_elementwise(
            PREFETCH_PART, "=r,l,r", [pointer.to(gl.int64) + at, size],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip


@gluon.jit
def count_tiles(ready_ptr, numbers, first, end):
    """One to the counts of the block's tiles ``first`` to ``end``, whose shares this warp stored.
    The fence waits for the stores: under load, as long as a tile takes.
    """
    gl.inline_asm_elementwise(
        FENCE, "=r,r,~{memory}", [gl.to_tensor(0)], dtype=gl.int32, is_pure=False, pack=1
    )
    for k in range(gl.maximum(first, 0), end):
        count_up(ready_ptr + read_tile(numbers, k % TILE_NUMBERS, 1))


@gluon.jit
def put(pointer, value):
    """Stores float32 values for polls of other blocks: any NaN as one that is not UNSET."""
    value = gl.where(value == value, value, float("nan"))
    gl.inline_asm_elementwise(
        PUT, "=r,l,f,~{memory}", [pointer.to(gl.int64), value],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def read_tile(numbers, k, num_warps: gl.constexpr):
    """The block's k-th tile: its number, the number of all tiles if there is none."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [num_warps], [0])
    return gl.max(numbers.index(k).load(layout), 0)


@gluon.jit
def write_tile(numbers, k, tile):
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    numbers.index(k).store(gl.full([1], tile, gl.int32, layout))
