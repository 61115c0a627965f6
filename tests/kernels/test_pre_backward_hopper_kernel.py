"""The gradient of the streams of mhc_pre alone, against float64 and the kernel for every GPU."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error, streams_inputs

from megatron_mhc.kernels import launch_backward
from megatron_mhc.kernels.launch_backward_hopper import pre_backward_hopper
from megatron_mhc.kernels.workspace import tensor_of


@pytest.mark.parametrize("multiprocessors", [2, 7])
@pytest.mark.parametrize(("tokens", "channels"), [(1, 8), (64, 64), (150, 136), (37, 264)])
def test_gradients_of_one_pass(hopper_on_cpu, tokens, channels, multiprocessors):
    """Sizes that end inside tiles; blocks of channels whole and cut."""
    hopper_on_cpu(0, multiprocessors)
    n = 4
    x, f, _, _, fn, _, _ = streams_inputs((tokens,), n, channels, torch.bfloat16)
    du, dz = torch.randn_like(f), torch.randn(tokens, 24)
    pre, parts = torch.rand(tokens, n), torch.randn(tokens, 2)
    # What the merge would read, and what nobody has written, is not looked at.
    numbers = torch.full((tokens, 64), float("nan"))
    numbers[:, :32] = 0
    numbers[:, :24], numbers[:, 52:56], numbers[:, 56:58] = dz, pre, parts
    planes = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    planes[:, :24] = dz
    planes[:, 32:56] = dz - planes[:, :24].float()
    dx, shares = pre_backward_hopper(x, fn, du, numbers, planes)

    exact = (dz.double() @ fn.double()).view(tokens, n, channels)
    exact = exact + pre.double()[:, :, None] * du.double()[:, None]
    exact = exact + parts.double().sum(1)[:, None, None] * x.double()
    assert relative_error(dx, exact) < 5e-3
    dfn = torch.einsum("tk,tj->kj", dz.double(), x.double().flatten(1))
    # Where a block of channels has fewer shares, the rest of them is nobody's.
    assert relative_error(tensor_of(shares.dfn).nan_to_num(0.0).sum(0), dfn) < 5e-5

    plain, _, others = launch_backward.streams_backward(x, None, fn, None, du, numbers, planes)
    assert relative_error(dx, plain.double()) < 5e-3
    assert relative_error(tensor_of(others.dfn).sum(0), dfn) < 5e-5
