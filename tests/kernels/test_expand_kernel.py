"""One copy of the embedding a stream, and their gradients' sum."""

import interpreter  # noqa: F401
import pytest
import torch

from megatron_mhc.kernels.expand_kernel import launch_expand


@pytest.mark.parametrize("n", [2, 4, 8])
def test_copies_and_their_sum(n):
    h = torch.randn(7, 40).bfloat16()
    assert torch.equal(launch_expand(h, n, backward=False), h[:, None].expand(7, n, 40))
    grad = torch.randn(7, n, 40)
    ours = launch_expand(grad, n, backward=True)
    assert torch.allclose(ours, grad.sum(1), atol=1e-6)
