"""Sums of partial results."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error

from megatron_mhc.kernels import launch


@pytest.mark.parametrize("parts", [1, 3, 17])
def test_reduce(parts):
    partial = torch.randn(parts, 5, 132)
    assert relative_error(launch.reduce(partial, 4), partial.double().sum(0)) < 1e-6
