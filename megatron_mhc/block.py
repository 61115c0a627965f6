"""The transformer block between the streams' entry and exit."""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from megatron.core.transformer.transformer_block import TransformerBlock, TransformerBlockSubmodules
from megatron.core.utils import WrappedTensor
from torch import Tensor

from .config import MHCConfig
from .hyper_head import HyperHead
from .layer import parameter_device
from .pipeline.boundary import PriorityStream, ProgramOrder
from .recompute import Mapped
from .recompute_ahead import InFlight
from .recompute_blocks import block_layers
from .state import StreamState


@dataclass
class MHCBlockSubmodules(TransformerBlockSubmodules):
    """The spec of an mHC block; GPTModel takes it as its ``transformer_layer_spec``.

    Attributes:
        mhc: the model's hyper-connection settings.
        boundary: forms the stage's output; :class:`~megatron_mhc.pipeline.PipelineCommunicator`
            must be given the same one. The default forms it on the main stream.
    """

    mhc: MHCConfig | None = None
    boundary: ProgramOrder | PriorityStream = field(default_factory=ProgramOrder)


class MHCTransformerBlock(TransformerBlock):
    """A TransformerBlock that expands the embedding into n streams and collapses them at the end.

    Between stages streams travel as [s, b, n*C]. ``hyper_head`` is in the stage that has the final
    norm, and collapses the streams before it. Arguments are TransformerBlock's, the spec is an
    :class:`MHCBlockSubmodules`.
    """

    def __init__(self, config, spec: MHCBlockSubmodules, *args, **kwargs) -> None:
        super().__init__(config, spec, *args, **kwargs)
        self.mhc = spec.mhc
        self.boundary = spec.boundary
        if self.final_layernorm is not None:
            self.hyper_head = HyperHead(
                self.mhc,
                config.hidden_size,
                norm_eps=config.layernorm_epsilon,
                sequence_parallel=config.sequence_parallel,
                gradient_accumulation_fusion=config.gradient_accumulation_fusion,
                device=parameter_device(config),
            )
            self.final_layernorm.register_forward_pre_hook(self._collapse)
        if self.mhc.recompute and self.layers:
            layers = block_layers(self.mhc, len(self.layers))
            for layer in self.layers[::layers]:
                layer.starts_recomputed_block = True
            if self.final_layernorm is not None and config.pipeline_model_parallel_size > 1:
                self._keep_last_block((len(self.layers) - 1) // layers * layers)

    def _keep_last_block(self, first: int) -> None:
        """Recompute nothing from layer ``first`` of this stage on.

        The backward pass of a pipeline's last stage follows its forward pass at once: what was
        dropped would be formed again at once, and one pass at a time holds this block.
        """
        connections = [
            connection
            for layer in self.layers[first:]
            for connection in (layer.self_attention_hyper_connection, layer.mlp_hyper_connection)
        ]
        for module in (*connections, self.hyper_head):
            module.config = replace(module.config, recompute=False, recompute_layer_num=None)

    def _collapse(self, norm, inputs: tuple[StreamState | Tensor]) -> Tensor:
        (state,) = inputs
        if not isinstance(state, StreamState):  # a stage without layers
            state = StreamState.from_flat(state, self.mhc.num_streams)
        # By a call: hooks of Megatron's DDP wait for its parameters.
        return self.hyper_head(state, self._note)

    def _note(self, mapped: Mapped | None, output: Tensor) -> None:
        """Note the pass that gave ``output``; from its gradient on, nothing is replayed ahead."""
        if self.mhc.recompute and torch.is_grad_enabled():
            self.boundary.replays.begin(self.vp_stage or 0, InFlight(mapped), output)

    def replay_ahead(self) -> bool:
        """Replay what the next backward pass needs first: the last block of its stage.

        A PipelineCommunicator does so while the gradient is on its way; this is for a schedule of
        your own. Earlier blocks are replayed when the backward pass reaches them.

        Returns:
            Whether there was anything to replay.
        """
        return self.boundary.replays.replay_next()

    def forward(self, hidden_states: Tensor | WrappedTensor | None, *args: Any, **kwargs: Any):
        """TransformerBlock's forward, on streams.

        Args:
            hidden_states: the embedding [s, b, C] on the first stage; ignored on later ones, which
                take streams [s, b, n*C] from ``set_input_tensor``.

        Returns:
            h [s, b, C] after the final norm, or streams [s, b, n*C] from a stage without it.
        """
        if self.pre_process:
            if isinstance(hidden_states, WrappedTensor):
                hidden_states = hidden_states.unwrap()
            entry = StreamState.expand(hidden_states, self.mhc.num_streams, self.mhc.backend)
            hidden_states = entry.to_flat(self.mhc.backend)
        output = super().forward(hidden_states, *args, **kwargs)
        if self.final_layernorm is None:
            if not isinstance(output, StreamState):  # a stage without layers
                output = StreamState.from_flat(output, self.mhc.num_streams)
            mapped = output.discarded
            output = self.boundary.form(output, self.mhc.backend)
            self._note(mapped, output)
        return output
