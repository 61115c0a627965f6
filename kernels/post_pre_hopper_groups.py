"""How blocks of post_pre_hopper_kernel form groups, draw tiles, and wait for each other.

A block's number is the ticket it takes when it starts, so the blocks of group g, with tickets g G
to g G + G - 1, are all running once the last of them is. Only that one draws tiles for the group:
no tile waits for a block that may not be running, wherever the hardware puts blocks and whatever
else holds multiprocessors, as long as G of them become free.

Waits between blocks have no limit, as those at barriers within a block have none. A limit would end
in wrong results, or in a trap that takes the process's CUDA context along, perhaps because somebody
stopped the GPU in a debugger for longer than we foresaw.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# What a launch finds in every word of its state: a count of none, mail that is not there, and as
# float32 a NaN that no arithmetic makes.
UNSET = gl.constexpr(-1)
# int32 words, a line of L2 each: tickets taken, chunks of tiles drawn. From MAIL on the groups'
# mail, where their chunks are announced.
TICKET, DRAWN, MAIL = gl.constexpr(0), gl.constexpr(32), gl.constexpr(64)
TILE_NUMBERS = gl.constexpr(32)  # a block's tiles in work, at least RX

# Until *$1 >= $2: its value.
WAIT = gl.constexpr("""{
.reg .pred reached;
again:
ld.acquire.gpu.global.s32 $0, [$1];
setp.ge.s32 reached, $0, $2;
@!reached bra again;
}""")
PUBLISH = gl.constexpr("st.release.gpu.global.u32 [$1], $2; mov.u32 $0, $2;")
PUT = gl.constexpr("st.relaxed.gpu.global.f32 [$1], $2; mov.u32 $0, 0;")


@gluon.jit
def count_up(pointer, SEM: gl.constexpr):
    """One more; how many there were."""
    return gl.atomic_add(pointer, 1, sem=SEM, scope="gpu") - UNSET


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
def draw(state_ptr, mail_ptr, j):
    """Draws the next chunk of tiles as the group's chunk j, and tells the group; its number."""
    chunk = count_up(state_ptr + DRAWN, "relaxed")
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
