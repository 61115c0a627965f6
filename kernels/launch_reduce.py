"""Launch that sums the shares of gradients. Tensors are contiguous."""

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import PLANS, cdiv, sizes
from .reduce_kernel import reduce_kernel
from .run_kernel import Launch
from .shares import Shares
from .workspace import Part

# Columns and shares that one program of reduce_kernel sums at a time, the same of d fn, which has
# few shares, and shares of base and scale.
REDUCE_BLOCK, REDUCE_SHARES = 256, 32
REDUCE_FN_BLOCK, REDUCE_FN_SHARES = 512, 4
REDUCE_ROWS = 2048


class MappingParts(NamedTuple):
    """Shares of the gradients of base, then scale: of pre's [n + 1, blocks], and of post's and
    comb's [count - n + 2, programs].
    """

    pre: Tensor | Part
    rest: Tensor | Part


@lru_cache(PLANS)
def reduction(
    tokens: int,
    n: int,
    channels: int,
    count: int,
    parts: tuple[int, int, int, int],
    cut: tuple[int, int, int, int],
    sums_fn: bool,
    adds: bool,
) -> Launch | None:
    """reduce_kernel's, or None if there is nothing to sum.

    Args:
        count: mappings a token, 0 without.
        parts: how many of d fn; of d post and d comb, 0 without a merge; of pre's mappings; of
            post's and comb's.
        cut: how d fn was, the last four of Shares.
        sums_fn: whether d fn has more than one share. adds: to what is in ``main_grad``.
    """
    most, chunks, pre_programs, programs = parts
    cut_channels, ranges, rest, work = cut
    merges = chunks > 0
    segments = 0 if not count else 1 if count == n else 3
    comb_blocks = cdiv(tokens * n * n, REDUCE_BLOCK) if merges else 0
    post_blocks = cdiv(tokens * n, REDUCE_BLOCK) if merges else 0
    fn_blocks = cdiv(count * n * channels, REDUCE_FN_BLOCK) if sums_fn else 0
    grid = comb_blocks + post_blocks + fn_blocks + count + segments
    if not grid:
        return None
    return Launch(
        reduce_kernel,
        (grid,),
        (
            tokens,
            most,
            ranges,
            rest,
            work,
            chunks,
            pre_programs,
            programs,
            comb_blocks,
            post_blocks,
        ),
        N=n,
        C=channels,
        CHANNELS=cut_channels,
        COUNT=count,
        SEGMENTS=segments,
        MERGE=merges,
        BLOCK_S=REDUCE_SHARES,
        BLOCK=REDUCE_BLOCK,
        FN_BLOCK_S=REDUCE_FN_SHARES,
        FN_BLOCK=REDUCE_FN_BLOCK,
        ROWS=REDUCE_ROWS,
        ADD=adds,
        num_warps=4,
        num_stages=1,
    )


def reduce(
    shares: Shares,
    mapping_parts: MappingParts | None,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor] | None,
    x: Tensor,
    main_grads: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor | None, ...]:
    """(dpost, dcomb, dfn, dscale, dbase) from their shares, in one launch and a fixed order.

    With ``main_grads`` the last three are None: each sum is added there, in one addition.
    """
    tokens, n, channels = sizes(x)
    dposts, dcombs, dfns, *cut = shares
    pre_parts, rest_parts = mapping_parts or (None, None)
    dpost = dcomb = dfn = dscale = dbase = None
    most = chunks = count = pre_programs = programs = 0
    if merge:
        _, post, comb = merge
        dpost, dcomb = torch.empty_like(post), torch.empty_like(comb)
        chunks = dposts.shape[0]
    if mapping:
        fn, scale, base = mapping
        count, most = fn.shape[0], dfns.shape[0]
        pre_programs, programs = pre_parts.shape[1], rest_parts.shape[1]
        if main_grads:
            dfn, dscale, dbase = main_grads
        else:
            dfn = dfns[0] if most == 1 else torch.empty_like(fn)
            dscale, dbase = torch.empty_like(scale), torch.empty_like(base)
    adds = main_grads is not None
    parts = (most, chunks, pre_programs, programs)
    sums_fn = adds or most > 1
    launch = reduction(tokens, n, channels, count, parts, tuple(cut), sums_fn, adds)
    if launch:
        launch(dfns, dfn, dposts, dpost, dcombs, dcomb, pre_parts, rest_parts, dscale, dbase)
    if main_grads:
        return dpost, dcomb, None, None, None
    return dpost, dcomb, dfn, dscale, dbase
