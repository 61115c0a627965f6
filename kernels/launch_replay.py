"""Launches of merge_aggregate_kernel; tensors here are contiguous."""

from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

from .launch import PLANS, cdiv, sizes, walk
from .merge_aggregate_kernel import merge_aggregate_kernel
from .run_kernel import Launch

Merge = tuple[Tensor, Tensor, Tensor]
"""f, post and comb."""

# Sublayers of one launch: they move 7 units each, eight would move 6.5. Each number of them is a
# kernel to compile.
SUBLAYERS = 4


def launch_replay(
    x: Tensor, merges: Sequence[Merge | None], pres: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """x_next [..., n, C] and u [..., C] of every sublayer; x_next is x where its merge is None.

    Args:
        x: [..., n, C]. merges: (f, post, comb) for every sublayer; the first may be None.
        pres: [..., n] float32 of every sublayer.
    """
    formed = []
    for first in range(0, len(pres), SUBLAYERS):
        part = slice(first, first + SUBLAYERS)
        formed += _launch(x, merges[part], pres[part])
        x = formed[-1][0]
    return formed


@lru_cache(PLANS)
def replay_plan(tokens: int, n: int, channels: int, sublayers: int, first_merges: bool) -> Launch:
    options = walk("replay", channels)
    if n > 4:
        options["BLOCK_C"] //= 2
    return Launch(
        merge_aggregate_kernel,
        (cdiv(tokens, options["BLOCK_T"]) * cdiv(channels, options["BLOCK_C"]),),
        (tokens,),
        N=n,
        C=channels,
        SUBLAYERS=sublayers,
        FIRST_MERGES=first_merges,
        **options,
    )


def _launch(
    x: Tensor, merges: Sequence[Merge | None], pres: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    tokens, n, channels = sizes(x)
    outputs = [
        (x if merge is None else torch.empty_like(x), x.new_empty(*x.shape[:-2], channels))
        for merge in merges
    ]
    # What a sublayer without a merge does not have is never read; a pointer must stand there.
    f, post, comb = zip(*((x, pre, pre) if m is None else m for m, pre in zip(merges, pres)))
    x_next, u = zip(*outputs)
    if tokens:
        launch = replay_plan(tokens, n, channels, len(pres), merges[0] is not None)
        launch(x, f, post, comb, tuple(pres), x_next, u)
    return outputs
