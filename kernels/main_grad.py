"""Megatron's ``main_grad``: gradients added to it where they are summed, not by a hook later.

Megatron's linear layers do so under ``gradient_accumulation_fusion``, and this is their protocol: a
parameter's hook adds what autograd hands it, unless ``grad_added_to_main_grad`` says that it has
been done.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def main_grads_of(parameters: Sequence[Tensor]) -> tuple[Tensor, ...] | None:
    """Where to add the gradients of float32 ``parameters``, or None: they are returned as usual.

    All of them or none: with one that has no float32 ``main_grad`` of its shape, contiguous at
    whatever address, autograd takes them all. So it does under Megatron-FSDP, whose ``main_grad``
    is overwritten, not added to.
    """
    found = tuple(getattr(parameter, "main_grad", None) for parameter in parameters)
    fits = all(map(_fits, parameters, found))
    return found if found and fits else None


def _fits(parameter: Tensor, main_grad: Tensor | None) -> bool:
    return (
        main_grad is not None
        and main_grad.dtype == torch.float32
        and main_grad.device == parameter.device
        and main_grad.shape == parameter.shape
        and main_grad.is_contiguous()
        and parameter.requires_grad
        and not hasattr(parameter, "__fsdp_param__")
    )


def mark_added(parameters: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    """Notes that gradients are in ``main_grad``; what autograd is given in their place.

    That is memory that nobody has written. A gradient has a device, and so the hook, which starts
    the reduction of a bucket, runs on autograd's thread for it and on a stream that has waited for
    the addition. It is zeros where ``zero_out_wgrad`` says that the hook adds it all the same or
    autograd looks for NaN in it, and None for a parameter without Megatron's hook.
    """
    return tuple(map(_mark, parameters))


def _mark(parameter: Tensor) -> Tensor | None:
    if not hasattr(parameter, "grad_added_to_main_grad"):
        return None
    parameter.grad_added_to_main_grad = True
    if getattr(parameter, "zero_out_wgrad", False) or torch.is_anomaly_enabled():
        return torch.zeros_like(parameter)
    return torch.empty_like(parameter)
