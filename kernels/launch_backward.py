"""Backward of post, pre, head and post_pre: four launches. Tensors are [T, ...], contiguous."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .aggregate_backward_kernel import aggregate_backward_kernel
from .hopper import descriptor, serves_hopper
from .launch import (
    CONFIGS,
    POST_STREAMS_RESIDENT,
    STREAMS_RESIDENT,
    cdiv,
    config,
    multiprocessors,
    padded_rows,
    pieces,
    walk,
)
from .mapping_backward_kernel import mapping_backward_kernel
from .reduce_kernel import reduce_kernel
from .run_kernel import run_kernel
from .streams_backward_kernel import streams_backward_kernel

# Columns and shares that one program of reduce_kernel sums at a time, and rows of the mapping's
# shares, which two programs sum alone.
REDUCE_BLOCK, REDUCE_SHARES, REDUCE_ROWS = 256, 16, 256
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
        x: [T, n, C] before the merge.
        merge: (f, post, comb), or None. mapping: (fn, scale, base) of what follows it, or None.
        mapped: (x_next, m, r) of the forward: the streams that were mapped (x itself without a
            merge), the normalised products [T, count] and the RMS factor [T]; None without mapping.
        grads: of the merged streams, of u, and of the mapping's post and comb; None where there is
            no such output or no gradient.
        main_grads: to add the gradients of fn, scale and base to, which are returned as None.
    """
    tokens, n, channels = x.shape
    dx_next, du, dpost_next, dcomb_next = grads
    numbers = planes = mapping_parts = None
    if mapping:
        numbers, planes, mapping_parts = mapping_backward(
            merge, mapping, mapped, (du, dpost_next, dcomb_next), iterations, eps
        )
    fn = mapping[0] if mapping else None
    f = merge[0] if merge else None
    head = fn is not None and fn.shape[0] == n
    if merge and mapping and dx_next is not None and tokens and not head and serves_hopper(x, n):
        dx, df, shares = streams_backward_hopper(x, f, fn, dx_next, du, numbers, planes)
    else:
        dx, df, shares = streams_backward(x, merge, fn, dx_next, du, numbers, planes)
    return dx, df, *reduce(shares, mapping_parts, merge, mapping, x, main_grads)


def mapping_backward(
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor],
    mapped: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None, Tensor | None],
    iterations: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens' numbers [T, WIDTH], dz's bf16 planes [T, 2 * ROWS] (mapping_backward_kernel) and
    the shares of dscale and dbase.
    """
    fn, scale, base = mapping
    x_next, m, r = mapped
    du, dpost, dcomb = grads
    tokens, n, channels = x_next.shape
    count = fn.shape[0]
    rows = padded_rows(count)
    empty = {"dtype": torch.float32, "device": fn.device}
    width = rows + padded_rows(n * n + 2 * n + 1)
    numbers = torch.empty((tokens, width), **empty)
    planes = torch.empty((tokens, 2 * rows), dtype=torch.bfloat16, device=fn.device)
    block = CONFIGS["mapping_backward"]
    programs = cdiv(tokens, block["BLOCK"])
    parts = torch.empty((programs, 2, count), **empty)
    if not tokens:
        return numbers, planes, parts
    dpre = torch.empty((tokens, n), **empty)
    options = walk("aggregate_backward", channels)
    run_kernel(
        aggregate_backward_kernel,
        (cdiv(tokens, options["BLOCK_T"]),),
        x_next,
        du,
        dpre,
        tokens,
        N=n,
        C=channels,
        **options,
    )
    run_kernel(
        mapping_backward_kernel,
        (programs,),
        m,
        r,
        scale,
        base,
        dpre,
        dpost,
        dcomb,
        merge[1] if merge else None,
        merge[2] if merge else None,
        numbers,
        planes,
        parts,
        tokens,
        eps,
        N=n,
        C=channels,
        ROWS=rows,
        WIDTH=width,
        MERGE=merge is not None,
        HEAD=count == n,
        ITERATIONS=iterations,
        **block,
    )
    return numbers, planes, parts


class Shares(NamedTuple):
    """What is left to sum: dpost [chunks, T, n], dcomb [chunks, T, n, n], dfn [most, count, nC].

    All tiles of a block of ``channels`` channels, block after block, were cut into pieces of
    ``work``, and each piece left its share of dfn: a block has ``most`` shares or fewer.
    """

    dpost: Tensor | None
    dcomb: Tensor | None
    dfn: Tensor | None
    channels: int
    tiles: int
    work: int


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
    tokens, n, channels = x.shape
    f, post, comb = merge or (None, None, None)
    mapped = fn is not None
    count = fn.shape[0] if mapped else 1
    options = config("streams" if mapped else "post_streams", n, x.dtype, x.device)
    chunks = cdiv(channels, options["BLOCK_C"])
    ranges, size = 1, 0
    empty = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty_like(x)
    df = dposts = dcombs = dfns = None
    if merge:
        df = torch.empty_like(f)
        dposts = torch.empty((chunks, *post.shape), **empty)
        dcombs = torch.empty((chunks, *comb.shape), **empty)
    if tokens:
        resident = STREAMS_RESIDENT if mapped else POST_STREAMS_RESIDENT
        slots = resident * multiprocessors(x.device)
        ranges, size = pieces(cdiv(tokens, options["BLOCK_T"]), chunks, slots)
        size *= options["BLOCK_T"]
    if mapped:
        shape = (ranges, *fn.shape)
        dfns = torch.empty(shape, **empty) if tokens else torch.zeros(shape, **empty)
    if tokens:
        run_kernel(
            streams_backward_kernel,
            (chunks, ranges),
            x,
            f,
            post,
            comb,
            fn,
            dx_next,
            du,
            numbers,
            planes,
            dx,
            df,
            dposts,
            dcombs,
            dfns,
            tokens,
            size,
            N=n,
            C=channels,
            COUNT=count,
            ROWS=padded_rows(count),
            WIDTH=numbers.shape[1] if mapped else 1,
            PLANES=2 if x.dtype == torch.bfloat16 else 1,
            MERGE=merge is not None,
            MAP=mapped,
            HAS_DX=dx_next is not None,
            PRECISION="tf32" if x.dtype == torch.bfloat16 else "tf32x3",
            **options,
        )
    return dx, df, Shares(dposts, dcombs, dfns, options["BLOCK_C"], ranges, 1)


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


def streams_backward_hopper(
    x: Tensor, f: Tensor, fn: Tensor, dx_next: Tensor, du: Tensor, numbers: Tensor, planes: Tensor
) -> tuple[Tensor, Tensor, Shares]:
    """dx, df and the shares of (dpost, dcomb, dfn), by the Hopper kernel."""
    from . import streams_backward_hopper_kernel as hopper_kernel

    block_t, block_c = hopper_kernel.BLOCK_T, hopper_kernel.BLOCK_C
    tokens, n, channels = x.shape
    chunks = cdiv(channels, block_c)
    tiles = cdiv(tokens, block_t)
    work = tiles_a_program(tiles, chunks, multiprocessors(x.device))
    empty = {"dtype": torch.float32, "device": x.device}
    dx, df = torch.empty_like(x), torch.empty_like(f)
    dposts = torch.empty((chunks, tokens, n), **empty)
    dcombs = torch.empty((chunks, tokens, n, n), **empty)
    dfns = torch.empty((cdiv(tiles - 1, work) + 1, *fn.shape), **empty)

    def streams(tensor):
        return descriptor(tensor, (block_t, n, block_c), hopper_kernel.STREAMS_TILE)

    def plain(tensor):
        return descriptor(tensor, (block_t, block_c), hopper_kernel.TILE)

    run_kernel(
        hopper_kernel.streams_backward_hopper_kernel,
        (cdiv(chunks * tiles, work),),
        streams(x),
        plain(f),
        streams(dx_next),
        plain(du),
        descriptor(numbers, (block_t, 64), hopper_kernel.NUMBERS_TILE),
        descriptor(planes, (block_t, 64), hopper_kernel.TILE),
        streams(dx),
        plain(df),
        fn,
        dposts,
        dcombs,
        dfns,
        tokens,
        work,
        N=n,
        C=channels,
        T=block_t,
        B=block_c,
        num_warps=hopper_kernel.NUM_WARPS,
    )
    return dx, df, Shares(dposts, dcombs, dfns, block_c, tiles, work)


def reduce(
    shares: Shares,
    mapping_parts: Tensor | None,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor] | None,
    x: Tensor,
    main_grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """(dpost, dcomb, dfn, dscale, dbase) from their shares, in one launch and a fixed order.

    With ``main_grads`` the last three are None: each sum is added there, in one addition.
    """
    tokens, n, channels = x.shape
    dposts, dcombs, dfns = shares.dpost, shares.dcomb, shares.dfn
    dpost = dcomb = dfn = dscale = dbase = None
    post_blocks = comb_blocks = fn_blocks = count = 0
    if merge:
        _, post, comb = merge
        dpost, dcomb = torch.empty_like(post), torch.empty_like(comb)
        post_blocks = cdiv(dpost.numel(), REDUCE_BLOCK)
        comb_blocks = cdiv(dcomb.numel(), REDUCE_BLOCK)
    if mapping:
        fn, scale, base = mapping
        count = fn.shape[0]
        if main_grads:
            dfn, dscale, dbase = main_grads
        else:
            dfn = dfns[0] if dfns.shape[0] == 1 else torch.empty_like(fn)
            dscale, dbase = torch.empty_like(scale), torch.empty_like(base)
        if main_grads or dfns.shape[0] > 1:
            fn_blocks = cdiv(fn.numel(), REDUCE_BLOCK)
    segments = 0 if mapping is None else 1 if count == n else 3
    programs = comb_blocks + post_blocks + fn_blocks + 2 * (segments > 0)
    if programs:
        run_kernel(
            reduce_kernel,
            (programs,),
            dfns,
            dfn,
            dposts,
            dpost,
            dcombs,
            dcomb,
            mapping_parts,
            dscale,
            dbase,
            tokens,
            dfns.shape[0] if mapping else 0,
            shares.tiles,
            shares.work,
            shares.channels,
            dposts.shape[0] if merge else 0,
            mapping_parts.shape[0] if mapping else 0,
            fn_blocks,
            comb_blocks,
            N=n,
            C=channels,
            COUNT=count,
            SEGMENTS=segments,
            MERGE=merge is not None,
            BLOCK_S=REDUCE_SHARES,
            BLOCK=REDUCE_BLOCK,
            ROWS=REDUCE_ROWS,
            ADD=main_grads is not None,
            num_warps=8,
            num_stages=1,
        )
    if main_grads:
        return dpost, dcomb, None, None, None
    return dpost, dcomb, dfn, dscale, dbase
