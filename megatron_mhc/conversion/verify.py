"""One forward pass in both formats."""

import argparse
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mhc import cpu_arguments, patches
from megatron_mhc.arguments import mhc_config_from_args
from megatron_mhc.errors import UserError

TOKENS = 64
# What one process on a CPU has instead of a training's layout, precision and fused kernels.
_HERE = {
    **cpu_arguments.DEFAULTS,
    "tensor_model_parallel_size": 1,
    "pipeline_model_parallel_size": 1,
    "virtual_pipeline_model_parallel_size": None,
    "pipeline_model_parallel_layout": None,
    "context_parallel_size": 1,
    "expert_model_parallel_size": 1,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": False,
    "params_dtype": torch.float32,
    "bf16": False,
    "fp16": False,
    "fp8": None,
    "fp4": None,
    "perform_initialization": False,
    "tp_comm_overlap": False,
    "recompute_granularity": None,
    "cuda_graph_impl": "none",
    "mhc_backend": "torch",
    "mhc_recompute": False,
    "mhc_recompute_layer_num": None,
}


@dataclass(frozen=True)
class Comparison:
    """Logits of the same random tokens, both models in float32 on a CPU.

    Attributes:
        tokens: how many.
        largest: absolute difference. relative: norm of the difference over that of the logits.
        divergence: Kullback-Leibler, nats per token, Megatron's from Hugging Face's.
    """

    tokens: int
    largest: float
    relative: float
    divergence: float

    @property
    def same(self) -> bool:
        """Whether they differ by no more than float32 rounds, in another order of sums."""
        return self.relative < 1e-4

    def __str__(self) -> str:
        return (
            f"logits of {self.tokens} tokens in float32: largest difference {self.largest:.2e}, "
            f"relative {self.relative:.2e}, divergence {self.divergence:.2e} nats"
        )


def compare(megatron: Path, hugging_face: Path) -> Comparison:
    """Logits of a Megatron checkpoint's iteration folder and of a Hugging Face folder.

    Each model is built from what lies beside its weights: Megatron's from the saved arguments.
    """
    from megatron.core import dist_checkpointing

    args = dist_checkpointing.load_common_state_dict(str(megatron))["args"]
    length = min(TOKENS, args.max_position_embeddings)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(args.padded_vocab_size, (1, length), generator=generator)
    ours, theirs = logits(args, megatron, tokens), _hugging_face(hugging_face, tokens)
    difference = ours - theirs
    log_ours, log_theirs = ours.log_softmax(-1), theirs.log_softmax(-1)
    divergence = (log_theirs.exp() * (log_theirs - log_ours)).sum(-1).mean()
    return Comparison(
        tokens=length,
        largest=difference.abs().max().item(),
        relative=(difference.norm() / theirs.norm()).item(),
        divergence=divergence.item(),
    )


@torch.no_grad()
def _hugging_face(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder, trust_remote_code=True, dtype=torch.float32
        )
    except Exception as problem:  # of transformers, of whatever a config makes it load
        raise UserError(f"--verify: transformers cannot load {folder}: {problem}") from problem
    return model.eval()(tokens).logits


@torch.no_grad()
def logits(saved: argparse.Namespace, folder: Path, tokens: Tensor) -> Tensor:
    """Megatron's [b, s, vocabulary] of tokens [b, s], for its saved arguments."""
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.training.arguments import core_transformer_config_from_args

    from megatron_mhc.specs import get_mhc_block_spec

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    args = argparse.Namespace(**{**vars(saved), **_HERE})
    config = core_transformer_config_from_args(args)
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    if getattr(args, "mhc", False) and args.mhc_num_residual_streams > 1:
        patches.apply()
        spec = get_mhc_block_spec(config, spec, mhc_config_from_args(args))
    model = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        rope_scaling_factor=args.rope_scaling_factor,
        seq_len_interpolation_factor=args.rotary_seq_len_interpolation_factor,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
    ).eval()
    state = dist_checkpointing.load(model.sharded_state_dict(), str(folder))
    model.load_state_dict(state, strict=False)
    return model(tokens, torch.arange(tokens.shape[1]).expand_as(tokens), None)
