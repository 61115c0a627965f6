"""Backward of post, pre, head and post_pre: three launches. Tensors are contiguous."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .aggregate_backward_kernel import aggregate_backward_kernel
from .hopper import serves_hopper
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
from .launch_backward_hopper import pre_backward_hopper, streams_backward_hopper
from .launch_reduce import MappingParts, reduce
from .run_kernel import Launch
from .shares import Shares, SharesMemory
from .streams_backward_kernel import streams_backward_kernel
from .workspace import Part, Workspace

# Tokens of a program that computes gradients of the mappings.
MAPPING_BACKWARD_BLOCK = 16


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
    on_hopper = mapping and tokens and not head and serves_hopper(x, f, n)
    if on_hopper and merge and dx_next is not None:
        dx, df, shares = streams_backward_hopper(x, f, fn, dx_next, du, numbers)
    elif on_hopper and not merge:
        df = None
        dx, shares = pre_backward_hopper(x, fn, du, numbers, planes)
    else:
        dx, df, shares = streams_backward(x, merge, fn, dx_next, du, numbers, planes)
    return dx, df, *reduce(shares, mapping_parts, merge, mapping, x, main_grads)


class MappingPlan(NamedTuple):
    """What all of mapping_backward's calls of one shape share."""

    launch: Launch
    workspace: Workspace
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
    workspace = Workspace(
        ((tokens, width), torch.float32),
        ((tokens, 2 * rows), torch.bfloat16),
        ((n + 1, blocks), torch.float32),
        ((count - n + 2, map_programs), torch.float32),
    )
    return MappingPlan(launch, workspace, blocks, map_programs)


def mapping_backward(
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor],
    mapped: tuple[Tensor, Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None, Tensor | None],
    iterations: int,
    eps: float,
) -> tuple[Part, Part, MappingParts]:
    """The tokens' numbers [T, WIDTH], dz's bf16 planes [T, 2 * ROWS] (mapping_backward_kernel) and
    the shares of dscale and dbase.
    """
    fn, scale, base = mapping
    x_next, m, r = mapped
    _, post, comb = merge or (None, None, None)
    tokens, n, channels = sizes(x_next)
    count = fn.shape[0]
    plan = mapping_plan(tokens, n, channels, count, merge is not None, iterations, eps)
    numbers, planes, pre_parts, parts = plan.workspace.allocate(fn)
    if tokens:
        plan.launch(
            x_next, *grads[:1], m, r, scale, base, *grads[1:], post, comb, numbers, planes,
            pre_parts, parts,
        )  # fmt: skip
    return numbers, planes, MappingParts(pre_parts, parts)


class StreamsPlan(NamedTuple):
    """What all of streams_backward's calls of one shape share."""

    launch: Launch
    memory: SharesMemory
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
    fn = (count, n * channels) if count else None
    memory = SharesMemory(tokens, n, chunks if merges else 0, fn, ranges)
    return StreamsPlan(launch, memory, options["BLOCK_C"], ranges)


def streams_backward(
    x: Tensor,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    fn: Tensor | None,
    dx_next: Tensor | None,
    du: Tensor | None,
    numbers: Part | None,
    planes: Part | None,
) -> tuple[Tensor, Tensor | None, Shares]:
    """dx, df and the shares of (dpost, dcomb, dfn), by the kernel for every GPU."""
    tokens, n, channels = sizes(x)
    f, post, comb = merge or (None, None, None)
    count, width = (0, 1) if fn is None else (fn.shape[0], numbers.shape[1])
    merges, has_dx = merge is not None, dx_next is not None
    plan = streams_plan(tokens, n, channels, count, width, x.dtype, x.device, merges, has_dx)
    dx = torch.empty_like(x)
    df = torch.empty_like(f) if merge else None
    dposts, dcombs, dfns = plan.memory.allocate(x)
    if tokens:
        plan.launch(
            x, f, post, comb, fn, dx_next, du, numbers, planes, dx, df, dposts, dcombs, dfns
        )
    return dx, df, Shares(dposts, dcombs, dfns, plan.channels, plan.ranges, 0, 1)
