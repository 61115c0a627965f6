"""The Triton kernels on a GPU: fresh random inputs against float64, and what must never happen."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))

from kernel_checks import (
    OPTIONS,
    errors,
    operators,
    output_weights,
    replay_inputs,
    run,
    streams_inputs,
)

from megatron_mhc import kernels

NAMES = [name for name, _, _ in operators(4)]
DTYPES = [torch.float32, torch.bfloat16]


@pytest.fixture(autouse=True)
def _exact_reference():
    """The reference in float32 is that of IEEE products."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def case(name, n=4):
    return next((function, at) for found, function, at in operators(n) if found == name)


def cuda_inputs(name, tokens, channels, dtype, n=4, std=1.0):
    function, at = case(name, n)
    inputs = streams_inputs(tokens, n, channels, dtype, std, "cuda")
    return function, [inputs[i] for i in at]


def check(name, tokens, channels, dtype, floor, **options):
    """Errors of six draws within twice the torch reference's in ``dtype``, or under ``floor``."""
    function, _ = case(name, options.get("n", 4))
    ours, theirs = errors(
        function, lambda: cuda_inputs(name, tokens, channels, dtype, **options)[1], draws=6
    )
    for error, reference in zip(ours, theirs):
        assert error < max(floor, 2 * reference)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "channels"), [((1,), 8), ((3, 7), 264), ((517,), 1280), ((128, 2), 4096)]
)
def test_operator_equals_float64(name, dtype, tokens, channels):
    # float32: hundreds of roundings. bfloat16: products of fn in 16 bits, results in 8.
    floor = 2e-6 if dtype == torch.float32 else 2e-5
    check(name, tokens, channels, dtype, floor)


@pytest.mark.parametrize("n", [2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_other_numbers_of_streams(name, n, dtype):
    floor = 2e-6 if dtype == torch.float32 else 2e-5
    check(name, (67,), 256, dtype, floor, n=n)


@pytest.mark.parametrize("std", [0.1, 1.0, 10.0, 30.0])
def test_logits_of_every_size(std):
    # fn in tf32x3 and twenty iterations: where logits are near 100, so are the errors of exp.
    check("post_pre", (257,), 512, torch.float32, 2e-6 * max(1.0, std), std=std)


@pytest.mark.parametrize("name", NAMES)
def test_runs_are_bit_identical(name):
    function, inputs = cuda_inputs(name, (1027,), 1280, torch.bfloat16)
    weights = output_weights(function, inputs)
    first = run(function, inputs, weights, "triton")
    for _ in range(3):
        for a, b in zip(first, run(function, inputs, weights, "triton")):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", ["pre", "post_pre", "head", "post_head"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 1027])
def test_main_grad_has_the_bits_of_returned_gradients(name, dtype, tokens):
    """Two micro-batches, main_grad at whatever address."""
    inputs = streams_inputs((tokens,), 4, 1280, dtype, device="cuda")
    rows, segments = (4, 1) if name.endswith("head") else (24, 3)
    mapping = [inputs[4][:rows], inputs[5][:segments], inputs[6][:rows]]
    streams = inputs[: 4 if name.startswith("post") else 1]
    function = getattr(kernels, f"mhc_{name}")
    found = []
    for accumulate in (False, True):
        parameters = [torch.nn.Parameter(value.clone()) for value in mapping]
        for parameter in parameters:
            buffer = torch.zeros(1 + parameter.numel(), device="cuda")
            parameter.main_grad = buffer[1:].view_as(parameter)
            parameter.grad_added_to_main_grad = False
        for seed in range(2):
            torch.manual_seed(seed)
            leaves = [tensor.detach().requires_grad_() for tensor in streams]
            outputs = function(
                *leaves, *parameters, accumulate_main_grad=accumulate, backend="triton"
            )
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
            for parameter in parameters:
                assert parameter.grad_added_to_main_grad is accumulate
                if not accumulate:
                    parameter.main_grad.add_(parameter.grad)
                parameter.grad = None
        found.append([*(leaf.grad for leaf in leaves), *(p.main_grad for p in parameters)])
    for returned, added in zip(*found):
        assert returned.any()
        assert torch.equal(added, returned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("tokens", "n", "channels"),
    [((1,), 4, 8), ((3, 7), 4, 264), ((517,), 4, 1280), ((4099,), 4, 4096)]
    + [((1027,), 4, 2560), ((67,), 2, 256), ((67,), 8, 1032)],
)
def test_replay_has_the_forward_passs_bits(tokens, n, channels, dtype):
    """Compiled, another kernel than the forward pass's, yet not one bit differs."""
    x, (merges, pres), formed = replay_inputs(tokens, n, channels, 6, dtype, "triton", "cuda")
    for first, start in ((0, x), (1, x), (3, formed[2][0])):
        replayed = kernels.mhc_replay(start, merges[first:], pres[first:], backend="triton")
        for (x_next, u), (expected_x, expected_u) in zip(replayed, formed[first:], strict=True):
            assert torch.equal(x_next, expected_x)
            assert torch.equal(u, expected_u)


def test_inputs_need_not_be_contiguous():
    function, (x, *rest) = cuda_inputs("post_pre", (2, 33), 136, torch.bfloat16)
    weights = output_weights(function, [x, *rest])
    offset = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    plain = run(function, [x, *rest], weights, "triton")
    for other in (offset, swapped):
        for a, b in zip(plain, run(function, [other, *rest], weights, "triton")):
            assert torch.equal(a, b)


def test_nan_and_inf_stay_with_their_token():
    _, (x, *mapping) = cuda_inputs("pre", (64,), 256, torch.bfloat16)
    x[0] = 0
    x[1, 2, 5] = float("nan")
    x[2, 1, 7] = float("inf")
    for output in kernels.mhc_pre(x, *mapping, **OPTIONS, backend="triton"):
        assert output[0].isfinite().all()
        assert output[1].isnan().all()
        assert output[2].isnan().any()
        assert output[3:].isfinite().all()


def test_more_than_two_to_the_31_elements():
    tokens, channels = 2**31 // (4 * 4096) + 64, 4096
    x = torch.randn(tokens, 4, channels, device="cuda", dtype=torch.bfloat16)
    *_, fn, scale, base = streams_inputs((1,), 4, channels, torch.bfloat16, device="cuda")
    x.requires_grad_()
    outputs = kernels.mhc_pre(x, fn, scale, base, **OPTIONS, backend="triton")
    (dx,) = torch.autograd.grad(outputs[0].sum(), x)
    tail = x[-64:].detach().requires_grad_()
    expected = kernels.mhc_pre(tail, fn, scale, base, **OPTIONS, backend="triton")
    (dtail,) = torch.autograd.grad(expected[0].sum(), tail)
    for ours, theirs in zip((*outputs, dx), (*expected, dtail)):
        assert torch.allclose(ours[-64:].float(), theirs.float(), rtol=2e-2, atol=2e-2)


def test_a_new_token_count_compiles_nothing():
    from triton import knobs

    compiled = []
    function, at = case("post_pre")
    for tokens in (300, 1, 64, 4097):
        inputs = streams_inputs((tokens,), 4, 512, torch.bfloat16, device="cuda")
        run(function, inputs, output_weights(function, inputs), "triton")
        x, merge, pre = inputs[0], inputs[1:4], inputs[2]
        kernels.mhc_replay(x, [merge, merge], [pre, pre], backend="triton")
        if tokens == 300:
            knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name)
    knobs.runtime.jit_post_compile_hook = None
    assert not compiled


def test_auto_takes_triton():
    x, *_ = streams_inputs((2,), 4, 64, torch.bfloat16, device="cuda")
    assert kernels.choose_backend("auto", (x,), n=4, channels=64) == "triton"


def test_compiled_model_sees_the_operators():
    _, inputs = cuda_inputs("pre", (32,), 256, torch.bfloat16)

    def aggregate(*tensors):
        return kernels.mhc_pre(*tensors, **OPTIONS, backend="triton")[0]

    compiled = torch.compile(aggregate, fullgraph=True)
    assert torch.equal(compiled(*inputs), aggregate(*inputs))
