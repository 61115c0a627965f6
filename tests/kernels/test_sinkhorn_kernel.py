"""Sinkhorn in Triton: doubly stochastic, and differentiated through every iteration."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error

from megatron_mhc import kernels


@pytest.mark.parametrize(("n", "iterations"), [(2, 20), (4, 1), (4, 20), (8, 3)])
@pytest.mark.parametrize("std", [0.1, 30.0])
def test_sinkhorn_and_gradient_equal_float64(n, iterations, std):
    logits = std * torch.randn(5, n, n)
    weight = torch.randn(5, n, n)
    results = []
    for tensor, backend in ((logits, "triton"), (logits.double(), "torch"), (logits, "torch")):
        leaf = tensor.clone().requires_grad_()
        matrix = kernels.sinkhorn(leaf, iterations, backend=backend)
        (grad,) = torch.autograd.grad(matrix, leaf, weight.to(tensor.dtype))
        results.append((matrix.detach(), grad))
    ours, exact, theirs = results
    for a, b, c in zip(ours, exact, theirs):
        assert relative_error(a, b) < max(1e-5, 2 * relative_error(c, b))
    for dim in (-1, -2):
        assert (ours[0].sum(dim) - exact[0].sum(dim)).abs().max() < 1e-5
