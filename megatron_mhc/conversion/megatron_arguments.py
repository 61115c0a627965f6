"""A model as the arguments that Megatron saves with a checkpoint, both ways."""

import argparse
import contextlib
import io
import sys
from collections.abc import Callable

from megatron_mhc.config import MHCConfig

from .architecture import NOT_SET, Architecture, is_one_of, refuse

# Megatron argument: what a Llama has, for the check and in words.
_MEGATRON: dict[str, tuple[Callable[[object], bool], str]] = {
    "normalization": (is_one_of("RMSNorm"), "RMSNorm"),
    "swiglu": (is_one_of(True), "--swiglu"),
    "glu_linear_offset": (is_one_of(None, 0.0), "0"),
    "activation_func_clamp_value": (NOT_SET, "none"),
    "add_bias_linear": (NOT_SET, "--disable-bias-linear"),
    "add_qkv_bias": (NOT_SET, "none"),
    "qk_layernorm": (NOT_SET, "none"),
    "qk_l2_norm": (NOT_SET, "none"),
    "position_embedding_type": (is_one_of("rope"), "rope"),
    "rotary_percent": (is_one_of(1.0), "1.0"),
    "rotary_interleaved": (NOT_SET, "none"),
    "rotary_seq_len_interpolation_factor": (NOT_SET, "none"),
    "layernorm_zero_centered_gamma": (NOT_SET, "none"),
    "apply_residual_connection_post_layernorm": (NOT_SET, "none"),
    "use_mup": (NOT_SET, "none"),
    "num_experts": (NOT_SET, "a dense model"),
    "multi_latent_attention": (NOT_SET, "none"),
    "attention_output_gate": (NOT_SET, "none"),
    "softmax_type": (is_one_of(None, "vanilla"), "vanilla"),
    "window_size": (NOT_SET, "none"),
    "no_rope_freq": (NOT_SET, "none"),
    "mtp_num_layers": (is_one_of(None, 0), "none"),
    "experimental_attention_variant": (NOT_SET, "none"),
    "hybrid_layer_pattern": (NOT_SET, "none"),
}


def from_arguments(args: argparse.Namespace, source: str) -> Architecture:
    """The architecture of a checkpoint's arguments.

    Args:
        args: the ``args`` that Megatron saved with it. source: its folder, for errors.

    Raises:
        UserError: names each argument that no Llama has, its value and what a Llama's is.
    """
    problems = [
        f"--{name.replace('_', '-')} {getattr(args, name)}: a Llama has {words}"
        for name, (fine, words) in _MEGATRON.items()
        if not fine(getattr(args, name, None))
    ]
    mhc = None
    if getattr(args, "mhc", False) and args.mhc_num_residual_streams > 1:
        if args.mhc_residual_mixing != "sinkhorn":
            problems.append(
                f"--mhc-residual-mixing {args.mhc_residual_mixing}: transformers has sinkhorn"
            )
        mhc = MHCConfig(
            num_streams=args.mhc_num_residual_streams,
            sinkhorn_iterations=args.mhc_sinkhorn_iterations,
            eps=args.mhc_eps,
        )
    refuse(source, problems)
    groups = args.num_query_groups if args.group_query_attention else args.num_attention_heads
    return Architecture(
        layers=args.num_layers,
        hidden=args.hidden_size,
        ffn=args.ffn_hidden_size,
        heads=args.num_attention_heads,
        groups=groups,
        head_channels=args.kv_channels or args.hidden_size // args.num_attention_heads,
        vocabulary=args.padded_vocab_size,
        positions=args.max_position_embeddings,
        norm_eps=args.layernorm_epsilon,
        rope_base=float(args.rotary_base),
        rope_scaling=args.rope_scaling_factor if args.use_rope_scaling else None,
        tied=not args.untie_embeddings_and_output_weights,
        half="bf16" if args.bf16 else "fp16" if args.fp16 else None,
        mhc=mhc,
    )


def to_arguments(model: Architecture) -> argparse.Namespace:
    """What Megatron's parser makes of the model's flags, as a training would save it."""
    from megatron.training.arguments import parse_args, validate_args

    from megatron_mhc import cpu_arguments
    from megatron_mhc.arguments import add_mhc_args, validate_mhc_args

    def add(parser):
        cpu_arguments.set_defaults(parser)
        return add_mhc_args(parser)

    words = ["--micro-batch-size", "1", "--seq-length", str(model.positions)]
    words += ["--tokenizer-type", "NullTokenizer"]
    words += ["--vocab-size", str(model.vocabulary), "--no-gradient-accumulation-fusion"]
    for name, value in model.flags().items():
        words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    given, sys.argv = sys.argv, [sys.argv[0], *words]
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints every argument
            args = parse_args(extra_args_provider=add)
            validate_args(args)
    finally:
        sys.argv = given
    validate_mhc_args(args)
    args.padded_vocab_size = model.vocabulary
    return args
