"""Megatron's transformer layer with one hyper-connection for attention and one for the MLP."""

import torch
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch import Tensor

from . import recompute_sublayer
from .config import MHCConfig
from .hyper_connection import HyperConnection
from .state import StreamState


def get_bias_dropout(training: bool, fused: bool):
    """Stands in the ``self_attn_bda`` and ``mlp_bda`` slots of an mHC layer.

    Bias and dropout as in Megatron, without the residual: the merge adds the output to the streams.
    ``fused`` is Megatron's fused kernel of all three and does not apply.
    """

    def bias_dropout(output_with_bias: tuple[Tensor, Tensor | None], residual: Tensor, prob: float):
        output, bias = output_with_bias
        if bias is not None:
            output = output + bias
        return torch.nn.functional.dropout(output, p=prob, training=training)

    return bias_dropout


class MHCTransformerLayer(TransformerLayer):
    """A TransformerLayer whose residual is n streams.

    Attention and MLP run as Megatron's own, on the aggregated input u and with the residual left
    out of their last step (:func:`get_bias_dropout`), so what Megatron does inside them (recompute,
    fp8, tensor parallelism, mixtures of experts) is unchanged.

    Args:
        mhc: the model's hyper-connection settings; the rest is TransformerLayer's.

    Attributes:
        starts_recomputed_block: the streams before this layer are kept for the backward pass; the
            transformer block sets it.
    """

    def __init__(self, config, submodules, *args, mhc: MHCConfig, **kwargs) -> None:
        super().__init__(config, submodules, *args, **kwargs)
        self.mhc = mhc
        first_sublayer = 2 * (self.layer_number - 1)
        self.self_attention_hyper_connection = self._connection(first_sublayer)
        self.mlp_hyper_connection = self._connection(first_sublayer + 1)
        self.starts_recomputed_block = False
        if mhc.recompute:
            for norm in (self.input_layernorm, self.pre_mlp_layernorm):
                if not isinstance(norm, IdentityOp):  # a fused norm reports by its patch
                    recompute_sublayer.reporting(norm)

    def _connection(self, sublayer: int) -> HyperConnection:
        config = self.config
        return HyperConnection(
            self.mhc,
            config.hidden_size,
            sublayer,
            norm_eps=config.layernorm_epsilon,
            sequence_parallel=config.sequence_parallel,
            gradient_accumulation_fusion=config.gradient_accumulation_fusion,
            device=parameter_device(config),
        )

    def forward(self, hidden_states: StreamState | Tensor, *args, **kwargs):
        """One layer.

        Args:
            hidden_states: the state between layers, or streams [s, b, n*C] at a stage's entry.
            args, kwargs: TransformerLayer's.

        Returns:
            The state with the MLP's merge pending, and the context, as TransformerLayer.
        """
        state = hidden_states
        if not isinstance(state, StreamState):
            state = StreamState.from_flat(state, self.mhc.num_streams)

        if self.starts_recomputed_block:
            state = state.kept()

        u, residual = self.self_attention_hyper_connection(state)
        with recompute_sublayer.sublayer(u, residual.u_stand_in) as discard_input:
            f, context = self._forward_attention(u, *args, **kwargs)
            discard_input(f)
        u, residual = self.mlp_hyper_connection(residual.add(f))
        with recompute_sublayer.sublayer(u, residual.u_stand_in) as discard_input:
            f = self._forward_mlp(
                u,
                kwargs.get("inference_context"),
                padding_mask=kwargs.get("padding_mask"),
                packed_seq_params=kwargs.get("packed_seq_params"),
            )
            discard_input(f)
        return residual.add(f), context


def parameter_device(config):
    """Where Megatron creates this model's parameters."""
    return "cpu" if config.use_cpu_initialization else torch.cuda.current_device()
