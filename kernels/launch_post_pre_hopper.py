"""Launch of post_pre_hopper_kernel, the forward pass on Hopper. Tensors are contiguous."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .backward_ahead import begin_backward
from .hopper import aligned
from .launch import PLANS, cdiv, multiprocessors, sizes
from .launch_state import state_of
from .post_pre_hopper_groups import MAIL
from .post_pre_hopper_kernel import (
    COMB_TILE,
    NUM_WARPS,
    POST_TILE,
    STREAMS_TILE,
    TILE,
    post_pre_hopper_kernel,
)
from .post_pre_hopper_mappings import FIRST, QUICK
from .run_kernel import Launch, Tiles

BLOCK_C = 256
# Tokens of a tile and depths of the rings, with a merge and without.
POST_PRE = {"T": 16, "RX": 5, "RF": 3, "RS": 2}
PRE = {"T": 16, "RX": 6, "RF": 1, "RS": 2}
# Registers of a thread of the warps that aggregate, store shares, form pre (28 blocks' shares need
# them), load, and form mappings.
REGISTERS = (64, 48, 112, 40, 56)
# Blocks of a group that pay: at 512 channels (2 blocks) the two kernels that serve every GPU are
# faster.
GROUPS = range(5, 33)
# Share of all multiprocessors' channels that must be channels of X: a tile takes as long where many
# are padding. At 6144 it is 0.91, in 171 us against 200.
LEAST_SHARE = 5 / 6
# Tiles that a group draws at once (drawing single ones is slower), and how many for each group are
# drawn singly at the end.
CHUNK, SINGLES = 4, 4


def pays(channels: int, device: torch.device) -> bool:
    """Whether one pass over X is faster than the two kernels for every GPU."""
    size = cdiv(channels, BLOCK_C)
    slots = multiprocessors(device)
    fills = slots // size * channels >= LEAST_SHARE * slots * BLOCK_C
    return size in GROUPS and fills


class Plan(NamedTuple):
    """What all calls of one shape share. state: their shape, and words of memory, see state_of."""

    launch: Launch
    state: tuple[int, ...]
    words: int


@lru_cache(PLANS)
def plan_of(
    tokens: int,
    n: int,
    channels: int,
    count: int,
    device: torch.device,
    merges: bool,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> Plan:
    """For at least one token."""
    rings = POST_PRE if merges else PRE
    block_t = rings["T"]
    tiles = cdiv(tokens, block_t)
    size = cdiv(channels, BLOCK_C)
    groups = min(multiprocessors(device) // size, tiles)
    long_ones = max(0, tiles - SINGLES * groups) // CHUNK
    mails = long_ones + tiles - CHUNK * long_ones + 1
    streams = Tiles((tokens, n, channels), (block_t, n, BLOCK_C), STREAMS_TILE)
    sources = (streams,) * 5
    if merges:
        f = Tiles((tokens, channels), (block_t, BLOCK_C), TILE)
        post = Tiles((tokens, n), (block_t, n), POST_TILE)
        comb = Tiles((tokens, n * n), (block_t, n * n), COMB_TILE)
        sources = (streams, f, post, comb, streams)
    launch = Launch(
        post_pre_hopper_kernel,
        (groups * size,),
        (tokens, mails, CHUNK, long_ones, eps, norm_eps),
        sources,
        N=n,
        C=channels,
        B=BLOCK_C,
        **rings,
        COUNT=count,
        ITERATIONS=iterations,
        MERGE=merges,
        REGISTERS=REGISTERS,
        num_warps=NUM_WARPS,
    )
    rows = QUICK.value + cdiv(count, 8) * 8 - FIRST.value
    words = tiles * size * rows * block_t + MAIL.value + 2 * groups * mails
    return Plan(launch, (tiles, size, rows), words)


def post_pre_hopper(
    x: Tensor,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor],
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, ...]:
    """As :func:`.launch.forward`, of at least one token."""
    tokens, n, channels = sizes(x)
    fn, scale, base = mapping
    count, merges = fn.shape[0], merge is not None
    plan = plan_of(tokens, n, channels, count, x.device, merges, iterations, eps, norm_eps)
    if not plan.launch.compiled:
        begin_backward(x, merge, mapping, iterations, eps)
    lead = x.shape[:-2]
    kept = (0,) if count == n else lead
    u = x.new_empty(*lead, channels)
    pre, m, r = fn.new_empty(*lead, n), fn.new_empty(*lead, count), fn.new_empty(lead)
    post_next, comb_next = fn.new_empty(*kept, n), fn.new_empty(*kept, n, n)
    state = state_of(plan.state, plan.words, x.device)
    x = aligned(x)
    x_next, sources = None, (x,) * 5
    if merge:
        x_next = torch.empty_like(x)
        sources = (x, *map(aligned, merge), x_next)
    outputs = (u, pre, m, r, post_next, comb_next)
    plan.launch(*sources, *sources[:2], fn, scale, base, *outputs, state)
    outputs = (u, post_next, comb_next, pre, m, r)
    return (x_next, *outputs) if merge else outputs
