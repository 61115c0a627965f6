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

# Launches in the same memory have marks 1 and 0 in turn. int32 words there, a line of L2 each:
# tickets taken, and from bit MARKED on 1 less the mark; chunks of tiles drawn after every group's
# first, with mark 0 and with 1. From MAIL on the mail of all groups, where these chunks are
# announced, likewise.
TICKET, DRAWN, MAIL = gl.constexpr(0), gl.constexpr(32), gl.constexpr(96)
MARKED = gl.constexpr(30)
TILE_NUMBERS = gl.constexpr(8)  # a block's tiles in work, at least RX + 1

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
# Two neighbours at once. What all blocks of a group poll stays in L2 until they have.
PUT = gl.constexpr("st.relaxed.gpu.global.v2.u32 [$2], {$4, $5}; mov.u32 $0, 0; mov.u32 $1, 0;")
PUT_FOR_ALL = gl.constexpr("""{
.reg .b64 policy;
createpolicy.fractional.L2::evict_last.b64 policy, 1.0;
st.relaxed.gpu.global.L2::cache_hint.v2.u32 [$2], {$4, $5}, policy;
mov.u32 $0, 0;
mov.u32 $1, 0;
}""")


@gluon.jit
def count_up(pointer):
    """One more; how many there were."""
    return gl.atomic_add(pointer, 1, sem="relaxed", scope="gpu")


@gluon.jit
def take_ticket(counts_ptr):
    """The block's number, in the order in which blocks start, and the launch's mark. The last one
    readies the counts for the next launch, which has the other mark.
    """
    word = count_up(counts_ptr + TICKET)
    mark = 1 - (word >> MARKED)
    ticket = word & ((1 << MARKED) - 1)
    if ticket == gl.num_programs(0) - 1:
        gl.store(counts_ptr + TICKET, mark << MARKED)
        gl.store(counts_ptr + DRAWN + (1 - mark) * LINE // 4, 0)
    return ticket, mark


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
def draw(counts_ptr, mail_ptr, mark, j, groups):
    """Draws the next chunk of tiles as the group's chunk j, and tells the group; its number."""
    chunk = groups + count_up(counts_ptr + DRAWN + mark * LINE // 4)
    gl.inline_asm_elementwise(
        PUBLISH, "=r,l,r,~{memory}", [(mail_ptr + j).to(gl.int64), chunk + 1],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip
    return chunk


@gluon.jit
def receive(mail_ptr, j):
    """Number of the group's chunk j. Mail that is not there is 0."""
    return wait_for(mail_ptr + j, 1) - 1


@gluon.jit
def empty_mail(mail_ptr, mails, rank, G: gl.constexpr):
    """For the next launch, this block's part. By one warp."""
    lane = gl.arange(0, 32, layout=gl.BlockedLayout([1], [32], [1], [0]))
    for first in range(rank * 32, mails, G * 32):
        gl.store(mail_ptr + first + lane, 0 * lane, mask=first + lane < mails)


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
def put(pointer, value, mark, INSTRUCTION: gl.constexpr):
    """Stores float32 values, of which a thread has pairs of neighbours, for polls of other blocks,
    in place of their last bits the launch's mark. The launch before it left the other mark there:
    word ^ mark is the value, or odd if it has not been stored yet.
    """
    word = (value.to(gl.int32, bitcast=True) & -2) | mark
    gl.inline_asm_elementwise(
        INSTRUCTION, "=r,=r,l,l,r,r,~{memory}", [pointer.to(gl.int64), word],
        dtype=gl.int32, is_pure=False, pack=2,
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
