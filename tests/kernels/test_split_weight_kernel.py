"""fn as bf16 hi and lo."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error

from megatron_mhc.kernels import launch


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("count", [4, 24])
def test_planes_keep_sixteen_bits_and_pad_with_zeros(dtype, count):
    weight = torch.randn(count, 40)
    rows = launch.padded_rows(count)
    planes = launch.split_weight(weight, dtype).view(-1, rows, 40).float().sum(0)
    assert relative_error(planes[:count], weight) < 2**-16
    assert not planes[count:].any()
