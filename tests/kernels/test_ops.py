"""Every operator by Triton's interpreter, outputs and all gradients, against float64."""

from contextlib import nullcontext
from types import SimpleNamespace

import interpreter  # noqa: F401  (first: it mends the interpreter)
import pytest
import torch
from kernel_checks import OPTIONS, TOLERANCE, errors, operators, run, streams_inputs

from megatron_mhc import kernels
from megatron_mhc.kernels import launch, launch_backward, launch_post_pre_hopper, operator

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


@pytest.mark.parametrize("name", ["pre", "post_pre", "head", "post_head"])
@pytest.mark.parametrize(("tokens", "channels"), [((3, 11), 72), ((1,), 8), ((37,), 264)])
def test_on_hopper_it_equals_float64(hopper_on_cpu, monkeypatch, name, tokens, channels):
    """The forward pass by the kernel in Gluon, and unless it ends the streams their gradient."""
    launcher = hopper_on_cpu(0, 7)
    for module in (launch, launch_backward):
        monkeypatch.setattr(module, "serves_hopper", lambda x, f, n: True)
    monkeypatch.setattr(launch_post_pre_hopper, "pays", lambda *_: True)
    function, at = case(name, 4)
    draw = lambda: [streams_inputs(tokens, 4, channels, torch.bfloat16)[i] for i in at]  # noqa: E731
    # Within twice PyTorch's errors in the same types, as on a GPU.
    ours, theirs = errors(function, draw, draws=6)
    for error, reference in zip(ours, theirs):
        assert error < max(2e-5, 2 * reference)
    assert "post_pre_hopper_kernel" in launcher.ran
    gradients = {"post_pre": "streams_backward_hopper_kernel", "pre": "pre_backward_hopper_kernel"}
    for operator_name, kernel in gradients.items():
        assert (kernel in launcher.ran) is (name == operator_name)


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused(name):
    """It would be that of a constant."""
    function, at = case(name, 4)
    x, *others = (streams_inputs((3,), 4, 8, torch.float32)[i].requires_grad_() for i in at)
    loss = function(x, *others, backend="triton")[0].square().sum()
    with pytest.raises(RuntimeError, match="create_graph=True.*backend='torch' has one"):
        torch.autograd.grad(loss, x, create_graph=True)


def test_functorchs_transforms_are_refused():
    """Not run on their wrappers, which are of Tensor's own type."""
    x, f, post, comb, *_ = streams_inputs((3,), 4, 8, torch.float32)

    def loss(x):
        return kernels.mhc_post(x, f, post, comb, backend="triton").sum()

    with pytest.raises(RuntimeError, match="functorch transforms .* must override the setup_conte"):
        torch.func.grad(loss)(x)


def test_it_runs_on_the_streams_device(monkeypatch):
    """Not on the current one."""
    taken = []

    def note(tensor):
        taken.append(tensor)
        return tensor

    elsewhere = SimpleNamespace(get_device=lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "device", lambda device: taken.append(device) or nullcontext())
    operator.on_its_device(note)(elsewhere)
    here = SimpleNamespace(get_device=lambda: 0)
    operator.on_its_device(note)(here)
    assert taken == [1, elsewhere, here]


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
