"""Small GPT models for tests: plain and mHC, from the same seed, in one process."""

import torch

from megatron_mhc import MHCConfig, environment, patches

SEED = 7


def start_megatron() -> None:
    """One process, one rank: process groups and Megatron's parallel state; patches applied."""
    environment.prepare()
    from megatron.core import parallel_state

    if not torch.distributed.is_initialized():
        on_gpu = torch.cuda.is_available()
        # A store of its own: nothing in the environment that a test's subprocess could inherit.
        store = torch.distributed.HashStore()
        backend = "nccl" if on_gpu else "gloo"
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel()
    patches.apply(flags=["--mhc-recompute"])


def build_gpt(mhc: MHCConfig | None, *, transformer_engine: bool = False, tied=False, **overrides):
    """A GPTModel with random weights of ``SEED``; the plain one where mhc is None.

    Args:
        transformer_engine: its layers, else Megatron's local ones.
        tied: share the embedding with the output layer.
        overrides: fields of TransformerConfig.
    """
    start_megatron()
    from megatron.core.models.gpt import GPTModel
    from megatron.core.models.gpt.gpt_layer_specs import (
        get_gpt_layer_local_spec,
        get_gpt_layer_with_transformer_engine_spec,
    )
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
    from megatron.core.transformer import TransformerConfig

    from megatron_mhc import get_mhc_block_spec

    torch.manual_seed(SEED)
    model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
    fields = {
        "num_layers": 2,
        "hidden_size": 64,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 160,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "bias_activation_fusion": False,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "use_cpu_initialization": not torch.cuda.is_available(),
        "apply_rope_fusion": False,
    }
    config = TransformerConfig(**{**fields, **overrides})
    experts = {"num_experts": config.num_moe_experts, "moe_grouped_gemm": config.moe_grouped_gemm}
    if transformer_engine:
        spec = get_gpt_layer_with_transformer_engine_spec(**experts)
    else:
        spec = get_gpt_layer_local_spec(**experts, normalization=config.normalization)
    if mhc is not None:
        spec = get_mhc_block_spec(config, spec, mhc)
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=128,
        max_sequence_length=64,
        position_embedding_type="rope",
        share_embeddings_and_output_weights=tied,
    )


def random_tokens(batch: int = 2, length: int = 16):
    """Tokens, positions and labels [b, s] on the device in use."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokens = torch.randint(0, 128, (batch, length + 1), device=device)
    positions = torch.arange(length, device=device).expand(batch, length)
    return tokens[:, :-1].contiguous(), positions, tokens[:, 1:].contiguous()


def scramble_mappings(model, std: float = 0.05) -> None:
    """Mapping parameters as a trained model has them, far from their initial values."""
    from megatron_mhc import HyperConnection, HyperHead

    generator = torch.Generator().manual_seed(SEED)
    for module in model.modules():
        if isinstance(module, HyperConnection | HyperHead):
            for name, parameter in module.named_parameters():
                noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
                with torch.no_grad():
                    if name == "scale":
                        parameter.copy_(1 + 0.1 * noise)
                    else:
                        parameter.add_(noise * (std if name == "fn" else 0.5))
