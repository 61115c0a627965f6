"""Grids, block sizes and scratch memory of the mHC kernels; tensors here are [T, ...], contiguous.

Block sizes are a fixed table, not a search: every rank chooses the same, and a new shape costs one
compilation. Token counts are plain run-time arguments, so a new one costs none.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from .aggregate_backward_kernel import aggregate_backward_kernel
from .aggregate_kernel import aggregate_kernel
from .mapping_backward_kernel import mapping_backward_kernel
from .merge_map_kernel import merge_map_kernel
from .reduce_kernel import reduce_kernel, reduce_mapping_kernel
from .split_weight_kernel import split_weight_kernel
from .streams_backward_kernel import streams_backward_kernel

# One entry a kernel: block sizes and warps for n = 4 and bf16 streams (docs/kernels.md).
CONFIGS = {
    "merge": {"BLOCK_T": 8, "BLOCK_C": 256, "num_warps": 4, "num_stages": 1},
    "map": {"BLOCK_T": 64, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1},
    "aggregate": {"BLOCK_C": 2048, "num_warps": 4, "num_stages": 1},
    "aggregate_backward": {"BLOCK_C": 2048, "num_warps": 4, "num_stages": 1},
    "mapping_backward": {"BLOCK": 8, "num_warps": 1},
    "streams": {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1},
    "post_streams": {"BLOCK_T": 8, "BLOCK_C": 128, "num_warps": 4, "num_stages": 1},
}
# Tokens of one block of aggregate_kernel that computes mappings.
MAPPING_BLOCK = 8
# Blocks of merge_map_kernel and of streams_backward_kernel that one multiprocessor holds.
MAP_RESIDENT = 1
STREAMS_RESIDENT = 1
REDUCE_BLOCK = 256


def config(name: str, n: int, dtype: torch.dtype) -> dict:
    """Block sizes of kernel ``name`` for n streams: fewer channels where more must be held."""
    options = dict(CONFIGS[name])
    if n > 4:
        options["BLOCK_C"] //= 2
    if dtype != torch.bfloat16:
        options["BLOCK_C"] //= 2
    if name == "streams" and n > 4:
        options["BLOCK_T"] //= 2
    return options


def walk(name: str, channels: int) -> dict:
    """Block sizes of a kernel that walks whole tokens: blocks that divide the channels if any."""
    options = dict(CONFIGS[name])
    size = options["BLOCK_C"]
    while size > 512 and channels % size:
        size //= 2
    return options | {"BLOCK_T": options["BLOCK_C"] // size, "BLOCK_C": size}


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of ``device``; the interpreter on a CPU stands for a small one."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def padded_rows(count: int) -> int:
    """Rows of fn as the matrix units take them."""
    return max(16, triton.next_power_of_2(count))


def split_weight(fn: Tensor, dtype: torch.dtype) -> Tensor:
    """fn [count, K] as planes for streams of ``dtype``: bf16 hi and lo, else one of float32."""
    count, width = fn.shape
    rows = padded_rows(count)
    planes = 2 if dtype == torch.bfloat16 else 1
    out = torch.empty(
        (planes * rows, width),
        dtype=torch.bfloat16 if planes == 2 else torch.float32,
        device=fn.device,
    )
    block = 1024
    split_weight_kernel[(rows, triton.cdiv(width, block))](
        fn, out, K=width, COUNT=count, ROWS=rows, PLANES=planes, BLOCK=block
    )
    return out


def forward(
    x: Tensor,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor] | None,
    iterations: int = 1,
    eps: float = 0.0,
    norm_eps: float = 0.0,
) -> tuple[Tensor, ...]:
    """x [T, n, C], merged with (f, post, comb) if given, then mapped with (fn, scale, base).

    Returns:
        (x_next,) with a merge, then (u, post, comb, m, r) with a mapping; post and comb are empty
        for the head, whose fn has n rows.
    """
    tokens, n, channels = x.shape
    f, post, comb = merge or (None, None, None)
    fn, scale, base = mapping or (None, None, None)
    x_next = torch.empty_like(x) if merge else None
    products = squares = planes = None
    rows, splits = 16, 1
    options = config("map" if mapping else "merge", n, x.dtype)
    tiles = triton.cdiv(tokens, options["BLOCK_T"])
    steps = triton.cdiv(channels, options["BLOCK_C"])
    if mapping:
        rows = padded_rows(fn.shape[0])
        planes = split_weight(fn, x.dtype)
    slots = MAP_RESIDENT * multiprocessors(x.device)
    splits, split_steps = pieces(steps, tiles, slots) if tokens and mapping else (1, steps)
    if mapping:
        products = torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
        squares = torch.empty((splits, tokens), dtype=torch.float32, device=x.device)
    if tokens:
        merge_map_kernel[(tiles, splits)](
            x,
            f,
            post,
            comb,
            planes,
            x_next,
            products,
            squares,
            tokens,
            split_steps,
            N=n,
            C=channels,
            COUNT=fn.shape[0] if mapping else 1,
            ROWS=rows,
            PLANES=planes.shape[0] // rows if mapping else 1,
            MERGE=merge is not None,
            MAP=mapping is not None,
            PRECISION="tf32x3",
            **options,
        )
    if not mapping:
        return (x_next,)

    head = fn.shape[0] == n
    u = x.new_empty((tokens, channels))
    m = torch.empty((tokens, fn.shape[0]), dtype=torch.float32, device=x.device)
    r = torch.empty((tokens,), dtype=torch.float32, device=x.device)
    kept = 0 if head else tokens
    post_next = torch.empty((kept, n), dtype=torch.float32, device=x.device)
    comb_next = torch.empty((kept, n, n), dtype=torch.float32, device=x.device)
    options = walk("aggregate", channels)
    map_programs = triton.cdiv(tokens, MAPPING_BLOCK)
    if tokens:
        aggregate_kernel[(map_programs + triton.cdiv(tokens, options["BLOCK_T"]),)](
            x_next if merge else x,
            products,
            squares,
            scale,
            base,
            u,
            m,
            r,
            post_next,
            comb_next,
            tokens,
            splits,
            map_programs,
            eps,
            norm_eps,
            N=n,
            C=channels,
            ROWS=rows,
            HEAD=head,
            ITERATIONS=iterations,
            BLOCK_M=MAPPING_BLOCK,
            **options,
        )
    outputs = (u, post_next, comb_next, m, r)
    return (x_next, *outputs) if merge else outputs


def mapping_backward(
    x: Tensor,
    mapping: tuple[Tensor, Tensor, Tensor],
    saved: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor | None, Tensor | None],
    iterations: int,
    eps: float,
) -> tuple[Tensor, ...]:
    """From the mapped streams x [T, n, C], saved (m, r) and the gradients of (u, post, comb):

    Returns:
        dz [T, count], its bf16 planes, coefficient [T] and pre [T, n] for
        :func:`streams_backward`; dscale, dbase.
    """
    tokens, n, channels = x.shape
    fn, scale, base = mapping
    m, r = saved
    du, dpost, dcomb = grads
    count = fn.shape[0]
    head = count == n
    empty = {"dtype": torch.float32, "device": x.device}
    dpre = torch.empty((tokens, n), **empty)
    dz = torch.empty((tokens, count), **empty)
    rows = padded_rows(count)
    planes = torch.empty((tokens, 2 * rows), dtype=torch.bfloat16, device=x.device)
    coefficient = torch.empty((tokens,), **empty)
    pre = torch.empty((tokens, n), **empty)
    block = CONFIGS["mapping_backward"]
    programs = triton.cdiv(tokens, block["BLOCK"])
    partial = torch.empty((programs, 2, count), **empty)
    dscale, dbase = torch.empty_like(scale), torch.empty_like(base)
    if tokens:
        options = walk("aggregate_backward", channels)
        aggregate_backward_kernel[(triton.cdiv(tokens, options["BLOCK_T"]),)](
            x, du, dpre, tokens, N=n, C=channels, **options
        )
        mapping_backward_kernel[(programs,)](
            m,
            r,
            scale,
            base,
            dpre,
            dpost,
            dcomb,
            dz,
            planes,
            coefficient,
            pre,
            partial,
            tokens,
            eps,
            N=n,
            C=channels,
            ROWS=rows,
            HEAD=head,
            ITERATIONS=iterations,
            **block,
        )
    reduce_mapping_kernel[(1,)](
        partial,
        dscale,
        dbase,
        programs,
        N=n,
        COUNT=count,
        SEGMENTS=1 if head else 3,
        COLUMNS=triton.next_power_of_2(count),
        BLOCK=256,
        num_warps=8,
    )
    return dz, planes, coefficient, pre, dscale, dbase


def pieces(units: int, programs: int, slots: int) -> tuple[int, int]:
    """How many pieces ``units`` steps of ``programs`` programs are cut into, and units a piece.

    The count whose last wave of blocks leaves the fewest of ``slots`` idle; fewer pieces on a tie,
    since each writes a partial result.
    """
    best = max(
        range(1, min(units, 16) + 1),
        key=lambda count: (
            count * programs / (triton.cdiv(count * programs, slots) * slots) - 0.01 * count
        ),
    )
    size = triton.cdiv(units, best)
    return triton.cdiv(units, size), size


def reduce(partial: Tensor, aligned: int) -> Tensor:
    """Sum of float32 ``partial`` over its first dimension, in a fixed order.

    The other dimensions hold a multiple of ``aligned`` elements, 1, 2 or 4.
    """
    if partial.shape[0] == 1:
        return partial[0]
    out = torch.empty_like(partial[0])
    if out.numel():
        reduce_kernel[(triton.cdiv(out.numel(), REDUCE_BLOCK),)](
            partial,
            out,
            partial.shape[0],
            out.numel() // aligned,
            VECTOR=aligned,
            BLOCK_S=16,
            BLOCK=REDUCE_BLOCK,
            num_stages=1,
        )
    return out


def streams_backward(
    x: Tensor,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    fn: Tensor | None,
    mapped: tuple[Tensor, Tensor, Tensor, Tensor] | None,
    dx_next: Tensor | None,
    du: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """Gradients (dx, df, dpost, dcomb, dfn); those without a part in the call are None.

    Args:
        x: [T, n, C] before the merge. merge: f, post and comb, or None.
        fn, mapped: the weight and (dz, planes, coefficient, pre) of the mapping after it, or None.
        dx_next: gradient of the merged streams, or None. du: gradient of u.
    """
    tokens, n, channels = x.shape
    f, post, comb = merge or (None, None, None)
    dz, planes, coefficient, pre = mapped or (None, None, None, None)
    count = fn.shape[0] if mapped else 1
    options = config("streams" if mapped else "post_streams", n, x.dtype)
    chunks = triton.cdiv(channels, options["BLOCK_C"])
    ranges, size = 1, 0
    empty = {"dtype": torch.float32, "device": x.device}
    dx = torch.empty_like(x)
    df = dpost = dcomb = dfn = dposts = dcombs = partial = None
    if merge:
        df = torch.empty_like(f)
        dposts = torch.empty((chunks, *post.shape), **empty)
        dcombs = torch.empty((chunks, *comb.shape), **empty)
    if tokens:
        slots = STREAMS_RESIDENT * multiprocessors(x.device)
        ranges, size = pieces(triton.cdiv(tokens, options["BLOCK_T"]), chunks, slots)
        size *= options["BLOCK_T"]
    if mapped:
        shape = (ranges, *fn.shape)
        partial = torch.empty(shape, **empty) if tokens else torch.zeros(shape, **empty)
    if tokens:
        streams_backward_kernel[(chunks, ranges)](
            x,
            f,
            post,
            comb,
            fn,
            dx_next,
            du,
            dz,
            planes,
            coefficient,
            pre,
            dx,
            df,
            dposts,
            dcombs,
            partial,
            tokens,
            size,
            N=n,
            C=channels,
            COUNT=count,
            ROWS=padded_rows(count),
            PLANES=2 if x.dtype == torch.bfloat16 else 1,
            MERGE=merge is not None,
            MAP=mapped is not None,
            HAS_DX=dx_next is not None,
            PRECISION="tf32" if x.dtype == torch.bfloat16 else "tf32x3",
            **options,
        )
    if merge:
        dpost, dcomb = reduce(dposts, min(n, 4)), reduce(dcombs, 4)
    if mapped:
        dfn = reduce(partial, 4)
    return dx, df, dpost, dcomb, dfn
