"""Launches of the Hopper kernels for the gradient of the streams. Tensors are contiguous."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .hopper import aligned
from .launch import PLANS, cdiv, multiprocessors, pieces, sizes
from .run_kernel import Launch, Tiles
from .shares import Shares, SharesMemory
from .workspace import Part

# Tokens of a block of channels in the time that it takes to begin one.
BEGIN = 96
# What programs lose that are not at the same tokens at the same time: memory then reads a token's
# channels at many times (with a merge, 8192 x 4096: 300 us for 283).
APART = 1.06
# What more shares of d fn cost, and that both estimates are rough.
RANGES_AND_REST = 1.02


class Cut(NamedTuple):
    """How the tiles of tokens of all blocks of channels are shared out among programs.

    Each block's first ``ranges`` times ``length`` tiles are as many programs', which are at the
    same tokens at the same time. The rest of all blocks, one after the other, is cut into pieces of
    ``work`` tiles for other programs; a block has up to ``most`` programs.
    """

    ranges: int
    length: int
    rest: int
    work: int
    programs: int
    most: int


def _cut(tiles: int, chunks: int, ranges: int, length: int, programs: int) -> Cut:
    """With ``programs`` for what the ranges leave."""
    rest = max(0, tiles - ranges * length)
    if not rest:
        return Cut(ranges, length, 0, 1, chunks * ranges, ranges)
    work = cdiv(chunks * rest, programs)
    count = chunks * ranges + cdiv(chunks * rest, work)
    return Cut(ranges, length, rest, work, count, ranges + cdiv(rest - 1, work) + 1)


@lru_cache
def cut_of(tiles: int, chunks: int, programs: int, begin: int) -> Cut:
    """The quickest of three ways to cut ``tiles`` of each of ``chunks`` blocks of channels for
    ``programs``: in ranges alone; in ranges and a rest; in a rest alone.

    To begin a block, with its slice of fn and a share of d fn, takes the time of about ``begin``
    tiles.
    """
    count, whole = pieces(tiles, chunks, programs)
    waves = cdiv(count * chunks, programs)
    even = _cut(tiles, chunks, 0, 1, programs)
    ways = {
        _cut(tiles, chunks, count, whole, 0): waves * (whole + begin),
        even: APART * (even.work + 2 * begin),
    }
    ranges = min(tiles, programs // chunks)
    others = programs - ranges * chunks
    if ranges and others:
        # As long for all, where each of the others begins blocks / others times, and once more.
        blocks = chunks / others
        least = int(blocks * (tiles + begin) / (1 + blocks * ranges))
        for length in range(max(1, least), min(least + 3, cdiv(tiles, ranges))):
            both = _cut(tiles, chunks, ranges, length, others)
            longest = max(length, both.work + begin * both.work / both.rest) + begin
            ways[both] = RANGES_AND_REST * longest
    return min(ways, key=ways.get)


class HopperPlan(NamedTuple):
    """What all calls of one shape share. chunks, most: as SharesMemory has them. cut: the last four
    of Shares.
    """

    launch: Launch
    memory: SharesMemory
    chunks: int
    most: int
    cut: tuple[int, int, int, int]


def _plan(
    module,
    kernel,
    described: tuple[Tiles, ...],
    tokens: int,
    n: int,
    channels: int,
    device: torch.device,
    merges: bool,
) -> HopperPlan:
    """Of a kernel with the block sizes of its module."""
    block_t, block_c = module.BLOCK_T, module.BLOCK_C
    chunks, tiles = cdiv(channels, block_c), cdiv(tokens, block_t)
    cut = cut_of(tiles, chunks, multiprocessors(device), cdiv(BEGIN, block_t))
    launch = Launch(
        kernel,
        (cut.programs,),
        (tokens, cut.ranges, cut.length, cut.work),
        described,
        N=n,
        C=channels,
        T=block_t,
        B=block_c,
        num_warps=module.NUM_WARPS,
    )
    chunks = chunks if merges else 0
    memory = SharesMemory(tokens, n, chunks, ((2 + n) * n, n * channels), cut.most)
    shared_out = (block_c, cut.ranges, cut.rest, cut.work)
    return HopperPlan(launch, memory, chunks, cut.most, shared_out)


@lru_cache(PLANS)
def hopper_streams_plan(tokens: int, n: int, channels: int, device: torch.device) -> HopperPlan:
    """Of streams_backward_hopper, for at least one token."""
    from . import streams_backward_hopper_kernel as module

    t, b = module.BLOCK_T, module.BLOCK_C
    streams = Tiles((tokens, n, channels), (t, n, b), module.STREAMS_TILE)
    plain = Tiles((tokens, channels), (t, b), module.TILE)
    numbers = Tiles((tokens, 64), (t, 64), module.NUMBERS_TILE)
    described = (streams, plain, streams, plain, numbers, streams, plain)
    kernel = module.streams_backward_hopper_kernel
    return _plan(module, kernel, described, tokens, n, channels, device, merges=True)


def streams_backward_hopper(
    x: Tensor, f: Tensor, fn: Tensor, dx_next: Tensor, du: Tensor, numbers: Tensor | Part
) -> tuple[Tensor, Tensor, Shares]:
    """dx, df and the shares of (dpost, dcomb, dfn), with a merge."""
    tokens, n, channels = sizes(x)
    plan = hopper_streams_plan(tokens, n, channels, x.device)
    dx, df = torch.empty_like(x), torch.empty_like(f)
    dposts, dcombs, dfns = plan.memory.allocate(x)
    arriving = map(aligned, (x, f, dx_next, du))
    plan.launch(*arriving, numbers, dx, df, fn, dposts, dcombs, dfns)
    return dx, df, Shares(dposts, dcombs, dfns, *plan.cut)


@lru_cache(PLANS)
def hopper_pre_plan(tokens: int, n: int, channels: int, device: torch.device) -> HopperPlan:
    """Of pre_backward_hopper, for at least one token."""
    from . import pre_backward_hopper_kernel as module

    t, b, rows = module.BLOCK_T, module.BLOCK_C, module.ROWS.value
    shape, strides = (n, tokens, channels), (channels, n * channels, 1)
    streams = Tiles(shape, (n, t, b), module.STREAMS_TILE, strides)
    plain = Tiles((tokens, channels), (t, b), module.TILE)
    dz = Tiles((tokens, 64), (t, rows), module.DZ_TILE)
    numbers = Tiles((tokens, 64), (t, n), module.NUMBERS_TILE)
    planes = Tiles((tokens, 64), (t, 2 * rows), module.TILE)
    described = (streams, plain, dz, numbers, planes, streams)
    kernel = module.pre_backward_hopper_kernel
    return _plan(module, kernel, described, tokens, n, channels, device, merges=False)


def pre_backward_hopper(
    x: Tensor, fn: Tensor, du: Tensor, numbers: Tensor | Part, planes: Tensor | Part
) -> tuple[Tensor, Shares]:
    """dx and the shares of dfn, without a merge."""
    tokens, n, channels = sizes(x)
    plan = hopper_pre_plan(tokens, n, channels, x.device)
    dx = torch.empty_like(x)
    _, _, dfns = plan.memory.allocate(x)
    plan.launch(aligned(x), aligned(du), numbers, numbers, planes, dx, fn, dfns)
    return dx, Shares(None, None, dfns, *plan.cut)
