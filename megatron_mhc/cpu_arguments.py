"""Megatron's flags whose defaults a machine without a GPU cannot serve."""

import argparse

import torch

DEFAULTS = {
    "transformer_impl": "local",
    "distributed_backend": "gloo",
    "use_cpu_initialization": True,
    "gradient_accumulation_fusion": False,
    "masked_softmax_fusion": False,
    "bias_gelu_fusion": False,
    "bias_swiglu_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "no_persist_layer_norm": True,
}


def set_defaults(parser: argparse.ArgumentParser) -> None:
    """Change the defaults where there is no GPU; flags on the command line still win."""
    if torch.cuda.is_available():
        return
    known = {action.dest for action in parser._actions}
    missing = sorted(set(DEFAULTS) - known)
    if missing:
        raise RuntimeError(f"Megatron's parser has no {', '.join(missing)}: its flags were renamed")
    parser.set_defaults(**DEFAULTS)
