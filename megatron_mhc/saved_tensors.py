"""What autograd keeps of a computation: the saved tensors of its graph, in a fixed order."""

from collections.abc import Iterator, Sequence
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction


@lru_cache
def _saved_names(kind: type) -> tuple[str, ...]:
    """What PyTorch's own nodes of this type save: x where there is a ``_raw_saved_x``."""
    prefix = "_raw_saved_"
    return tuple(name.removeprefix(prefix) for name in dir(kind) if name.startswith(prefix))


def _pairs(node) -> Iterator[tuple[Tensor | None, object]]:
    """The saved tensors of one node, each with the handle that takes hooks."""
    if isinstance(node, BackwardCFunction):
        yield from zip(node.saved_tensors, node._raw_saved_tensors)
        return
    for name in _saved_names(type(node)):
        saved, raw = getattr(node, f"_saved_{name}"), getattr(node, f"_raw_saved_{name}")
        if isinstance(raw, tuple | list):
            yield from zip(saved, raw)
        else:
            yield saved, raw


def saved_between(
    outputs: Sequence[Tensor], inputs: Sequence[Tensor]
) -> Iterator[tuple[Tensor, object, bool]]:
    """Tensors that the graph from ``inputs`` to ``outputs`` saves for its backward pass.

    The same computation on the same kind of tensors gives the same sequence. Parameters are left
    out: they stay in memory anyway, and a Python object that comes through hooks is a new one,
    without the attributes (``grad_added_to_main_grad``) that Megatron's linear layers set on it.
    Scalars are left out, as autograd's own hooks leave out Python numbers.

    Yields:
        The tensor; its ``torch._C._autograd.SavedTensor``, which takes ``register_hooks``; and
        whether a ``torch.autograd.Function`` saved it, not an operation of PyTorch's own.
    """
    seen = {tensor.grad_fn for tensor in inputs} | {None}
    waiting = [tensor.grad_fn for tensor in reversed(outputs)]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        of_function = isinstance(node, BackwardCFunction)
        for tensor, raw in _pairs(node):
            if tensor is None or not tensor.dim():
                continue
            # A plain tensor is no parameter, and isinstance of one is slow.
            if type(tensor) is not Tensor and isinstance(tensor, torch.nn.Parameter):
                continue
            yield tensor, raw, of_function
        waiting += [following for following, _ in node.next_functions]
