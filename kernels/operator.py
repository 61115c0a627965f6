"""Operators in two forms: torch.library's for tracing, a plain autograd function for eager mode."""

from collections.abc import Callable

import torch
from torch import Tensor


def operator(
    name: str, fake: Callable, save: Callable | None = None, grad: Callable | None = None
) -> Callable[[Callable], Callable]:
    """Decorates the implementation of ``mhc::name``, whose arguments are annotated.

    torch.compile and export see the operator of torch.library. Eager calls take a
    torch.autograd.Function of the same functions, or the implementation itself: with a host as slow
    as a GPU's, the Python of torch.library's wrappers is part of the step.

    Args:
        name: of the torch.library operator.
        fake: the same call on tensors without data.
        save, grad: setup_context and backward of autograd, where the operator has a gradient.
    """

    def decorate(function: Callable) -> Callable:
        traced = torch.library.custom_op(f"mhc::{name}", function, mutates_args=())
        traced.register_fake(fake)
        eager = function
        if grad is not None:
            traced.register_autograd(grad, setup_context=save)

            # Not setup_context: torch binds the signature of such a function in every call.
            def forward(ctx, *inputs):
                output = function(*inputs)
                save(ctx, inputs, output)
                return output

            members = {"forward": staticmethod(forward), "backward": staticmethod(grad)}
            eager = type(name, (torch.autograd.Function,), members).apply

        def call(*arguments):
            if torch.compiler.is_compiling() or _are_traced(arguments):
                return traced(*arguments)
            return eager(*arguments)

        return call

    return decorate


def _are_traced(arguments: tuple) -> bool:
    """Tracers hand over subclasses of Tensor, also in places where no flag says so."""
    return any(
        isinstance(argument, Tensor) and type(argument) not in (Tensor, torch.nn.Parameter)
        for argument in arguments
    )
