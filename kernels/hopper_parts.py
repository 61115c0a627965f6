"""What the Gluon kernels share: tiles as tuples of tiles and vectors, and barriers."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

# Two bfloat16 in one register: the compiler takes three instructions.
TWO_FLOATS = gl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


@gluon.jit
def to_float(tile):
    """tile, in bfloat16 and pairs of neighbours a thread, in float32."""
    return gl.inline_asm_elementwise(
        TWO_FLOATS, "=f,=f,r", [tile], dtype=gl.float32, is_pure=True, pack=2
    )


@gluon.jit
def columns(tile, COUNT: gl.constexpr, WIDTH: gl.constexpr, T: gl.constexpr, LAYOUT: gl.constexpr):
    """The first COUNT columns of tile [T, WIDTH] as vectors [T]; every thread has whole rows."""
    parts = (tile,)
    for level in gl.static_range(WIDTH.bit_length() - 1):
        halves = ()
        for k in gl.static_range(1 << level):
            pairs = gl.reshape(parts[k], (T, 2, WIDTH >> (level + 1)))
            low, high = gl.split(gl.permute(pairs, (0, 2, 1)))
            halves = halves + (low, high)
        parts = halves
    vectors = ()
    for k in gl.static_range(COUNT):
        vector = gl.reshape(parts[k], (T,))
        vectors = vectors + (gl.convert_layout(vector, LAYOUT, assert_trivial=True),)
    return vectors


@gluon.jit
def separate(tile, N: gl.constexpr, T: gl.constexpr, B: gl.constexpr, LAYOUT: gl.constexpr):
    """tile [T, N, B] as N tiles [T, B]; every thread has all streams of its elements."""
    parts = (gl.permute(tile, (0, 2, 1)),)
    for level in gl.static_range(N.bit_length() - 1):
        halves = ()
        for k in gl.static_range(1 << level):
            pairs = gl.reshape(parts[k], (T, B, 2, N >> (level + 1)))
            low, high = gl.split(gl.permute(pairs, (0, 1, 3, 2)))
            halves = halves + (low, high)
        parts = halves
    tiles = ()
    for k in gl.static_range(N):
        tile = gl.reshape(parts[k], (T, B))
        tiles = tiles + (gl.convert_layout(tile, LAYOUT, assert_trivial=True),)
    return tiles


@gluon.jit
def stack(values, COUNT: gl.constexpr):
    """COUNT (a power of two) equal tensors as one, along new last dimensions of 2 each."""
    for level in gl.static_range(COUNT.bit_length() - 1):
        joined = ()
        for k in gl.static_range(COUNT >> (level + 1)):
            joined = joined + (gl.join(values[k], values[k + (COUNT >> (level + 1))]),)
        values = joined
    return values[0]


@gluon.jit
def part_of(tiles, ranges, length, work, CHUNKS: gl.constexpr):
    """The program's part of ``tiles`` tiles of tokens of CHUNKS blocks of channels, which are cut
    as launch_backward_hopper.Cut says: first tile of its window, tiles of the window, where in the
    tiles of the windows of all blocks it begins, how many it has, the number of its first share of
    d fn, and in how many tiles the windows are cut.
    """
    program = gl.program_id(0)
    whole = program < ranges * CHUNKS
    number = program // CHUNKS
    rest = tiles - ranges * length
    first = gl.where(whole, number, ranges) * length
    window = gl.where(whole, length, rest)
    begin = gl.where(whole, program % CHUNKS * length, (program - ranges * CHUNKS) * work)
    steps = gl.where(
        whole, gl.minimum(length, tiles - first), gl.minimum(work, CHUNKS * rest - begin)
    )
    return (
        first,
        window,
        begin,
        steps,
        gl.where(whole, number, ranges),
        gl.where(whole, length, work),
    )


@gluon.jit
def places_of_fn(
    channel, N: gl.constexpr, C: gl.constexpr, B: gl.constexpr, ROWS: gl.constexpr,
    LAYOUT: gl.constexpr,
):  # fmt: skip
    """Where the elements of a block's slice of fn (or d fn) [(2 + N) N, N * C] lie, as a tile
    [(stream, channel of B), ROWS rows of fn], and which of them there are.
    """
    m = gl.arange(0, N * B, layout=gl.SliceLayout(1, LAYOUT))
    k = gl.arange(0, ROWS, layout=gl.SliceLayout(0, LAYOUT))
    at = (m // B * C + channel + m % B)[:, None] + k[None, :] * (N * C)
    return at, (channel + m % B < C)[:, None] & (k < (2 + N) * N)[None, :]


@gluon.jit
def make_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers of ARRIVALS arrivals each. What shares an allocation the compiler keeps in
    order, so every ring has its own.

    Some partition must use them. The memory of barriers that none does the compiler gives to what
    partitions are told when they start, and where processes take turns on a GPU, a barrier that was
    never invalidated comes back there.
    """
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for k in gl.static_range(COUNT):
        mbarrier.init(barriers.index(k), count=ARRIVALS)
    return barriers


@gluon.jit
def arrive(barrier):
    """One arrival. Around mbarrier.arrive the compiler puts two barriers of all threads; here it is
    the caller who sees to it that all have done what they announce.
    """
    mbarrier.expect(barrier, 0)
