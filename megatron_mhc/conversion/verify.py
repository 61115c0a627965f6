"""One forward pass in both formats."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_mhc import patches

from .architecture import Architecture

TOKENS = 64


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


def compare(model: Architecture, megatron: Path, hugging_face: Path) -> Comparison:
    """Logits of a Megatron checkpoint's iteration folder and of a Hugging Face folder."""
    length = min(TOKENS, model.positions)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(model.vocabulary, (1, length), generator=generator)
    ours, theirs = _megatron(model, megatron, tokens), _hugging_face(hugging_face, tokens)
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

    model = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=True, dtype=torch.float32
    )
    return model.eval()(tokens).logits


@torch.no_grad()
def _megatron(model: Architecture, folder: Path, tokens: Tensor) -> Tensor:
    from megatron.core import dist_checkpointing, parallel_state
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_mhc.specs import get_mhc_block_spec

    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)
    config = TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn,
        num_attention_heads=model.heads,
        num_query_groups=model.groups,
        kv_channels=model.head_channels,
        layernorm_epsilon=model.norm_eps,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        bias_activation_fusion=False,
        masked_softmax_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        perform_initialization=False,
        apply_rope_fusion=False,
    )
    spec = get_gpt_layer_local_spec(normalization=config.normalization)
    if model.mhc is not None:
        patches.apply()
        spec = get_mhc_block_spec(config, spec, model.mhc)
    gpt = GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=model.vocabulary,
        max_sequence_length=model.positions,
        position_embedding_type="rope",
        rotary_base=int(model.rope_base),
        rope_scaling=model.rope_scaling is not None,
        rope_scaling_factor=model.rope_scaling or 1.0,
        share_embeddings_and_output_weights=model.tied,
    ).eval()
    state = gpt.sharded_state_dict()
    gpt.load_state_dict(dist_checkpointing.load(state, str(folder)), strict=False)
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return gpt(tokens, positions, None)
