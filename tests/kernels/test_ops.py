"""Every operator by Triton's interpreter, outputs and all gradients, against float64."""

import interpreter  # noqa: F401  (first: it mends the interpreter)
import pytest
import torch
from kernel_checks import OPTIONS, TOLERANCE, errors, operators, run, streams_inputs

from megatron_mhc import kernels

NAMES = [name for name, _, _ in operators(4)]


def case(name, n):
    return next((function, at) for found, function, at in operators(n) if found == name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("tokens", "n", "channels", "dtype"),
    [
        ((3, 11), 4, 72, torch.bfloat16),
        ((1,), 4, 8, torch.float32),
        ((5,), 2, 136, torch.float32),
    ],
)
def test_operator_equals_float64(name, tokens, n, channels, dtype):
    function, at = case(name, n)
    inputs = streams_inputs(tokens, n, channels, dtype)
    ours, theirs = errors(function, lambda: [inputs[i] for i in at])
    for error, reference in zip(ours, theirs):
        assert error < max(TOLERANCE[dtype], 2 * reference)


def test_eight_streams():
    function, at = case("post_pre", 8)
    ours, _ = errors(function, lambda: streams_inputs((3,), 8, 24, torch.float32))
    assert max(ours) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", NAMES)
def test_no_tokens(name):
    function, at = case(name, 4)
    inputs = [streams_inputs((0,), 4, 16, torch.float32)[i] for i in at]
    outputs = function(*inputs, backend="torch")
    results = run(function, inputs, [torch.randn_like(o) for o in outputs], "triton")
    for result, like in zip(results, [*outputs, *inputs]):
        assert result.shape == like.shape
        assert not result.any()


def test_inputs_need_not_be_contiguous():
    function, _ = case("post_pre", 4)
    x, *rest = streams_inputs((6,), 4, 16, torch.float32)
    strided = torch.stack([x, x], -1)[..., 0].detach()
    apart = torch.cat([rest[0], rest[0]], 0)[6:]
    weights = [torch.randn_like(o) for o in function(x, *rest, backend="torch")]
    plain = run(function, [x, *rest], weights, "triton")
    other = run(function, [strided, apart, *rest[1:]], weights, "triton")
    for a, b in zip(plain, other):
        assert torch.equal(a, b)


def test_nan_stays_with_its_token_and_zeros_are_finite():
    x, _, _, _, *mapping = streams_inputs((3,), 4, 16, torch.float32)
    x[0] = 0
    x[1, 2, 5] = float("nan")
    for output in kernels.mhc_pre(x, *mapping, **OPTIONS, backend="triton"):
        assert output[0].isfinite().all()
        assert output[1].isnan().all()
        assert output[2].isfinite().all()


def test_unused_outputs_have_no_gradient_to_give():
    function, _ = case("post_pre", 4)
    inputs = streams_inputs((4,), 4, 16, torch.float32)
    grads = []
    for backend in ("triton", "torch"):
        leaves = [tensor.detach().requires_grad_() for tensor in inputs]
        u = function(*leaves, backend=backend)[1]
        grads.append(torch.autograd.grad(u.sum(), leaves))
    for ours, theirs in zip(*grads):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_operators_trace_without_running():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        inputs = streams_inputs((3,), 4, 16, torch.bfloat16)
        for name, function, at in operators(4):
            chosen = [inputs[i].detach().requires_grad_() for i in at]
            outputs = function(*chosen, backend="triton")
            expected = function(*chosen, backend="torch")
            assert [o.shape for o in outputs] == [o.shape for o in expected], name
            torch.autograd.grad([o.float().sum() for o in outputs], chosen)
