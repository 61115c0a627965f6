"""A model as a Hugging Face config.json, both ways."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from megatron_mhc.config import MHCConfig

from .architecture import NOT_SET, Architecture, is_one_of, refuse

MODELING = Path(__file__).with_name("modeling_mhc_llama.py")
# Key: what a Llama has, for the check and in words.
_HUGGING_FACE: dict[str, tuple[Callable[[object], bool], str]] = {
    "hidden_act": (is_one_of("silu"), "silu"),
    "attention_bias": (NOT_SET, "no bias"),
    "mlp_bias": (NOT_SET, "no bias"),
    "is_causal": (is_one_of(None, True), "true"),
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


def from_config(config: dict, source: str) -> Architecture:
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
    refuse(source, problems)
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


def write_config(folder: Path, model: Architecture, dtype: torch.dtype) -> None:
    """config.json of a Llama, or of an mHC Llama with the code that transformers needs for it."""
    from transformers import LlamaConfig

    from .modeling_mhc_llama import MHCLlamaConfig

    rope = {"rope_type": "default", "rope_theta": model.rope_base}
    if model.rope_scaling is not None:
        rope |= {**ROPE_SCALING, "factor": model.rope_scaling}
    fields = {
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.head_channels,
        "max_position_embeddings": model.positions,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tied,
        "dtype": str(dtype).removeprefix("torch."),
        # A tokenizer's, which a checkpoint of Megatron's does not hold.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model.mhc is None:
        config = LlamaConfig(**fields, architectures=["LlamaForCausalLM"])
    else:
        code = MODELING.stem
        config = MHCLlamaConfig(
            **fields,
            architectures=["MHCLlamaForCausalLM"],
            auto_map={
                "AutoConfig": f"{code}.MHCLlamaConfig",
                "AutoModelForCausalLM": f"{code}.MHCLlamaForCausalLM",
            },
            hc_mult=model.mhc.num_streams,
            hc_sinkhorn_iters=model.mhc.sinkhorn_iterations,
            hc_eps=model.mhc.eps,
        )
        shutil.copy(MODELING, folder)
    config.save_pretrained(folder)
