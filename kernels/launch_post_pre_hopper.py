"""Launch of post_pre_hopper_kernel, the forward pass on Hopper. Tensors: [T, ...], contiguous."""

import torch
from torch import Tensor

from .hopper import descriptor
from .launch import cdiv, multiprocessors
from .post_pre_hopper_groups import MAIL
from .post_pre_hopper_kernel import (
    COMB_TILE,
    NUM_WARPS,
    POST_TILE,
    REGISTERS,
    STREAMS_TILE,
    TILE,
    post_pre_hopper_kernel,
)
from .post_pre_hopper_mappings import ROWS
from .run_kernel import run_kernel

BLOCK_C = 256
# Tokens of a tile and depths of the rings, with a merge and without.
POST_PRE = {"T": 16, "RX": 2, "RK": 4, "RS": 1}
PRE = {"T": 8, "RX": 12, "RK": 12, "RS": 2}
# Blocks of a group at most. A tile waits for its slowest block: with 28 (7168 channels) the two
# kernels that serve every GPU took 240 us, this one 339.
LARGEST_GROUP = 16
# Share of all multiprocessors' channels that must be channels of X: a tile takes as long where many
# are padding. At 8192 x 4096 it was 0.97, in 217 us against 268: they break even near 0.8.
LEAST_SHARE = 7 / 8
# Tiles that a group draws at once; drawing single ones is slower.
CHUNK = 4


def pays(channels: int, device: torch.device) -> bool:
    """Whether one pass over X is faster than the two kernels for every GPU."""
    size = cdiv(channels, BLOCK_C)
    slots = multiprocessors(device)
    return size <= LARGEST_GROUP and slots // size * channels >= LEAST_SHARE * slots * BLOCK_C


def post_pre_hopper(
    x: Tensor,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor],
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, ...]:
    """As :func:`.launch.forward`, of at least one token."""
    tokens, n, channels = x.shape
    fn, scale, base = mapping
    count = fn.shape[0]
    rings = POST_PRE if merge else PRE
    block_t = rings["T"]
    tiles = cdiv(tokens, block_t)
    size = cdiv(channels, BLOCK_C)
    groups = min(multiprocessors(x.device) // size, tiles)
    chunk = max(1, min(CHUNK, tiles // (2 * groups)))
    mails = cdiv(tiles, chunk) + 1

    empty = {"dtype": torch.float32, "device": x.device}
    u = x.new_empty((tokens, channels))
    pre = torch.empty((tokens, n), **empty)
    m = torch.empty((tokens, count), **empty)
    r = torch.empty((tokens,), **empty)
    kept = 0 if count == n else tokens
    post_next = torch.empty((kept, n), **empty)
    comb_next = torch.empty((kept, n, n), **empty)
    shares = torch.empty((tiles, size, ROWS.value, block_t), **empty)
    # Of this launch alone: launches on several streams run at once.
    words = MAIL.value + groups * mails + tiles
    state = torch.zeros(words, dtype=torch.int32, device=x.device)

    streams = descriptor(x, (block_t, n, BLOCK_C), STREAMS_TILE)
    sources = (streams,) * 5
    x_next = None
    if merge:
        f, post, comb = merge
        x_next = torch.empty_like(x)
        sources = (
            streams,
            descriptor(f, (block_t, BLOCK_C), TILE),
            descriptor(post, (block_t, n), POST_TILE),
            descriptor(comb.view(tokens, n * n), (block_t, n * n), COMB_TILE),
            descriptor(x_next, (block_t, n, BLOCK_C), STREAMS_TILE),
        )
    run_kernel(
        post_pre_hopper_kernel,
        (groups * size,),
        *sources,
        fn,
        scale,
        base,
        u,
        pre,
        m,
        r,
        post_next,
        comb_next,
        shares,
        state,
        tokens,
        mails,
        chunk,
        eps,
        norm_eps,
        N=n,
        C=channels,
        B=BLOCK_C,
        **rings,
        COUNT=count,
        ITERATIONS=iterations,
        MERGE=merge is not None,
        REGISTERS=REGISTERS,
        num_warps=NUM_WARPS,
    )
    outputs = (u, post_next, comb_next, pre, m, r)
    return (x_next, *outputs) if merge else outputs
