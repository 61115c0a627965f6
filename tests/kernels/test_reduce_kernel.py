"""Sums of shares, whatever their number."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error

from megatron_mhc.kernels import launch_backward


@pytest.mark.parametrize("parts", [1, 3, 17])
def test_every_share_is_summed(parts):
    tokens, n, channels, count = 5, 4, 8, 24
    x = torch.empty(tokens, n, channels)
    merge = (x[:, 0], torch.empty(tokens, n), torch.empty(tokens, n, n))
    mapping = (torch.empty(count, n * channels), torch.empty(3), torch.empty(count))
    shares = [torch.randn(parts, *like.shape) for like in (*merge[1:], mapping[0])]
    mapping_parts = torch.randn(parts, 2, count)
    ours = launch_backward.reduce(tuple(shares), mapping_parts, merge, mapping, x)
    scale = mapping_parts[:, 1].double().sum(0)
    exact = [share.double().sum(0) for share in shares]
    exact += [torch.stack([scale[:4].sum(), scale[4:8].sum(), scale[8:].sum()])]
    exact += [mapping_parts[:, 0].double().sum(0)]
    for a, b in zip(ours, exact):
        assert relative_error(a, b) < 1e-6
