"""The aggregation and the mappings that come out beside it, against float64."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error, streams_inputs

from megatron_mhc.kernels import launch, reference


@pytest.mark.parametrize("n", [2, 4])
@pytest.mark.parametrize("channels", [8, 520])
def test_aggregation_and_mappings(n, channels):
    x, _, _, _, fn, scale, base = streams_inputs((19,), n, channels, torch.float32)
    u, post, comb, *_ = launch.forward(x, None, (fn, scale, base), 20, 1e-6, 1e-6)
    doubles = [tensor.double() for tensor in (x, fn, scale, base)]
    exact = reference.mhc_pre(*doubles, iterations=20, eps=1e-6, norm_eps=1e-6)
    for ours, theirs in zip((u, post, comb), exact):
        assert relative_error(ours, theirs) < 2e-6


def test_head_has_no_post_and_comb():
    x, _, _, _, fn, scale, base = streams_inputs((5,), 4, 24, torch.float32)
    u, post, comb, *_ = launch.forward(x, None, (fn[:4], scale[:1], base[:4]), 1, 1e-6, 1e-6)
    doubles = [tensor.double() for tensor in (x, fn[:4], scale[:1], base[:4])]
    assert relative_error(u, reference.mhc_head(*doubles, eps=1e-6, norm_eps=1e-6)) < 2e-6
    assert post.shape == (0, 4)
    assert comb.shape == (0, 4, 4)
