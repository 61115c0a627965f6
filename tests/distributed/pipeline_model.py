"""A small mHC GPT in pipeline stages; weights and data are the same in every layout.

Megatron is imported here: only after ``megatron_mhc.environment.prepare()``.
"""

import re

import torch
from layout_cases import Case
from layout_model import block_spec, layer_style, mixture_style, name_of_expert, set_weights
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.distributed.finalize_model_grads import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.module import Float16Module
from megatron.core.utils import get_batch_on_this_cp_rank
from pipeline_cases import Pipeline

VOCABULARY, SEQUENCE, MICRO_BATCH, STREAMS = 64, 16, 2, 4


def dtype(pipeline: Pipeline) -> torch.dtype:
    return torch.bfloat16 if pipeline.bf16 else torch.float32


def transformer_config(pipeline: Pipeline) -> TransformerConfig:
    style = layer_style(classic=pipeline.tied)
    if pipeline.recompute:
        style |= {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    if pipeline.layout:
        style["pipeline_model_parallel_layout"] = pipeline.layout
    if pipeline.experts:
        style |= mixture_style(pipeline.layers, pipeline.combined)
    overlap_p2p = pipeline.vpp > 1 and pipeline.overlap_p2p
    config = TransformerConfig(
        num_layers=pipeline.layers,
        hidden_size=pipeline.hidden,
        ffn_hidden_size=pipeline.hidden * 3 // 2,
        num_attention_heads=4,
        num_query_groups=2,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=pipeline.tp,
        context_parallel_size=pipeline.cp,
        expert_model_parallel_size=pipeline.ep,
        pipeline_model_parallel_size=pipeline.pp,
        virtual_pipeline_model_parallel_size=pipeline.vpp if pipeline.vpp > 1 else None,
        microbatch_group_size_per_vp_stage=pipeline.group or None,
        sequence_parallel=pipeline.sequence_parallel,
        bf16=pipeline.bf16 or pipeline.combined,  # combined 1F1B is refused otherwise
        params_dtype=dtype(pipeline),
        pipeline_dtype=dtype(pipeline),
        masked_softmax_fusion=False,
        deallocate_pipeline_outputs=True,  # as megatron.training sets it
        overlap_p2p_comm=overlap_p2p,
        overlap_p2p_comm_warmup_flush=overlap_p2p and pipeline.ahead,
        batch_p2p_comm=pipeline.overlap == "none" and not overlap_p2p,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        finalize_model_grads_func=finalize_model_grads,
        **style,
    )
    config.bf16 = pipeline.bf16
    return config


def whole_name(chunk: GPTModel, name: str, pipeline: Pipeline) -> str:
    """A parameter's name in the whole model: layers are numbered from the stage's first."""
    if pipeline.tied and name == "output_layer.weight":
        return "embedding.word_embeddings.weight"
    return re.sub(
        r"decoder\.layers\.(\d+)",
        lambda found: f"decoder.layers.{chunk.decoder.layers[int(found[1])].layer_number - 1}",
        name_of_expert(name),
    )


def build_chunks(pipeline: Pipeline, boundary) -> list[DistributedDataParallel]:
    """This rank's chunks, wrapped as Megatron's trainer wraps them."""
    config = transformer_config(pipeline)
    case = Case(
        classic=pipeline.tied,
        sequence_parallel=pipeline.sequence_parallel,
        recompute=pipeline.replay,
    )
    stages = range(pipeline.vpp) if pipeline.vpp > 1 else [None]
    return [_build_chunk(pipeline, config, case, boundary, stage) for stage in stages]


def _build_chunk(pipeline, config, case, boundary, stage) -> DistributedDataParallel:
    pp_group = parallel_state.get_pipeline_model_parallel_group()
    vpp = config.virtual_pipeline_model_parallel_size
    chunk = GPTModel(
        config,
        block_spec(config, case, vp_stage=stage, boundary=boundary),
        VOCABULARY,
        SEQUENCE,
        pre_process=is_pp_first_stage(pp_group) and is_vp_first_stage(stage, vpp),
        post_process=is_pp_last_stage(pp_group) and is_vp_last_stage(stage, vpp),
        position_embedding_type="learned_absolute" if pipeline.tied else "rope",
        share_embeddings_and_output_weights=pipeline.tied,
        vp_stage=stage,
    )
    chunk.vp_stage = stage
    tp_rank = parallel_state.get_tensor_model_parallel_rank()
    set_weights(chunk, case, pipeline.tp, tp_rank, lambda name: whole_name(chunk, name, pipeline))
    chunk.cuda()  # made on the CPU, for weights that are the same everywhere
    inner = Float16Module(config, chunk) if pipeline.bf16 else chunk
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    wrapped = DistributedDataParallel(config, ddp_config, inner)
    wrapped.vp_stage = stage
    return wrapped


def micro_batches(pipeline: Pipeline):
    """The global batch, as dicts with this rank's part of the tokens.

    Every micro-batch has its own loss mask. Without a loss per token Megatron averages the means of
    context-parallel ranks, so then each rank's part has as many tokens that count.
    """
    count = pipeline.micro_batches
    group = parallel_state.get_context_parallel_group()
    generator = torch.Generator().manual_seed(20)
    tokens = torch.randint(VOCABULARY, (count, MICRO_BATCH, SEQUENCE + 1), generator=generator)
    for index in range(count):
        mask = torch.ones(MICRO_BATCH, SEQUENCE)
        if pipeline.tied:
            mask[:, :index] = 0
        else:
            mask.view(MICRO_BATCH, 4, -1)[:, :, : index % 4] = 0
        whole = {
            "tokens": tokens[index, :, :-1],
            "labels": tokens[index, :, 1:],
            "mask": mask,
            "positions": torch.arange(SEQUENCE).expand(MICRO_BATCH, -1),
        }
        part = get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=group)
        yield {"index": index, **part}
