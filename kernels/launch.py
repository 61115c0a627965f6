"""Grids, block sizes and scratch memory of the mHC kernels; tensors here are [T, ...], contiguous.

Block sizes are a fixed table, not a search: every rank chooses the same, and a new shape costs one
compilation. Token counts are plain run-time arguments, so a new one costs none.
"""

from functools import lru_cache

import torch
import triton
from torch import Tensor

from .aggregate_kernel import aggregate_kernel
from .hopper import serves_hopper
from .merge_map_kernel import merge_map_kernel
from .run_kernel import run_kernel
from .split_weight_kernel import split_weight_kernel

# One entry a kernel: block sizes, warps and tiles in flight for n = 4 and bf16 streams
# (docs/kernels.md). maxnreg makes room for a second block on a multiprocessor.
CONFIGS = {
    "merge": {"BLOCK_T": 4, "BLOCK_C": 512, "num_warps": 8, "num_stages": 1, "STAGES": 1},
    "map": {"BLOCK_T": 64, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1, "STAGES": 3},
    "aggregate": {"BLOCK_C": 2048, "num_warps": 4, "num_stages": 1},
    "replay": {"BLOCK_C": 1024, "num_warps": 4, "num_stages": 1},
    "aggregate_backward": {"BLOCK_C": 2048, "num_warps": 4, "num_stages": 1},
    "mapping_backward": {"BLOCK": 8, "num_warps": 1},
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
    run_kernel(
        split_weight_kernel,
        (rows, cdiv(width, block)),
        fn,
        out,
        K=width,
        COUNT=count,
        ROWS=rows,
        PLANES=planes,
        BLOCK=block,
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
        (x_next,) with a merge, then (u, post, comb, pre, m, r) with a mapping; post and comb are
        empty for the head, whose fn has n rows.
    """
    tokens, n, channels = x.shape
    if mapping and tokens and serves_hopper(x, n):
        # Gluon, which other GPUs need not have.
        from .launch_post_pre_hopper import pays, post_pre_hopper

        if pays(channels, x.device):
            return post_pre_hopper(x, merge, mapping, iterations, eps, norm_eps)
    f, post, comb = merge or (None, None, None)
    fn, scale, base = mapping or (None, None, None)
    x_next = torch.empty_like(x) if merge else None
    products = squares = planes = None
    rows, splits = 16, 1
    options = config("map" if mapping else "merge", n, x.dtype, x.device)
    tiles = cdiv(tokens, options["BLOCK_T"])
    steps = cdiv(channels, options["BLOCK_C"])
    if mapping:
        rows = padded_rows(fn.shape[0])
        planes = split_weight(fn, x.dtype)
    slots = MAP_RESIDENT * multiprocessors(x.device)
    splits, split_steps = pieces(steps, tiles, slots) if tokens and mapping else (1, steps)
    if mapping:
        products = torch.empty((splits, tokens, rows), dtype=torch.float32, device=x.device)
        squares = torch.empty((splits, tokens), dtype=torch.float32, device=x.device)
    if tokens:
        run_kernel(
            merge_map_kernel,
            (tiles, splits),
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
    pre = torch.empty((tokens, n), dtype=torch.float32, device=x.device)
    m = torch.empty((tokens, fn.shape[0]), dtype=torch.float32, device=x.device)
    r = torch.empty((tokens,), dtype=torch.float32, device=x.device)
    kept = 0 if head else tokens
    post_next = torch.empty((kept, n), dtype=torch.float32, device=x.device)
    comb_next = torch.empty((kept, n, n), dtype=torch.float32, device=x.device)
    options = walk("aggregate", channels)
    map_programs = cdiv(tokens, MAPPING_BLOCK)
    if tokens:
        run_kernel(
            aggregate_kernel,
            (map_programs + cdiv(tokens, options["BLOCK_T"]),),
            x_next if merge else x,
            products,
            squares,
            scale,
            base,
            u,
            pre,
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
