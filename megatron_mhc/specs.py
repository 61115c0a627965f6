"""From the spec of a plain Megatron model to that of an mHC model."""

import dataclasses

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnBackend
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    _get_block_submodules,
)
from megatron.core.transformer.transformer_layer import TransformerLayer
from megatron.training.models.gpt import GPTModelConfig, default_layer_spec

from megatron_mhc import patches

from .block import MHCBlockSubmodules
from .config import MHCConfig
from .layer import MHCTransformerLayer, get_bias_dropout
from .pipeline.boundary import PriorityStream, ProgramOrder
from .pipeline.slots import DeferredCommunicator


def get_mhc_block_spec(
    config,
    plain_spec: ModuleSpec | TransformerBlockSubmodules,
    mhc: MHCConfig,
    vp_stage: int | None = None,
    pp_rank: int | None = None,
    boundary: ProgramOrder | PriorityStream | None = None,
) -> MHCBlockSubmodules:
    """The mHC form of a plain model's layer or block spec, local or Transformer Engine.

        GPTModel(config, transformer_layer_spec=get_mhc_block_spec(config, plain_spec, mhc), ...)

    Args:
        config: the TransformerConfig.
        plain_spec: what Megatron's own functions give (get_gpt_layer_local_spec, ...).
        vp_stage, pp_rank: the pipeline stage that the block is for.
        boundary: the one that the stage's PipelineCommunicator sends from, if it has one.

    Raises:
        RuntimeError: the patches are not applied (``megatron_mhc.patches.apply()``).
        ValueError: a layer that mHC does not know how to convert, or recompute under combined 1F1B.
    """
    patches.require("transformer_block")
    if config.overlap_moe_expert_parallel_comm:
        patches.require("layer_callables")
        if mhc.recompute:
            raise ValueError(
                "recompute=True with overlap_moe_expert_parallel_comm=True: combined 1F1B cuts the "
                "graph that recompute replays; set one of them to False"
            )
    plain = _get_block_submodules(config, plain_spec, vp_stage, pp_rank)
    return MHCBlockSubmodules(
        layer_specs=[_convert_layer(config, spec, mhc) for spec in plain.layer_specs],
        layer_norm=plain.layer_norm,
        mhc=mhc,
        boundary=boundary or ProgramOrder(),
    )


def _convert_layer(config, spec: ModuleSpec, mhc: MHCConfig) -> ModuleSpec:
    submodules = spec.submodules
    if spec.module is not TransformerLayer:
        raise ValueError(f"mHC converts TransformerLayer specs, not {spec.module.__name__}")
    if (submodules.self_attn_bda, submodules.mlp_bda) != (get_bias_dropout_add,) * 2:
        raise ValueError("mHC replaces get_bias_dropout_add; this layer's spec has something else")
    if mhc.recompute and IdentityOp in (submodules.input_layernorm, submodules.pre_mlp_layernorm):
        patches.require("te_normalization")  # the norm is inside Transformer Engine's linear layer
    attention = submodules.self_attention
    if getattr(config, "attention_backend", None) == AttnBackend.local:
        # Megatron's builder does this for --attention-backend local, on single-layer specs only.
        core = dataclasses.replace(attention.submodules, core_attention=DotProductAttention)
        attention = dataclasses.replace(attention, submodules=core)
    return ModuleSpec(
        module=MHCTransformerLayer,
        params={**spec.params, "mhc": mhc},
        submodules=dataclasses.replace(
            submodules,
            self_attention=attention,
            self_attn_bda=get_bias_dropout,
            mlp_bda=get_bias_dropout,
        ),
    )


@dataclasses.dataclass(frozen=True)
class MHCLayerSpec:
    """A ``GPTModelConfig.transformer_layer_spec``: builds the mHC spec when Megatron asks.

    Attributes:
        mhc: the model's hyper-connection settings.
        communicator: that of a model of several stages. Process groups exist when Megatron asks
            and no weights do yet, so that is when stages agree on what they exchange.
    """

    mhc: MHCConfig
    communicator: DeferredCommunicator | None = None

    def __call__(self, config: GPTModelConfig, vp_stage: int | None = None) -> MHCBlockSubmodules:
        plain = default_layer_spec(config, vp_stage)
        boundary = None
        if self.communicator is not None:
            self.communicator.connect()
            boundary = self.communicator.boundary
        return get_mhc_block_spec(config.transformer, plain, self.mhc, vp_stage, boundary=boundary)
