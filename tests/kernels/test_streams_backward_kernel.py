"""The gradient of the streams: merge, aggregation and mapping in one pass, against float64."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error, streams_inputs

from megatron_mhc.kernels import launch_backward
from megatron_mhc.kernels.workspace import tensor_of


@pytest.mark.parametrize("arrives", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_gradients_of_one_pass(dtype, arrives):
    tokens, n, channels = 37, 4, 72
    x, f, post, comb, fn, _, _ = streams_inputs((tokens,), n, channels, dtype)
    dx_next = torch.randn_like(x) if arrives else None
    du = torch.randn_like(f)
    dz, pre = torch.randn(tokens, 24), torch.rand(tokens, n)
    coefficient = torch.randn(tokens)
    numbers = torch.zeros(tokens, 64)
    rows = (dz, torch.zeros(tokens, 8), post, comb.flatten(1), pre, coefficient[:, None])
    numbers[:, :57] = torch.cat(rows, 1)
    hi = dz.bfloat16()
    planes = torch.zeros(tokens, 64, dtype=torch.bfloat16)
    planes[:, :24], planes[:, 32:56] = hi, (dz - hi.float()).bfloat16()
    dx, df, shares = launch_backward.streams_backward(
        x, (f, post, comb), fn, dx_next, du, numbers, planes
    )

    streams, output = x.double(), f.double()
    merged = post.double()[:, :, None] * output[:, None]
    merged = merged + torch.einsum("tio,tic->toc", comb.double(), streams)
    g = (dz.double() @ fn.double()).view(tokens, n, channels)
    g = g + pre.double()[:, :, None] * du.double()[:, None]
    g = g + coefficient.double()[:, None, None] * merged
    if arrives:
        g = g + dx_next.double()
    exact = (
        torch.einsum("tio,toc->tic", comb.double(), g),
        torch.einsum("to,toc->tc", post.double(), g),
        torch.einsum("tc,toc->to", output, g),
        torch.einsum("tic,toc->tio", streams, g),
        torch.einsum("tk,tj->kj", dz.double(), merged.to(dtype).double().flatten(1)),
    )
    tolerance = 5e-3 if dtype == torch.bfloat16 else 2e-6
    sums = (tensor_of(share).sum(0) for share in shares[:3])
    for ours, theirs in zip((dx, df, *sums), exact):
        assert relative_error(ours, theirs) < tolerance
