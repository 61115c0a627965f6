"""Operators in two forms: torch.library's for tracing, a plain autograd function for eager mode."""

from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor


def operator(
    name: str, fake: Callable, save: Callable | None = None, grad: Callable | None = None
) -> Callable[[Callable], Callable]:
    """Decorates the implementation of ``mhc::name``, whose arguments are annotated.

    torch.compile and export see the operator of torch.library. Eager calls take a
    torch.autograd.Function of the same functions, or the implementation itself: with a host as slow
    as a GPU's, the Python of torch.library's wrappers is part of the step.

    Gradients have no graph of their own: with ``create_graph`` they are refused.

    An operator with a gradient also takes ``parameters``, whose gradients its backward pass may add
    to their ``main_grad``: ``ctx.parameters`` in ``grad``. A traced graph changes none of its
    inputs, so torch.compile breaks its graph at such a call: a step of which a part returned
    gradients and another added them would lose the former (main_grad.py).

    Args:
        name: of the torch.library operator.
        fake: the same call on tensors without data.
        save, grad: setup_context and backward of autograd, where the operator has a gradient.
    """

    def decorate(function: Callable) -> Callable:
        function = on_its_device(function)
        traced = torch.library.custom_op(f"mhc::{name}", function, mutates_args=())
        traced.register_fake(fake)
        if grad is None:

            def call(*arguments):
                return traced(*arguments) if _is_tracing(arguments) else function(*arguments)

            return call

        def first_grad(ctx, *grads):
            if torch.is_grad_enabled():
                raise RuntimeError(
                    f"mhc {name}: Triton's gradient has no gradient (create_graph=True); "
                    "backend='torch' has one"
                )
            return grad(ctx, *grads)

        traced.register_autograd(first_grad, setup_context=save)

        # Not setup_context: torch binds the signature of such a function in every call.
        def forward(ctx, parameters, *inputs):
            output = function(*inputs)
            save(ctx, inputs, output)
            # Not as saved tensors: what comes through hooks on those is another Python object,
            # without the attributes that Megatron gave to the parameter.
            ctx.parameters = parameters
            return output

        def backward(ctx, *grads):
            return None, *first_grad(ctx, *grads)

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        eager = type(name, (torch.autograd.Function,), members)
        # apply without what torch does in Python before, all of it for functorch's transforms.
        apply = super(torch.autograd.Function, eager).apply
        untraced = torch.compiler.disable(eager.apply)

        def call(*arguments, parameters=()):
            if parameters and torch.compiler.is_compiling():
                return untraced(parameters, *arguments)
            if _is_tracing(arguments):
                return traced(*arguments)
            if torch._C._are_functorch_transforms_active():
                return eager.apply(parameters, *arguments)  # which says that it cannot
            return apply(parameters, *arguments)

        return call

    return decorate


def on_its_device(function: Callable) -> Callable:
    """The function, with the device of its first argument, a tensor, as the current one: Triton
    launches on that.
    """

    @wraps(function)
    def call(*arguments):
        device = arguments[0].get_device()
        if device < 0 or device == torch._C._cuda_getDevice():
            return function(*arguments)
        with torch.cuda.device(device):
            return function(*arguments)

    return call


_PLAIN = {Tensor, torch.nn.Parameter, int, float, type(None)}


def _is_tracing(arguments: tuple) -> bool:
    """Tracers hand over subclasses of Tensor, also in places where no flag says so."""
    if torch.compiler.is_compiling():
        return True
    if _PLAIN.issuperset(map(type, arguments)):
        return False
    return any(issubclass(other, Tensor) for other in set(map(type, arguments)) - _PLAIN)
