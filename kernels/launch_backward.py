"""Backward of post, pre, head and post_pre: three launches. Tensors are contiguous."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .aggregate_backward_kernel import aggregate_backward_kernel
from .hopper import aligned, serves_hopper
from .launch import (
    PLANS,
    POST_STREAMS_RESIDENT,
    STREAMS_RESIDENT,
    cdiv,
    config,
    multiprocessors,
    padded_rows,
    pieces,
    sizes,
    walk,
)
from .launch_reduce import MappingParts, Shares, reduce
from .run_kernel import Launch, Tiles
from .streams_backward_kernel import streams_backward_kernel

# Tokens of a program that computes gradients of the mappings.
MAPPING_BACKWARD_BLOCK = 16
# Tiles of the Hopper kernel in the time that a block of channels takes to begin (8192 x 4096: even
# pieces of 125 took 335 us, whole ones of 128 took 330).
BEGIN = 5


def backward(
    x: Tensor,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor] | None,
    mapped: tuple[Tensor, Tensor, Tensor] | None,
    grads: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    iterations: int = 1,
    eps: float = 0.0,
    main_grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients (dx, df, dpost, dcomb, dfn, dscale, dbase); those without a part are None.

    Args:
        x: [..., n, C] before the merge.
        merge: (f, post, comb), or None. mapping: (fn, scale, base) of what follows it, or None.
        mapped: (x_next, m, r) of the forward: the streams that were mapped (x itself without a
            merge), the normalised products [..., count] and the RMS factor [...]; None without
            mapping.
        grads: of the merged streams, of u, and of the mapping's post and comb; None where there is
            no such output or no gradient.
        main_grads: to add the gradients of fn, scale and base to, which are returned as None.
    """
    tokens, n, _ = sizes(x)
    dx_next, du, dpost_next, dcomb_next = grads
    numbers = planes = mapping_parts = None
    if mapping:
        numbers, planes, mapping_parts = mapping_backward(
            merge, mapping, mapped, (du, dpost_next, dcomb_next), iterations, eps
        )
    fn = mapping[0] if mapping else None
    f = merge[0] if merge else None
    head = fn is not None and fn.shape[0] == n
    whole = merge and mapping and dx_next is not None and tokens and not head
    if whole and serves_hopper(x, f, n):
        dx, df, shares = streams_backward_hopper(x, f, fn, dx_next, du, numbers, planes)
    else:
        dx, df, shares = streams_backward(x, merge, fn, dx_next, du, numbers, planes)
    return dx, df, *reduce(shares, mapping_parts, merge, mapping, x, main_grads)


class MappingPlan(NamedTuple):
    """What all of mapping_backward's calls of one shape share."""

    launch: Launch
    rows: int
    width: int
    blocks: int
    map_programs: int


@lru_cache(PLANS)
def mapping_plan(
    tokens: int, n: int, channels: int, count: int, merges: bool, iterations: int, eps: float
) -> MappingPlan:
    """For tokens, and ``count`` mappings of each."""
    rows = padded_rows(count)
    width = rows + padded_rows(n * n + 2 * n + 2)
    options = walk("aggregate_backward", channels)
    blocks = cdiv(tokens, options["BLOCK_T"])
    map_programs = cdiv(tokens, MAPPING_BACKWARD_BLOCK)
    # The mappings are done when half of the streams are.
    every = max(1, blocks // max(1, 2 * map_programs))
    launch = Launch(
        aggregate_backward_kernel,
        (map_programs + blocks,),
        (tokens, map_programs, every, eps),
        N=n,
        C=channels,
        ROWS=rows,
        WIDTH=width,
        MERGE=merges,
        HEAD=count == n,
        ITERATIONS=iterations,
        BLOCK_M=MAPPING_BACKWARD_BLOCK,
        **options,
    )
    return MappingPlan(launch, rows, width, blocks, map_programs)


def mapping_backward(
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor],
    mapped: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None, Tensor | None],
    iterations: int,
    eps: float,
) -> tuple[Tensor, Tensor, MappingParts]:
    """The tokens' numbers [T, WIDTH], dz's bf16 planes [T, 2 * ROWS] (mapping_backward_kernel) and
    the shares of dscale and dbase.
    """
    fn, scale, base = mapping
    x_next, m, r = mapped
    _, post, comb = merge or (None, None, None)
    tokens, n, channels = sizes(x_next)
    count = fn.shape[0]
    plan = mapping_plan(tokens, n, channels, count, merge is not None, iterations, eps)
    numbers = fn.new_empty(tokens, plan.width)
    planes = fn.new_empty(tokens, 2 * plan.rows, dtype=torch.bfloat16)
    pre_parts = fn.new_empty(n + 1, plan.blocks)
    parts = fn.new_empty(count - n + 2, plan.map_programs)
    if tokens:
        plan.launch(
            x_next, *grads[:1], m, r, scale, base, *grads[1:], post, comb, numbers, planes,
            pre_parts, parts,
        )  # fmt: skip
    return numbers, planes, MappingParts(pre_parts, parts)


class StreamsPlan(NamedTuple):
    """What all of streams_backward's calls of one shape share."""

    launch: Launch
    chunks: int
    channels: int
    ranges: int


@lru_cache(PLANS)
def streams_plan(
    tokens: int,
    n: int,
    channels: int,
    count: int,
    width: int,
    dtype: torch.dtype,
    device: torch.device,
    merges: bool,
    has_dx: bool,
) -> StreamsPlan:
    """For tokens, ``count`` mappings of each or none, and numbers [T, ``width``]."""
    options = config("streams" if count else "post_streams", n, dtype, device)
    chunks = cdiv(channels, options["BLOCK_C"])
    ranges, size = 1, 0
    if tokens:
        resident = STREAMS_RESIDENT if count else POST_STREAMS_RESIDENT
        slots = resident * multiprocessors(device)
        ranges, size = pieces(cdiv(tokens, options["BLOCK_T"]), chunks, slots)
    launch = Launch(
        streams_backward_kernel,
        (chunks, ranges),
        (tokens, size * options["BLOCK_T"]),
        N=n,
        C=channels,
        COUNT=max(1, count),
        ROWS=padded_rows(count),
        WIDTH=width,
        PLANES=2 if dtype == torch.bfloat16 else 1,
        MERGE=merges,
        MAP=count > 0,
        HAS_DX=has_dx,
        PRECISION="tf32" if dtype == torch.bfloat16 else "tf32x3",
        **options,
    )
    return StreamsPlan(launch, chunks, options["BLOCK_C"], ranges)


def streams_backward(
    x: Tensor,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    fn: Tensor | None,
    dx_next: Tensor | None,
    du: Tensor | None,
    numbers: Tensor | None,
    planes: Tensor | None,
) -> tuple[Tensor, Tensor | None, Shares]:
    """dx, df and the shares of (dpost, dcomb, dfn), by the kernel for every GPU."""
    tokens, n, channels = sizes(x)
    f, post, comb = merge or (None, None, None)
    count, width = (0, 1) if fn is None else (fn.shape[0], numbers.shape[1])
    merges, has_dx = merge is not None, dx_next is not None
    plan = streams_plan(tokens, n, channels, count, width, x.dtype, x.device, merges, has_dx)
    dx = torch.empty_like(x)
    df = dposts = dcombs = dfns = None
    if merge:
        df = torch.empty_like(f)
        dposts = x.new_empty(plan.chunks, tokens, n, dtype=torch.float32)
        dcombs = x.new_empty(plan.chunks, tokens, n, n, dtype=torch.float32)
    if count:
        dfns = (fn.new_empty if tokens else fn.new_zeros)((plan.ranges, *fn.shape))
    if tokens:
        plan.launch(
            x, f, post, comb, fn, dx_next, du, numbers, planes, dx, df, dposts, dcombs, dfns
        )
    return dx, df, Shares(dposts, dcombs, dfns, plan.channels, plan.ranges, 1)


@lru_cache
def tiles_a_program(tiles: int, chunks: int, programs: int) -> int:
    """How many of the ``tiles`` of each of ``chunks`` blocks of channels a Hopper program takes.

    As many for each of ``programs``, across the ends of blocks; but pieces of one block each where
    that takes no longer. To begin a block, with its slice of fn and a share of d fn, takes the time
    of about BEGIN tiles.
    """
    even = cdiv(chunks * tiles, programs)
    ranges, whole = pieces(tiles, chunks, programs)
    waves = cdiv(chunks * ranges, programs)
    return whole if waves * (whole + BEGIN) <= even + 2 * BEGIN else even


class HopperPlan(NamedTuple):
    """What all of streams_backward_hopper's calls of one shape share."""

    launch: Launch
    chunks: int
    channels: int
    tiles: int
    work: int


@lru_cache(PLANS)
def hopper_plan(tokens: int, n: int, channels: int, device: torch.device) -> HopperPlan:
    """For at least one token."""
    from . import streams_backward_hopper_kernel as hopper_kernel

    block_t, block_c = hopper_kernel.BLOCK_T, hopper_kernel.BLOCK_C
    chunks = cdiv(channels, block_c)
    tiles = cdiv(tokens, block_t)
    work = tiles_a_program(tiles, chunks, multiprocessors(device))
    streams = Tiles((tokens, n, channels), (block_t, n, block_c), hopper_kernel.STREAMS_TILE)
    plain = Tiles((tokens, channels), (block_t, block_c), hopper_kernel.TILE)
    numbers = Tiles((tokens, 64), (block_t, 64), hopper_kernel.NUMBERS_TILE)
    planes = Tiles((tokens, 64), (block_t, 64), hopper_kernel.TILE)
    launch = Launch(
        hopper_kernel.streams_backward_hopper_kernel,
        (cdiv(chunks * tiles, work),),
        (tokens, work),
        (streams, plain, streams, plain, numbers, planes, streams, plain),
        N=n,
        C=channels,
        T=block_t,
        B=block_c,
        num_warps=hopper_kernel.NUM_WARPS,
    )
    return HopperPlan(launch, chunks, block_c, tiles, work)


def streams_backward_hopper(
    x: Tensor, f: Tensor, fn: Tensor, dx_next: Tensor, du: Tensor, numbers: Tensor, planes: Tensor
) -> tuple[Tensor, Tensor, Shares]:
    """dx, df and the shares of (dpost, dcomb, dfn), by the Hopper kernel."""
    tokens, n, channels = sizes(x)
    plan = hopper_plan(tokens, n, channels, x.device)
    dx, df = torch.empty_like(x), torch.empty_like(f)
    dposts = fn.new_empty(plan.chunks, tokens, n)
    dcombs = fn.new_empty(plan.chunks, tokens, n, n)
    dfns = fn.new_empty(cdiv(plan.tiles - 1, plan.work) + 1, *fn.shape)
    arriving = map(aligned, (x, f, dx_next, du))
    plan.launch(*arriving, numbers, planes, dx, df, fn, dposts, dcombs, dfns)
    return dx, df, Shares(dposts, dcombs, dfns, plan.channels, plan.tiles, plan.work)
