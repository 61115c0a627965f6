"""A small mHC GPT whose weights and data are the same in every parallel layout.

Megatron is imported here: only after ``megatron_mhc.environment.prepare()``.
"""

import dataclasses
import re
import zlib

import torch
from gathered_attention import GatheredAttention
from layout_cases import Case, Layout
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module

from megatron_mhc import MHCConfig, get_mhc_block_spec

VOCABULARY, SEQUENCE, MICRO_BATCH, MICRO_BATCHES = 128, 32, 2, 4
LAYERS, EXPERTS = 3, 4


def layer_style(classic: bool) -> dict:
    """The layers of GPT-2 or of Llama, as settings of a TransformerConfig."""
    if classic:
        return {
            "normalization": "LayerNorm",
            "add_bias_linear": True,
            "calculate_per_token_loss": True,
        }
    return {
        "normalization": "RMSNorm",
        "add_bias_linear": False,
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
    }


def mixture_style(layers: int, combined: bool) -> dict:
    """Mixtures of experts for all MLPs but the first, as settings of a TransformerConfig."""
    return {
        "num_moe_experts": EXPERTS,
        "moe_layer_freq": [0] + [1] * (layers - 1),
        "moe_router_topk": 2,
        "moe_router_load_balancing_type": "none",
        "moe_shared_expert_intermediate_size": 48,
        "moe_token_dispatcher_type": "alltoall",
        "overlap_moe_expert_parallel_comm": combined,
    }


def transformer_config(case: Case, layout: Layout) -> TransformerConfig:
    style = layer_style(case.classic)
    if case.experts:
        style |= mixture_style(LAYERS, case.combined)
    config = TransformerConfig(
        num_layers=LAYERS,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=4,
        num_query_groups=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
        sequence_parallel=case.sequence_parallel,
        bf16=case.bf16 or case.combined,  # combined 1F1B is refused otherwise
        params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        finalize_model_grads_func=finalize_model_grads,
        **style,
    )
    config.bf16 = case.bf16
    return config


def marked_torch_norm(config, hidden_size: int, eps: float, **unused) -> torch.nn.Module:
    """PyTorch's norm for sequence parallelism, which Megatron's wrapper of it refuses."""
    kind = torch.nn.LayerNorm if config.normalization == "LayerNorm" else torch.nn.RMSNorm
    norm = kind(hidden_size, eps=eps)
    for parameter in norm.parameters():
        parameter.sequence_parallel = True
    return norm


def block_spec(config: TransformerConfig, case: Case, **stage):
    """The mHC spec; ``stage`` is get_mhc_block_spec's, for a pipeline."""
    plain = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=False,
        normalization=config.normalization,
        vp_stage=stage.get("vp_stage"),
    )
    for layer in plain.layer_specs:
        if case.sequence_parallel:
            layer.submodules = dataclasses.replace(
                layer.submodules,
                input_layernorm=marked_torch_norm,
                pre_mlp_layernorm=marked_torch_norm,
            )
        if config.context_parallel_size > 1:
            layer.submodules.self_attention.submodules.core_attention = GatheredAttention
    mhc = MHCConfig(
        residual_mixing=case.mixing,
        recompute=case.recompute,
        recompute_layer_num=2 if case.recompute else None,
    )
    spec = get_mhc_block_spec(config, plain, mhc, **stage)
    if case.sequence_parallel:
        spec.layer_norm = marked_torch_norm
    return spec


def build_model(case: Case, layout: Layout, tp_rank: int) -> DistributedDataParallel:
    """The model, wrapped as Megatron's trainer wraps it, mHC far from its initial values."""
    config = transformer_config(case, layout)
    model = GPTModel(
        config,
        block_spec(config, case),
        VOCABULARY,
        SEQUENCE,
        position_embedding_type="learned_absolute" if case.classic else "rope",
        share_embeddings_and_output_weights=case.classic,
    )
    set_weights(model, case, layout.tp, tp_rank, name_of_expert)
    if case.bf16:
        model = Float16Module(config, model)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=case.optimizer == "distributed"
    )
    return DistributedDataParallel(config, ddp_config, model)


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether a rank has a part; an expert is whole, whatever Megatron's mark says."""
    expert = not getattr(parameter, "allreduce", True)
    return getattr(parameter, "tensor_model_parallel", False) and not expert


def name_of_expert(name: str) -> str:
    """A parameter's name in the whole model: experts are numbered from the rank's first."""
    first = parallel_state.get_expert_model_parallel_rank() * (
        EXPERTS // parallel_state.get_expert_model_parallel_world_size()
    )
    return re.sub(
        r"local_experts\.(\d+)", lambda found: f"local_experts.{first + int(found[1])}", name
    )


def set_weights(
    model: torch.nn.Module, case: Case, tp: int, tp_rank: int, whole_name=lambda name: name
) -> None:
    """Fill every parameter from a seed that is its name's, each rank with its part of the whole.

    ``whole_name`` turns a parameter's name in a pipeline stage into that in the whole model.
    """
    # Unconstrained gains multiply from sublayer to sublayer, and rounding errors with them.
    gate, spread = (0.2, 0.1) if case.mixing == "unconstrained" else (1.0, 0.3)
    for own_name, parameter in model.named_parameters():
        name = whole_name(own_name)
        dim = getattr(parameter, "partition_dim", 0)
        sharded = is_sharded(parameter)
        shape = list(parameter.shape)
        if sharded:
            shape[dim] *= tp
        noise = torch.randn(
            shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode()))
        )
        if name.endswith(".scale"):
            whole = gate * (1 + 0.2 * noise)
        elif name.endswith(".base"):
            whole = parameter.detach() + spread * noise
        elif "norm.weight" in name:
            whole = 1 + 0.1 * noise
        else:
            whole = 0.05 * noise
        if sharded:
            # A gated fc1 holds [gate; up] on every rank: stride 2 says that it is two matrices.
            parts = whole.chunk(parameter.partition_stride, dim)
            whole = torch.cat([part.chunk(tp, dim)[tp_rank] for part in parts], dim)
        parameter.data.copy_(whole)


def micro_batches(dp: int, dp_rank: int):
    """This rank's share of the global batch, as dicts; every micro-batch has its own loss mask."""
    generator = torch.Generator().manual_seed(20)
    shape = (MICRO_BATCHES, MICRO_BATCH, SEQUENCE + 1)
    tokens = torch.randint(VOCABULARY, shape, generator=generator)
    for index in range(dp_rank, MICRO_BATCHES, dp):
        mask = torch.ones(MICRO_BATCH, SEQUENCE)
        mask[:, : 3 * index] = 0
        yield {
            "index": index,
            "tokens": tokens[index, :, :-1],
            "labels": tokens[index, :, 1:],
            "mask": mask,
            "positions": torch.arange(SEQUENCE).expand(MICRO_BATCH, -1),
        }


def forward_step(iterator, model, return_schedule_plan: bool = False):
    """Megatron's forward_step_func: the sum of the unmasked losses, their count, and the mean.

    The mean is over all context-parallel ranks, the sum and the count are this rank's.
    """
    batch = next(iterator)
    run = model.build_schedule_plan if return_schedule_plan else model
    losses = run(batch["tokens"], batch["positions"], None, labels=batch["labels"])

    def loss(losses):
        total, count = (losses.float() * batch["mask"]).sum(), batch["mask"].sum()
        # Each rank of a context-parallel group has a part of the tokens.
        everywhere = torch.stack([total.detach(), count])
        group = parallel_state.get_context_parallel_group()
        torch.distributed.all_reduce(everywhere, group=group)
        return total, count.int(), {batch["index"]: everywhere[0] / everywhere[1]}

    return losses, loss
