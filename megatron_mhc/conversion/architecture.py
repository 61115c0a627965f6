"""What a model is, apart from its weights: as Megatron's arguments and as a Hugging Face config."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass

from megatron_mhc.config import MHCConfig
from megatron_mhc.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """A Llama: RMSNorm, RoPE, SwiGLU, grouped queries, no biases; with mHC where ``mhc`` is set.

    Attributes:
        vocabulary: rows of the embedding. positions: longest sequence, tokens.
        head_channels: channels of one attention head. groups: key-value heads.
        rope_scaling: Llama 3.1's factor for its longer contexts; None is plain RoPE.
        tied: the embedding is the output layer too.
        half: "bf16" or "fp16" where weights are; None is float32.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_channels: int
    vocabulary: int
    positions: int
    norm_eps: float
    rope_base: float
    rope_scaling: float | None
    tied: bool
    half: str | None
    mhc: MHCConfig | None

    def flags(self) -> dict[str, object]:
        """Flags of examples/pretrain_gpt.py for this model; True for a switch."""
        flags = {
            "num-layers": self.layers,
            "hidden-size": self.hidden,
            "ffn-hidden-size": self.ffn,
            "num-attention-heads": self.heads,
            "kv-channels": self.head_channels,
            "max-position-embeddings": self.positions,
            "normalization": "RMSNorm",
            "norm-epsilon": self.norm_eps,
            "position-embedding-type": "rope",
            "rotary-base": int(self.rope_base),
            "swiglu": True,
            "disable-bias-linear": True,
            "hidden-dropout": 0.0,
            "attention-dropout": 0.0,
            # Rows that a trainer adds to the vocabulary would start from random values.
            "make-vocab-size-divisible-by": 1,
        }
        if self.groups != self.heads:
            flags |= {"group-query-attention": True, "num-query-groups": self.groups}
        if self.rope_scaling is not None:
            flags |= {"use-rope-scaling": True, "rope-scaling-factor": self.rope_scaling}
        if not self.tied:
            flags["untie-embeddings-and-output-weights"] = True
        if self.half is not None:
            flags[self.half] = True
        if self.mhc is not None:
            flags |= {
                "mhc": True,
                "mhc-num-residual-streams": self.mhc.num_streams,
                "mhc-sinkhorn-iterations": self.mhc.sinkhorn_iterations,
                "mhc-eps": self.mhc.eps,
            }
        return flags


def _is(*fine: object) -> Callable[[object], bool]:
    return lambda value: value in fine


_NOT_SET = _is(None, False)
# Megatron argument: what a Llama has, for the check and in words.
_MEGATRON: dict[str, tuple[Callable[[object], bool], str]] = {
    "normalization": (_is("RMSNorm"), "RMSNorm"),
    "swiglu": (_is(True), "--swiglu"),
    "glu_linear_offset": (_is(None, 0.0), "0"),
    "activation_func_clamp_value": (_NOT_SET, "none"),
    "add_bias_linear": (_NOT_SET, "--disable-bias-linear"),
    "add_qkv_bias": (_NOT_SET, "none"),
    "qk_layernorm": (_NOT_SET, "none"),
    "qk_l2_norm": (_NOT_SET, "none"),
    "position_embedding_type": (_is("rope"), "rope"),
    "rotary_percent": (_is(1.0), "1.0"),
    "rotary_interleaved": (_NOT_SET, "none"),
    "rotary_seq_len_interpolation_factor": (_NOT_SET, "none"),
    "layernorm_zero_centered_gamma": (_NOT_SET, "none"),
    "apply_residual_connection_post_layernorm": (_NOT_SET, "none"),
    "use_mup": (_NOT_SET, "none"),
    "num_experts": (_NOT_SET, "a dense model"),
    "multi_latent_attention": (_NOT_SET, "none"),
    "attention_output_gate": (_NOT_SET, "none"),
    "softmax_type": (_is(None, "vanilla"), "vanilla"),
    "window_size": (_NOT_SET, "none"),
    "no_rope_freq": (_NOT_SET, "none"),
    "mtp_num_layers": (_is(None, 0), "none"),
    "experimental_attention_variant": (_NOT_SET, "none"),
    "hybrid_layer_pattern": (_NOT_SET, "none"),
}
# Hugging Face config: the same.
_HUGGING_FACE: dict[str, tuple[Callable[[object], bool], str]] = {
    "hidden_act": (_is("silu"), "silu"),
    "attention_bias": (_NOT_SET, "no bias"),
    "mlp_bias": (_NOT_SET, "no bias"),
    "is_causal": (_is(None, True), "true"),
}
_COUNTS = (
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_MAY_BE_NULL = ("num_key_value_heads", "head_dim")
# What transformers takes for a key that is not there.
_LLAMA = {"rms_norm_eps": 1e-6, "max_position_embeddings": 2048, "tie_word_embeddings": False}
_MISTRAL = {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
_MHC_NAMES = {"num_streams": "hc_mult", "sinkhorn_iterations": "hc_sinkhorn_iters", "eps": "hc_eps"}
ROPE_SCALING = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""Of Llama 3.1 and later, beside the factor; Megatron has these numbers in its code."""
# A Mistral without a sliding window is a Llama.
MODEL_TYPES = ("llama", "mistral", "mhc_llama")


def _refuse(source: str, problems: list[str]) -> None:
    if problems:
        lines = "\n".join(problems)
        raise UserError(f"{source}: only Llamas, plain or with mHC, are converted\n{lines}")


def from_megatron(args, source: str) -> Architecture:
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
    _refuse(source, problems)
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


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _is_positive(value: object) -> bool:
    return type(value) in (int, float) and 0 < value < math.inf


def _numbers(config: dict) -> list[str]:
    """What is wrong with the numbers of a config."""
    problems = [
        f"{name} {json.dumps(config.get(name))}: expected a whole number, 1 or more"
        for name in _COUNTS
        if not _is_count(config.get(name))
        and not (name in _MAY_BE_NULL and config.get(name) is None)
    ]
    if not _is_positive(config["rms_norm_eps"]):
        problems.append(f"rms_norm_eps {config['rms_norm_eps']}: expected a number above 0")
    if type(config["tie_word_embeddings"]) is not bool:
        problems.append(f"tie_word_embeddings {config['tie_word_embeddings']}: expected a boolean")
    heads, groups = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if _is_count(heads) and _is_count(groups) and heads % groups:
        problems.append(
            f"num_key_value_heads {groups}: does not divide num_attention_heads {heads}"
        )
    return problems


def _rope(config: dict, problems: list[str]) -> tuple[float, float | None]:
    """Base and Llama 3.1's factor; adds what Megatron's flags cannot say to ``problems``."""
    # transformers 5 keeps the base in rope_parameters, 4 beside a rope_scaling.
    names = [name for name in ("rope_parameters", "rope_scaling") if config.get(name)]
    if len(names) == 2:
        problems.append("rope_parameters and rope_scaling: expected one of them")
    rope = config[names[0]] if names else {}
    if not isinstance(rope, dict):
        problems.append(f"{names[0]} {rope}: expected an object")
        rope = {}
    base = rope.get("rope_theta", config.get("rope_theta", 10000.0))
    if not _is_positive(base) or base != int(base):
        problems.append(f"rope_theta {json.dumps(base)}: --rotary-base takes whole numbers above 0")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return base, None
    if kind != "llama3":
        problems.append(f"rope_type {kind}: expected default or llama3")
        return base, None
    problems += [
        f"{name} {rope.get(name)}: expected {value}, which Megatron has in its code"
        for name, value in ROPE_SCALING.items()
        if name != "rope_type" and rope.get(name) != value
    ]
    if not _is_positive(rope.get("factor")):
        problems.append(f"factor {rope.get('factor')}: expected a llama3 rope's, above 0")
    return base, rope.get("factor")


def _mhc(config: dict, problems: list[str]) -> MHCConfig | None:
    """Streams of an mhc_llama; adds what is out of range to ``problems``."""
    wrong = [name for name in _MHC_NAMES.values() if type(config.get(name)) not in (int, float)]
    if wrong:
        problems += [f"{name} {json.dumps(config.get(name))}: expected a number" for name in wrong]
        return None
    try:
        return MHCConfig(**{field: config[name] for field, name in _MHC_NAMES.items()})
    except ValueError as error:
        field, _, rest = str(error).partition("=")
        problems.append(f"{_MHC_NAMES[field]} {rest}")
        return None


def from_hugging_face(config: dict, source: str) -> Architecture:
    """The architecture of a config.json.

    Args:
        config: its content; ``half`` is told by the weights. source: the folder, for errors.

    Raises:
        UserError: it is no Llama's, or names what Megatron's flags cannot say.
    """
    kind = config.get("model_type")
    problems = []
    if kind not in MODEL_TYPES:
        problems.append(f"model_type {kind}: expected one of {', '.join(MODEL_TYPES)}")
    config = {**_LLAMA, **(_MISTRAL if kind == "mistral" else {}), **config}
    if kind == "mistral" and config["sliding_window"] is not None:
        problems.append(f"sliding_window {config['sliding_window']}: expected null")
    if config.get("quantization_config"):
        problems.append("quantization_config: expected weights that are not quantized")
    problems += [
        f"{name} {config[name]}: expected {words}"
        for name, (fine, words) in _HUGGING_FACE.items()
        if name in config and not fine(config[name])
    ]
    problems += _numbers(config)
    base, scaling = _rope(config, problems)
    mhc = _mhc(config, problems) if kind == "mhc_llama" else None
    _refuse(source, problems)
    heads = config["num_attention_heads"]
    return Architecture(
        layers=config["num_hidden_layers"],
        hidden=config["hidden_size"],
        ffn=config["intermediate_size"],
        heads=heads,
        groups=config.get("num_key_value_heads") or heads,
        head_channels=config.get("head_dim") or config["hidden_size"] // heads,
        vocabulary=config["vocab_size"],
        positions=config["max_position_embeddings"],
        norm_eps=config["rms_norm_eps"],
        rope_base=float(base),
        rope_scaling=None if scaling is None else float(scaling),
        tied=config["tie_word_embeddings"],
        half=None,
        mhc=mhc,
    )
