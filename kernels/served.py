"""What a call is checked for depends on shapes, dtypes and devices: it is checked once for each.

The checks and the choice of a backend take a host as long as a launch, and a training step makes
the same few calls in every layer.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from .dispatch import choose_backend

# Kinds of calls that are remembered: every token count is one.
REMEMBERED = 4096

_PLAIN = {Tensor, torch.nn.Parameter}
_served: set[tuple] = set()


def serves(
    check: Callable,
    backend: str,
    tensors: tuple[Tensor, ...],
    *options: str | float,
    residual_mixing: str = "sinkhorn",
) -> bool:
    """Whether Triton serves a call, which ``check(*tensors, *options)`` lets pass.

    What Triton serves on a GPU is remembered; everything else is checked anew in every call.

    Args:
        tensors: the streams [..., n, C] first.
        options: what else ``check`` takes, and nothing that it does not see.

    Raises:
        ValueError, RuntimeError: those of ``check`` and of :func:`choose_backend`.
    """
    kind, on_gpu = None, False
    # Tracers' shapes need not be numbers.
    if not torch.compiler.is_compiling() and _PLAIN.issuperset(map(type, tensors)):
        kinds = [(tensor.shape, tensor.dtype, tensor.get_device()) for tensor in tensors]
        kind, on_gpu = (check, backend, residual_mixing, options, *kinds), kinds[0][2] >= 0
        if kind in _served:
            return True
    check(*tensors, *options)
    n, channels = tensors[0].shape[-2:]
    chosen = choose_backend(
        backend, tensors, n=n, channels=channels, residual_mixing=residual_mixing
    )
    if chosen == "triton" and on_gpu:
        if len(_served) == REMEMBERED:
            _served.clear()
        _served.add(kind)
    return chosen == "triton"
