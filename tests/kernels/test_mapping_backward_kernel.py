"""The gradient of pre and of the mappings: what a token hands to the gradient of its streams."""

import interpreter  # noqa: F401
import torch
from kernel_checks import relative_error, streams_inputs

from megatron_mhc.kernels import launch, launch_backward, reference


def test_numbers_of_a_token():
    x, f, post, comb, fn, scale, base = streams_inputs((13,), 4, 72, torch.float32)
    mapping = (fn, scale, base)
    u, post_next, comb_next, _, m, r = launch.forward(x, None, mapping, 20, 1e-6, 1e-6)
    grads = [torch.randn_like(tensor) for tensor in (u, post_next, comb_next)]
    *formed, parts = launch_backward.mapping_backward(
        (f, post, comb), mapping, (x, m, r), tuple(grads), 20, 1e-6
    )
    numbers, planes = (part.tensor() for part in formed)

    # dz, the gradient of fn @ vec(X), by autograd in float64 through the sum that m is made from.
    flat = x.double().flatten(1)
    z = (flat @ fn.double().T).requires_grad_()
    root = torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    scales = scale.double().repeat_interleave(torch.tensor([4, 4, 16]))
    logits = root * z * scales + base.double()
    pre = torch.sigmoid(logits[:, :4]) + 1e-6
    outputs = (
        torch.einsum("ti,tic->tc", pre, x.double()),
        2 * torch.sigmoid(logits[:, 4:8]),
        reference.sinkhorn(logits[:, 8:].view(-1, 4, 4), 20, 1e-6),
    )
    (dz,) = torch.autograd.grad(outputs, z, [grad.double() for grad in grads])

    assert relative_error(numbers[:, :24], dz) < 2e-5
    assert not numbers[:, 24:32].any()
    assert torch.equal(numbers[:, 32:36], post)
    assert torch.equal(numbers[:, 36:52], comb.flatten(1))
    assert relative_error(numbers[:, 52:56], pre.detach()) < 2e-6
    # d rsqrt(mean(X^2) + eps): the share of every element of X is this times the element.
    coefficient = -(root.squeeze(1) ** 2) * (dz * z.detach()).sum(1) / flat.shape[1]
    assert relative_error(numbers[:, 56:58].sum(1), coefficient) < 2e-5
    hi_and_lo = planes.float().view(-1, 2, 32).sum(1)
    assert relative_error(hi_and_lo[:, :24], numbers[:, :24]) < 2**-15
    dl = dz / (root * scales)
    pre_sums, rest_sums = (part.tensor().sum(1) for part in parts)
    dbase = torch.cat([pre_sums[:4], rest_sums[:20]])
    assert relative_error(dbase, dl.sum(0)) < 2e-5
    of_scale = (dl * (root * z.detach())).sum(0).split([4, 4, 16])
    dscale = torch.cat([pre_sums[4:], rest_sums[20:]])
    assert relative_error(dscale, torch.stack([part.sum() for part in of_scale])) < 2e-5
