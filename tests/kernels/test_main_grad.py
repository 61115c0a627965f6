"""Gradients added to Megatron's main_grad by the kernel, against its hook that adds them."""

import subprocess
import sys
from pathlib import Path

import interpreter  # noqa: F401  (first: it mends the interpreter)
import pytest
import torch
from kernel_checks import OPTIONS, streams_inputs

from megatron_mhc import kernels

MAPPED = ("pre", "post_pre", "head", "post_head")
TOKENS, N, CHANNELS = (34,), 4, 24


def call(name, inputs, parameters, **options):
    if name.endswith("pre"):
        options = {**OPTIONS, **options}
    function = getattr(kernels, f"mhc_{name}")
    outputs = function(*inputs, *parameters, **{"backend": "triton", **options})
    return outputs if isinstance(outputs, tuple) else (outputs,)


def make_parameters(name, dtype):
    """fn, scale and base as Megatron's DDP leaves them: main_grad in one buffer, and its hook."""
    *_, fn, scale, base = streams_inputs((1,), N, CHANNELS, dtype)
    if name.endswith("head"):
        fn, scale, base = fn[:N], scale[:1], base[:N]
    parameters = [torch.nn.Parameter(value.clone()) for value in (scale, fn, base)]
    buffer = torch.zeros(1 + sum(parameter.numel() for parameter in parameters))
    start = 1
    for parameter in parameters:
        parameter.main_grad = buffer[start:][: parameter.numel()].view_as(parameter)
        parameter.grad_added_to_main_grad = False
        parameter.hook_ran = 0
        parameter.register_post_accumulate_grad_hook(hook)
        start += parameter.numel()
    return parameters[1], parameters[0], parameters[2]


def hook(parameter):
    """What distributed_data_parallel.py does once in every micro-batch."""
    zeros = getattr(parameter, "zero_out_wgrad", False)
    if not parameter.grad_added_to_main_grad or zeros:
        parameter.main_grad.add_(parameter.grad)
    parameter.grad = None
    parameter.hook_ran += 1


def backward(name, parameters, dtype, **options):
    """Gradients of one micro-batch's streams."""
    inputs = streams_inputs(TOKENS, N, CHANNELS, dtype)[: 4 if name.startswith("post") else 1]
    inputs = [tensor.requires_grad_() for tensor in inputs]
    outputs = call(name, inputs, parameters, **options)
    torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
    return [tensor.grad for tensor in inputs]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", MAPPED)
def test_two_micro_batches_have_the_bits_of_the_hook(name, dtype):
    found = []
    for accumulate in (False, True):
        torch.manual_seed(5)
        parameters = make_parameters(name, dtype)
        grads = [
            grad
            for _ in range(2)
            for grad in backward(name, parameters, dtype, accumulate_main_grad=accumulate)
        ]
        found.append([*grads, *(parameter.main_grad for parameter in parameters)])
        for parameter in parameters:
            assert parameter.grad_added_to_main_grad is accumulate
            assert parameter.hook_ran == 2
    for returned, added in zip(*found):
        assert returned.any()
        assert torch.equal(added, returned)


def test_zeros_for_a_hook_that_adds_all_the_same():
    expected, parameters = (make_parameters("pre", torch.float32) for _ in range(2))
    for parameter, like in zip(parameters, expected):
        parameter.data.copy_(like.data)
        parameter.zero_out_wgrad = True
    for each, accumulate in ((expected, False), (parameters, True)):
        torch.manual_seed(5)
        backward("pre", each, torch.float32, accumulate_main_grad=accumulate)
    for parameter, like in zip(parameters, expected):
        assert parameter.grad_added_to_main_grad
        assert torch.equal(parameter.main_grad, like.main_grad)


def test_anomaly_mode_finds_no_nan():
    """Not in memory that nobody has written either."""
    torch.use_deterministic_algorithms(True)  # which fills it with NaN
    try:
        with torch.autograd.set_detect_anomaly(True):
            parameters = make_parameters("pre", torch.float32)
            backward("pre", parameters, torch.float32, accumulate_main_grad=True)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(parameter.main_grad.isfinite().all() for parameter in parameters)


def test_the_parameter_is_marked_whatever_saved_tensors_go_through():
    parameters = make_parameters("post_pre", torch.float32)
    with torch.autograd.graph.save_on_cpu():
        backward("post_pre", parameters, torch.float32, accumulate_main_grad=True)
    for parameter in parameters:
        assert parameter.grad_added_to_main_grad
        assert parameter.main_grad.any()


def test_autograd_gets_nothing_for_a_parameter_without_the_hook():
    parameters = make_parameters("pre", torch.float32)
    for parameter in parameters:
        parameter._post_accumulate_grad_hooks.clear()
        del parameter.grad_added_to_main_grad
    backward("pre", parameters, torch.float32, accumulate_main_grad=True)
    for parameter in parameters:
        assert parameter.grad is None
        assert parameter.main_grad.any()


def missing(fn):
    del fn.main_grad


def in_bfloat16(fn):
    fn.main_grad = fn.main_grad.bfloat16()


def sharded(fn):
    fn.main_grad = fn.main_grad[:1]


def transposed(fn):
    fn.main_grad = fn.main_grad.t().contiguous().t()


def elsewhere(fn):
    fn.main_grad = fn.main_grad.to("meta")


def fsdp(fn):
    fn.__fsdp_param__ = True


@pytest.mark.parametrize("change", [missing, in_bfloat16, sharded, transposed, elsewhere, fsdp])
def test_gradients_are_returned_where_one_cannot_be_added(change):
    parameters = make_parameters("pre", torch.float32)
    plain = [torch.nn.Parameter(parameter.data) for parameter in parameters]
    for parameter in parameters:
        parameter._post_accumulate_grad_hooks.clear()
    change(parameters[0])
    for each, accumulate in ((plain, False), (parameters, True)):
        torch.manual_seed(5)
        backward("pre", each, torch.float32, accumulate_main_grad=accumulate)
    for parameter, like in zip(parameters, plain):
        assert not parameter.grad_added_to_main_grad
        assert torch.equal(parameter.grad, like.grad)
    assert not any(parameter.main_grad.any() for parameter in parameters[1:])


def test_a_frozen_parameter_keeps_its_main_grad():
    fn, scale, base = make_parameters("pre", torch.float32)
    fn.requires_grad_(False)
    backward("pre", (fn, scale, base), torch.float32, accumulate_main_grad=True)
    assert not fn.main_grad.any()
    assert scale.main_grad.any()
    assert base.main_grad.any()


def test_pytorch_returns_its_gradients():
    parameters = make_parameters("pre", torch.float32)
    options = {"accumulate_main_grad": True, "backend": "torch"}
    backward("pre", parameters, torch.float32, **options)
    for parameter in parameters:
        assert not parameter.grad_added_to_main_grad
        assert parameter.main_grad.any()


def test_tracing_returns_gradients():
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode():
        x, *_ = streams_inputs((3,), N, CHANNELS, torch.float32)
        parameters = make_parameters("pre", torch.float32)
        outputs = call("pre", [x], parameters, accumulate_main_grad=True)
        grads = torch.autograd.grad([output.sum() for output in outputs], parameters)
    for parameter, grad in zip(parameters, grads):
        assert grad.shape == parameter.shape
        assert not parameter.grad_added_to_main_grad


def test_compiled_code_adds_too():
    """In a process of its own: the CPU stand-ins of other tests turn torch.compile off."""
    code = """
import torch
from kernel_checks import streams_inputs
from test_main_grad import call, make_parameters
parameters = make_parameters("pre", torch.float32)
x = streams_inputs((5,), 4, 24, torch.float32)[0]
compiled = torch.compile(call, backend="eager")
u, post, comb = compiled("pre", [x], parameters, accumulate_main_grad=True)
(u.sum() + post.sum() + comb.square().sum()).backward()
assert all(parameter.grad_added_to_main_grad for parameter in parameters)
assert all(parameter.main_grad.any() for parameter in parameters)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
