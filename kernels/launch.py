"""Grids, block sizes and scratch memory of the mHC kernels; tensors here are contiguous.

Block sizes are a fixed table, not a search: every rank chooses the same, and a new shape costs one
compilation. Token counts are plain run-time arguments, so a new one costs none.
"""

import math
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from .aggregate_kernel import aggregate_kernel
from .hopper import serves_hopper
from .merge_map_kernel import merge_map_kernel
from .run_kernel import Launch
from .split_weight_kernel import split_weight_kernel

# One entry a kernel: block sizes, warps and tiles in flight for n = 4 and bf16 streams
# (docs/kernels.md). maxnreg makes room for a second block on a multiprocessor.
CONFIGS = {
    "merge": {"BLOCK_T": 4, "BLOCK_C": 512, "num_warps": 8, "num_stages": 1, "STAGES": 1},
    "map": {"BLOCK_T": 64, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1, "STAGES": 3},
    "aggregate": {"BLOCK_C": 2048, "num_warps": 4, "num_stages": 1},
    "replay": {"BLOCK_C": 1024, "num_warps": 4, "num_stages": 1},
    "aggregate_backward": {"BLOCK_C": 2048, "num_warps": 4, "num_stages": 1},
    "streams": {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1, "STAGES": 3},
    "post_streams": {
        "BLOCK_T": 32,
        "BLOCK_C": 64,
        "num_warps": 8,
        "num_stages": 1,
        "STAGES": 2,
        "maxnreg": 128,
    },
}
# Shapes whose launches are kept ready.
PLANS = 256
# Tokens of one block of aggregate_kernel that computes mappings.
MAPPING_BLOCK = 8
# Blocks of merge_map_kernel and of streams_backward_kernel (with and without a mapping) that one
# multiprocessor holds.
MAP_RESIDENT = 1
STREAMS_RESIDENT = 1
POST_STREAMS_RESIDENT = 2
# Shared memory of a block where three tiles of the large kernels are in flight.
STAGED_MEMORY = 220 * 1024


def config(name: str, n: int, dtype: torch.dtype, device: torch.device) -> dict:
    """Block sizes of kernel ``name`` for n streams: fewer channels where more must be held."""
    options = dict(CONFIGS[name])
    if options["STAGES"] == 3 and (n > 4 or shared_memory(device) < STAGED_MEMORY):
        options["STAGES"] = 1
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
def shared_memory(device: torch.device) -> int:
    """Bytes of shared memory that a block may have on ``device``."""
    if device.type != "cuda":
        return STAGED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """Multiprocessors of ``device``; the interpreter on a CPU stands for a small one."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def cdiv(a: int, b: int) -> int:
    """a / b rounded up; triton.cdiv costs microseconds outside a kernel."""
    return -(-a // b)


@lru_cache
def padded_rows(count: int) -> int:
    """Rows of fn as the matrix units take them."""
    return max(16, triton.next_power_of_2(count))


def sizes(x: Tensor) -> tuple[int, int, int]:
    """(tokens, n, C) of streams x [..., n, C]."""
    *lead, n, channels = x.shape
    return math.prod(lead), n, channels


@lru_cache
def splitting(count: int, width: int, dtype: torch.dtype) -> tuple[tuple[int, int], Launch]:
    """Shape of split_weight's planes, and its launch."""
    rows = padded_rows(count)
    planes = 2 if dtype == torch.bfloat16 else 1
    block = 1024
    launch = Launch(
        split_weight_kernel,
        (rows, cdiv(width, block)),
        K=width,
        COUNT=count,
        ROWS=rows,
        PLANES=planes,
        BLOCK=block,
    )
    return (planes * rows, width), launch


def split_weight(fn: Tensor, dtype: torch.dtype) -> Tensor:
    """fn [count, K] as planes for streams of ``dtype``: bf16 hi and lo, else one of float32."""
    shape, launch = splitting(*fn.shape, dtype)
    out = fn.new_empty(*shape, dtype=torch.bfloat16 if dtype == torch.bfloat16 else torch.float32)
    launch(fn, out)
    return out


class ForwardPlan(NamedTuple):
    """What all forward passes of one shape share."""

    merge_map: Launch
    aggregate: Launch | None
    rows: int
    splits: int


@lru_cache(PLANS)
def forward_plan(
    tokens: int,
    n: int,
    channels: int,
    count: int,
    dtype: torch.dtype,
    device: torch.device,
    merges: bool,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> ForwardPlan:
    """For tokens, and ``count`` mappings of each or none."""
    options = config("map" if count else "merge", n, dtype, device)
    tiles = cdiv(tokens, options["BLOCK_T"])
    steps = cdiv(channels, options["BLOCK_C"])
    rows, splits = padded_rows(count), 1
    if count:
        splits, steps = pieces(steps, tiles, MAP_RESIDENT * multiprocessors(device))
    merge_map = Launch(
        merge_map_kernel,
        (tiles, splits),
        (tokens, steps),
        N=n,
        C=channels,
        COUNT=max(1, count),
        ROWS=rows,
        PLANES=2 if count and dtype == torch.bfloat16 else 1,
        MERGE=merges,
        MAP=count > 0,
        PRECISION="tf32x3",
        **options,
    )
    if not count:
        return ForwardPlan(merge_map, None, rows, splits)
    options = walk("aggregate", channels)
    map_programs = cdiv(tokens, MAPPING_BLOCK)
    aggregate = Launch(
        aggregate_kernel,
        (map_programs + cdiv(tokens, options["BLOCK_T"]),),
        (tokens, splits, map_programs, eps, norm_eps),
        N=n,
        C=channels,
        ROWS=rows,
        HEAD=count == n,
        ITERATIONS=iterations,
        BLOCK_M=MAPPING_BLOCK,
        **options,
    )
    return ForwardPlan(merge_map, aggregate, rows, splits)


def forward(
    x: Tensor,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor] | None,
    iterations: int = 1,
    eps: float = 0.0,
    norm_eps: float = 0.0,
) -> tuple[Tensor, ...]:
    """x [..., n, C], merged with (f, post, comb) if given, then mapped with (fn, scale, base).

    Returns:
        (x_next,) with a merge, then (u, post, comb, pre, m, r) with a mapping; post and comb are
        empty for the head, whose fn has n rows.
    """
    tokens, n, channels = sizes(x)
    if mapping and tokens and serves_hopper(x, merge and merge[0], n):
        # Gluon, which other GPUs need not have.
        from .launch_post_pre_hopper import pays, post_pre_hopper

        if pays(channels, x.device):
            return post_pre_hopper(x, merge, mapping, iterations, eps, norm_eps)
    f, post, comb = merge or (None, None, None)
    fn, scale, base = mapping or (None, None, None)
    count = fn.shape[0] if mapping else 0
    x_next = torch.empty_like(x) if merge else None
    products = squares = planes = None
    if tokens:
        merges = merge is not None
        plan = forward_plan(
            tokens, n, channels, count, x.dtype, x.device, merges, iterations, eps, norm_eps
        )
        if mapping:
            planes = split_weight(fn, x.dtype)
            products = fn.new_empty(plan.splits, tokens, plan.rows)
            squares = fn.new_empty(plan.splits, tokens)
        plan.merge_map(x, f, post, comb, planes, x_next, products, squares)
    if not mapping:
        return (x_next,)

    lead = x.shape[:-2]
    kept = (0,) if count == n else lead
    u = x.new_empty(*lead, channels)
    pre, m, r = fn.new_empty(*lead, n), fn.new_empty(*lead, count), fn.new_empty(lead)
    post_next, comb_next = fn.new_empty(*kept, n), fn.new_empty(*kept, n, n)
    if tokens:
        mapped = x_next if merge else x
        plan.aggregate(mapped, products, squares, scale, base, u, pre, m, r, post_next, comb_next)
    outputs = (u, post_next, comb_next, pre, m, r)
    return (x_next, *outputs) if merge else outputs


@lru_cache
def pieces(units: int, programs: int, slots: int) -> tuple[int, int]:
    """How many pieces ``units`` steps of ``programs`` programs are cut into, and units a piece.

    The count whose last wave of blocks leaves the fewest of ``slots`` idle; fewer pieces on a tie,
    since each writes a partial result.
    """
    best = max(
        range(1, min(units, 16) + 1),
        key=lambda count: count * programs / (cdiv(count * programs, slots) * slots) - 0.01 * count,
    )
    size = cdiv(units, best)
    return cdiv(units, size), size
