"""An mHC layer in the parts that combined 1F1B schedules (--overlap-moe-expert-parallel-comm).

That schedule never calls a layer's forward. It takes a layer apart (attention up to the router,
dispatch, experts, combine) and runs the parts of two micro-batches side by side, the exchanges
between experts on a stream of their own. Megatron's own parts are used here as they are: they are
built of a :class:`LayerParts`, for which the hidden states are the streams, [s, b, n*C].

The MLP's merge stands where Megatron adds the residual: behind combine, on combine's stream. What
the compute stream has next, the backward of the other micro-batch's attention, does not wait for
it.
"""

import torch
from megatron.core.models.gpt.fine_grained_callables import build_transformer_layer_callables
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from .layer import MHCTransformerLayer
from .state import Residual, StreamState


class MixtureNorm(torch.nn.Module):
    """The norm before a mixture, which Megatron calls with the streams.

    Attributes:
        u: the mixture's aggregated input [s, b, C], left here by attention; its norm is returned.
    """

    def __init__(self, norm: torch.nn.Module) -> None:
        super().__init__()
        self._norm = norm
        self.u: Tensor | None = None

    def forward(self, _streams: Tensor) -> Tensor:
        """The norm of u, [s, b, C]."""
        u, self.u = self.u, None
        return self._norm(u)


class LayerParts:
    """A layer as Megatron's builder of callables sees it; what is not here is the layer's own.

    Attributes:
        pre_mlp_layernorm: a mixture's norm.
        residual: what merges a mixture's output: left by attention, and set again for combine from
            what its graph begins with.
    """

    def __init__(self, layer: MHCTransformerLayer) -> None:
        self._layer = layer
        self.pre_mlp_layernorm = MixtureNorm(layer.pre_mlp_layernorm)
        self.residual: Residual | None = None

    def __getattr__(self, name: str):
        return getattr(self._layer, name)

    def streams(self, hidden_states: Tensor) -> StreamState:
        """Hidden states [s, b, n*C] as streams [s, b, n, C]."""
        return StreamState.from_flat(hidden_states, self._layer.mhc.num_streams)

    def _forward_attention(self, hidden_states: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        """Attention and its merge: streams [s, b, n*C] to streams, and Megatron's context."""
        layer = self._layer
        u, residual = layer.self_attention_hyper_connection(self.streams(hidden_states))
        f, context = layer._forward_attention(u, **kwargs)
        state = residual.add(f)
        if not isinstance(layer.mlp, MoELayer):
            return state.to_flat(layer.mhc.backend), context
        # The merge and the mixture's mappings in one; Megatron calls the norm next.
        self.pre_mlp_layernorm.u, self.residual = layer.mlp_hyper_connection(state)
        return self.residual.x.flatten(-2), context

    def _forward_mlp(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        """A dense MLP: streams to streams."""
        u, residual = self._layer.mlp_hyper_connection(self.streams(hidden_states))
        f = self._layer._forward_mlp(u, *args, **kwargs)
        return residual.add(f).to_flat(self._layer.mhc.backend)

    def mlp_bda(self, training: bool, fused: bool):
        """What stands where Megatron adds the residual of a mixture: the merge."""
        bias_dropout = self._layer.mlp_bda(training, fused)

        def merge(output_with_bias, _streams: Tensor, prob: float) -> Tensor:
            f = bias_dropout(output_with_bias, None, prob)
            return self.residual.add(f).to_flat(self._layer.mhc.backend)

        return merge


def layer_callables(layer: MHCTransformerLayer) -> tuple[list, dict]:
    """Megatron's ``build_layer_callables`` (0.19.2) for an mHC layer.

    Returns:
        The functions of a schedule node's parts, of streams [s, b, n*C] in the model's dtype (the
        first part of the first layer takes the embedding [s, b, C]): attention up to the router,
        dispatch, experts or dense MLP, combine, and none for multi-token prediction; and what
        computes delayed gradients of weights, by the part's name.
    """
    parts = LayerParts(layer)
    callables, backward_dw = build_transformer_layer_callables(parts)
    attention, dispatch, mlp, combine, last = callables
    mhc = layer.mhc

    def attention_of_streams(node, hidden_states: Tensor):
        # The layer before made them on combine's stream.
        hidden_states.record_stream(torch.cuda.current_stream())
        if node.is_first_layer and node.chunk_state.model.pre_process:
            entry = StreamState.expand(hidden_states, mhc.num_streams, mhc.backend)
            hidden_states = entry.to_flat(mhc.backend)
        output = attention(node, hidden_states)
        if isinstance(layer.mlp, MoELayer):
            residual, parts.residual = parts.residual, None
            # Combine has a graph of its own, as for the streams.
            node.layer_state.mhc_mapping = [node.detach(residual.post), node.detach(residual.comb)]
        return output

    def combine_into_streams(node, output: Tensor) -> Tensor:
        mapping = node.layer_state.mhc_mapping
        parts.residual = Residual(parts.streams(node.layer_state.residual).x, *mapping)
        output = combine(node, output)
        for tensor in mapping:  # made on the compute stream
            tensor.record_stream(torch.cuda.current_stream())
        parts.residual = node.layer_state.mhc_mapping = None
        return output

    return [attention_of_streams, dispatch, mlp, combine_into_streams, last], backward_dw
