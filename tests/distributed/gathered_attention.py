"""A core attention for context parallelism on a CPU, where Megatron has none.

Megatron is imported here: only after ``megatron_mhc.environment.prepare()``.
"""

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor


class GatheredAttention(torch.nn.Module):
    """Causal attention of this rank's queries over the keys and values of all ranks.

    Takes the arguments of Megatron's DotProductAttention, and uses none.
    """

    def __init__(self, *unused, **unused_too) -> None:
        super().__init__()
        self._group = parallel_state.get_context_parallel_group()

    def _positions(self, length: int) -> Tensor:
        """Where the tokens of all ranks stand in the sequence, [ranks, length].

        Rank r of c has the parts r and 2 c - 1 - r of 2 c: in a causal mask all have as much to do.
        """
        ranks = self._group.size()
        parts = torch.arange(ranks * length).view(2 * ranks, -1)
        return torch.cat([parts[:ranks], parts[ranks:].flip(0)], dim=1)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *unused, **unused_too) -> Tensor:
        """Attention of [s, b, heads, channels], s on this rank, to [s, b, heads * channels]."""
        key, value = (
            gather_from_sequence_parallel_region(part, group=self._group) for part in (key, value)
        )
        positions = self._positions(len(query))
        seen = positions[self._group.rank(), :, None] >= positions.flatten()
        output = torch.nn.functional.scaled_dot_product_attention(
            *(part.permute(1, 2, 0, 3) for part in (query, key, value)),
            attn_mask=seen,
            enable_gqa=True,
        )
        return output.permute(2, 0, 1, 3).flatten(2)
