"""Launches of the Hopper kernels for the gradient of the streams. Tensors are contiguous."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .hopper import aligned
from .launch import PLANS, cdiv, multiprocessors, pieces, sizes
from .launch_reduce import Shares
from .run_kernel import Launch, Tiles

# Tokens of a block of channels in the time that it takes to begin (with a merge, 8192 x 4096: even
# pieces of 125 tiles took 335 us, whole ones of 128 took 330).
BEGIN = 160


@lru_cache
def tiles_a_program(tiles: int, chunks: int, programs: int, begin: int) -> int:
    """How many of the ``tiles`` of each of ``chunks`` blocks of channels a Hopper program takes.

    As many for each of ``programs``, across the ends of blocks; but pieces of one block each where
    that takes no longer. To begin a block, with its slice of fn and a share of d fn, takes the time
    of about ``begin`` tiles.
    """
    even = cdiv(chunks * tiles, programs)
    ranges, whole = pieces(tiles, chunks, programs)
    waves = cdiv(chunks * ranges, programs)
    return whole if waves * (whole + begin) <= even + 2 * begin else even


class HopperPlan(NamedTuple):
    """What all calls of one shape share; see Shares."""

    launch: Launch
    chunks: int
    channels: int
    tiles: int
    work: int

    def new_dfns(self, fn: Tensor) -> Tensor:
        """Memory for the shares of d fn."""
        return fn.new_empty(cdiv(self.tiles - 1, self.work) + 1, *fn.shape)


def _plan(
    module,
    kernel,
    described: tuple[Tiles, ...],
    tokens: int,
    n: int,
    channels: int,
    device: torch.device,
) -> HopperPlan:
    """Of a kernel with the block sizes of its module."""
    block_t, block_c = module.BLOCK_T, module.BLOCK_C
    chunks, tiles = cdiv(channels, block_c), cdiv(tokens, block_t)
    work = tiles_a_program(tiles, chunks, multiprocessors(device), cdiv(BEGIN, block_t))
    launch = Launch(
        kernel,
        (cdiv(chunks * tiles, work),),
        (tokens, work),
        described,
        N=n,
        C=channels,
        T=block_t,
        B=block_c,
        num_warps=module.NUM_WARPS,
    )
    return HopperPlan(launch, chunks, block_c, tiles, work)


@lru_cache(PLANS)
def hopper_streams_plan(tokens: int, n: int, channels: int, device: torch.device) -> HopperPlan:
    """Of streams_backward_hopper, for at least one token."""
    from . import streams_backward_hopper_kernel as module

    t, b = module.BLOCK_T, module.BLOCK_C
    streams = Tiles((tokens, n, channels), (t, n, b), module.STREAMS_TILE)
    plain = Tiles((tokens, channels), (t, b), module.TILE)
    numbers = Tiles((tokens, 64), (t, 64), module.NUMBERS_TILE)
    planes = Tiles((tokens, 64), (t, 64), module.TILE)
    described = (streams, plain, streams, plain, numbers, planes, streams, plain)
    kernel = module.streams_backward_hopper_kernel
    return _plan(module, kernel, described, tokens, n, channels, device)


def streams_backward_hopper(
    x: Tensor, f: Tensor, fn: Tensor, dx_next: Tensor, du: Tensor, numbers: Tensor, planes: Tensor
) -> tuple[Tensor, Tensor, Shares]:
    """dx, df and the shares of (dpost, dcomb, dfn), with a merge."""
    tokens, n, channels = sizes(x)
    plan = hopper_streams_plan(tokens, n, channels, x.device)
    dx, df = torch.empty_like(x), torch.empty_like(f)
    dposts = fn.new_empty(plan.chunks, tokens, n)
    dcombs = fn.new_empty(plan.chunks, tokens, n, n)
    dfns = plan.new_dfns(fn)
    arriving = map(aligned, (x, f, dx_next, du))
    plan.launch(*arriving, numbers, planes, dx, df, fn, dposts, dcombs, dfns)
    return dx, df, Shares(dposts, dcombs, dfns, plan.channels, plan.tiles, plan.work)


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
    return _plan(module, kernel, described, tokens, n, channels, device)


def pre_backward_hopper(
    x: Tensor, fn: Tensor, du: Tensor, numbers: Tensor, planes: Tensor
) -> tuple[Tensor, Shares]:
    """dx and the shares of dfn, without a merge."""
    tokens, n, channels = sizes(x)
    plan = hopper_pre_plan(tokens, n, channels, x.device)
    dx, dfns = torch.empty_like(x), plan.new_dfns(fn)
    plan.launch(aligned(x), aligned(du), numbers, numbers, planes, dx, fn, dfns)
    return dx, Shares(None, None, dfns, plan.channels, plan.tiles, plan.work)
