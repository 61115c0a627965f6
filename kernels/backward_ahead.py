"""The kernels of a backward pass on Hopper, which compile while its forward's does."""

import torch
from torch import Tensor

from .launch import sizes
from .launch_backward import mapping_plan
from .launch_backward_hopper import hopper_pre_plan, hopper_streams_plan
from .launch_reduce import reduction
from .main_grad import main_grads_of

BF16, F32 = torch.bfloat16, torch.float32


def begin_backward(
    x: Tensor,
    merge: tuple[Tensor, Tensor, Tensor] | None,
    mapping: tuple[Tensor, Tensor, Tensor],
    iterations: int,
    eps: float,
) -> None:
    """Begins to compile what the gradient of post_pre_hopper's arguments will take, if one is
    wanted, as a rule: all outputs have a gradient, and those of parameters are added to
    ``main_grad`` where there is one. What else it takes compiles when it is launched.

    Nothing is begun for the head, whose gradient is that of every GPU.
    """
    tokens, n, channels = sizes(x)
    count, merges = mapping[0].shape[0], merge is not None
    wanted = any(tensor.requires_grad for tensor in (x, *(merge or ()), *mapping))
    if count == n or not wanted or torch.is_inference_mode_enabled():
        return
    of_mappings = mapping_plan(tokens, n, channels, count, merges, iterations, eps)
    merged = (F32 if merges else None,) * 2
    # The longest to compile first, in the order of the kernels' arguments.
    of_mappings.launch.begin(BF16, BF16, *(F32,) * 6, *merged, F32, BF16, F32, F32)
    if merges:
        streams = hopper_streams_plan(tokens, n, channels, x.device)
        streams.launch.begin(*(BF16,) * 4, F32, BF16, BF16, *(F32,) * 4)
    else:
        streams = hopper_pre_plan(tokens, n, channels, x.device)
        streams.launch.begin(BF16, BF16, F32, F32, BF16, BF16, F32, F32)
    adds = main_grads_of(mapping) is not None
    parts = (streams.most, streams.chunks, of_mappings.blocks, of_mappings.map_programs)
    sums_fn = adds or streams.most > 1
    sums = reduction(tokens, n, channels, count, parts, streams.cut, sums_fn, adds)
    sums.begin(F32, F32, *merged, *merged, *(F32,) * 4)
