"""Launches of merge_aggregate_kernel; tensors here are [T, ...], contiguous."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .launch import cdiv, walk
from .merge_aggregate_kernel import merge_aggregate_kernel
from .run_kernel import run_kernel

Merge = tuple[Tensor, Tensor, Tensor]
"""f, post and comb."""

# Sublayers of one launch: they move 7 units each, eight would move 6.5. Each number of them is a
# kernel to compile.
SUBLAYERS = 4


def launch_replay(
    x: Tensor, merges: Sequence[Merge | None], pres: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """x_next [T, n, C] and u [T, C] of every sublayer; x_next is x where its merge is None.

    Args:
        x: [T, n, C]. merges: (f, post, comb) for every sublayer; the first may be None.
        pres: [T, n] float32 of every sublayer.
    """
    formed = []
    for first in range(0, len(pres), SUBLAYERS):
        part = slice(first, first + SUBLAYERS)
        formed += _launch(x, merges[part], pres[part])
        x = formed[-1][0]
    return formed


def _launch(
    x: Tensor, merges: Sequence[Merge | None], pres: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    tokens, n, channels = x.shape
    options = walk("replay", channels)
    if n > 4:
        options["BLOCK_C"] //= 2
    outputs = [
        (x if merge is None else torch.empty_like(x), x.new_empty((tokens, channels)))
        for merge in merges
    ]
    # What a sublayer without a merge does not have is never read; a pointer must stand there.
    f, post, comb = zip(*((x, pre, pre) if m is None else m for m, pre in zip(merges, pres)))
    x_next, u = zip(*outputs)
    if tokens:
        programs = cdiv(tokens, options["BLOCK_T"]) * cdiv(channels, options["BLOCK_C"])
        run_kernel(
            merge_aggregate_kernel,
            (programs,),
            x,
            f,
            post,
            comb,
            tuple(pres),
            x_next,
            u,
            tokens,
            N=n,
            C=channels,
            SUBLAYERS=len(pres),
            FIRST_MERGES=merges[0] is not None,
            **options,
        )
    return outputs
