"""Shares of gradients that a launch for the gradient of the streams leaves to sum."""

from typing import NamedTuple

import torch
from torch import Tensor

from .workspace import Part, Workspace


class Shares(NamedTuple):
    """What is left to sum: dpost [chunks, T, n], dcomb [chunks, T, n, n], dfn [most, count, nC].

    A block of ``channels`` channels has ``ranges`` shares of dfn, and one of each piece in which
    its ``rest`` tiles lie, where those of all blocks, block after block, were cut into pieces of
    ``work``: ``most`` or fewer together.
    """

    dpost: Tensor | Part | None
    dcomb: Tensor | Part | None
    dfn: Tensor | Part | None
    channels: int
    ranges: int
    rest: int
    work: int


class SharesMemory:
    """Where shares lie.

    Args:
        chunks: blocks of channels that have shares of dpost and dcomb, 0 without a merge.
        fn: the shape of fn, None without a mapping. most: see Shares.
    """

    def __init__(
        self, tokens: int, n: int, chunks: int, fn: tuple[int, int] | None, most: int
    ) -> None:
        self._merges, self._fn = chunks > 0, fn
        # A single share is the gradient itself, which others may keep.
        self._sums_fn = most > 1
        self._empty = not tokens
        shapes = [(chunks, tokens, n), (chunks, tokens, n, n)] if chunks else []
        if fn and self._sums_fn:
            shapes.append((most, *fn))
        self._workspace = Workspace(*((shape, torch.float32) for shape in shapes))

    def allocate(self, like: Tensor) -> tuple[Part | None, Part | None, Tensor | Part | None]:
        """dpost, dcomb and dfn of Shares on the device of ``like``, each None if there is none."""
        parts = self._workspace.allocate(like) if self._merges or self._sums_fn else []
        dpost, dcomb = parts[:2] if self._merges else (None, None)
        if self._fn is None:
            return dpost, dcomb, None
        if self._sums_fn:
            return dpost, dcomb, parts[-1]
        make = torch.zeros if self._empty else torch.empty
        return dpost, dcomb, make((1, *self._fn), dtype=torch.float32, device=like.device)
