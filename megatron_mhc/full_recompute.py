"""Megatron's full recompute for mHC blocks: the deferred merge crosses the checkpoint.

A checkpoint between layers takes and gives the tensors x, f, post and comb. So the recomputed
layers form each merge as the plain forward pass does, together with the next mappings, and give
its bits; only x, f and the two small mappings are kept for every checkpoint.
"""

import functools
from collections.abc import Callable, Iterator

from megatron.core import tensor_parallel
from megatron.core.fp4_utils import get_fp4_context
from megatron.core.fp8_utils import get_fp8_context
from torch import Tensor

from .state import StreamState


def _chunks(config, layers: int) -> Iterator[tuple[int, int, bool]]:
    """First layer, end, and whether the layers between are checkpointed."""
    size = config.recompute_num_layers
    if config.recompute_method == "uniform":
        for first in range(0, layers, size):
            yield first, min(first + size, layers), True
    else:
        for first in range(layers):
            yield first, first + 1, first < size


def _quantization(config, layer_number: int):
    """The context in which Megatron runs one layer of a low precision model."""
    if config.fp8:
        return get_fp8_context(config, layer_number - 1)
    return get_fp4_context(config, layer_number - 1)


def _checkpoint(block, run: Callable[..., tuple[Tensor, ...]], tensors: tuple[Tensor, ...]):
    """Megatron's checkpoint of a function of tensors, Transformer Engine's in low precision."""
    if block.config.fp8 or block.config.fp4:
        from megatron.core.extensions.transformer_engine import te_checkpoint

        tracker = tensor_parallel.random.get_cuda_rng_tracker
        return te_checkpoint(run, False, tracker, block.pg_collection.tp, *tensors)
    return tensor_parallel.checkpoint(run, False, *tensors)


def forward(
    block,
    hidden_states: Tensor,
    *,
    use_inner_quantization_context: bool,
    extract_layer_indices: set[int],
    layer_offset: int,
    context: Tensor | None,
    **layer_arguments,
) -> StreamState:
    """All layers of an MHCTransformerBlock, checkpointed by ``recompute_method``.

    Stands in for Megatron's ``checkpointed_forward``; arguments are the ones it takes.

    Args:
        hidden_states: [s, b, n*C], the stage's entry.

    Raises:
        ValueError: features of single layers are asked for (``extract_layer_indices``).
    """
    if extract_layer_indices:
        raise ValueError(f"extract_layer_indices={extract_layer_indices}: mHC layers give streams")

    def run_layers(first: int, end: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        state = StreamState.from_tensors(*tensors)
        for layer in block.layers[first:end]:
            arguments = {"context": context, **layer_arguments}
            if use_inner_quantization_context:
                with _quantization(block.config, layer.layer_number):
                    state, _ = layer(state, **arguments)
            else:
                state, _ = layer(state, **arguments)
        return state.tensors()

    tensors = StreamState.from_flat(hidden_states, block.mhc.num_streams).tensors()
    low_precision = block.config.fp8 or block.config.fp4
    for first, end, checkpointed in _chunks(block.config, len(block.layers)):
        run = functools.partial(run_layers, first, end)
        # Transformer Engine's checkpoint wants an input with a gradient.
        if checkpointed and (tensors[0].requires_grad or not low_precision):
            tensors = _checkpoint(block, run, tensors)
        else:
            tensors = run(*tensors)
    return StreamState.from_tensors(*tensors)
