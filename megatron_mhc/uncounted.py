"""Flags whose effect on activations the estimate does not know: one row each, refused by name."""

import argparse
from collections.abc import Callable

from .errors import UserError

_LEAVE_OUT = "leave it out"
_TYPED = "no file is read here; give the sizes as flags"
_EVEN = "only pipelines of equal stages are counted"


def _given(name: str) -> Callable[[argparse.Namespace], object]:
    return lambda args: getattr(args, name, None)


def _attention(args: argparse.Namespace) -> str | None:
    name = args.attention_backend.name
    return name if name in ("unfused", "local") else None


UNCOUNTED: tuple[tuple[str, Callable[[argparse.Namespace], object], str], ...] = (
    ("--recompute-granularity", _given("recompute_granularity"), _LEAVE_OUT),
    ("--recompute-activations", _given("recompute_activations"), _LEAVE_OUT),
    ("--num-experts", _given("num_experts"), "only dense layers are counted"),
    ("--mtp-num-layers", _given("mtp_num_layers"), "only the decoder's layers are counted"),
    (
        "--multi-latent-attention",
        _given("multi_latent_attention"),
        "only multi-head and group-query attention are counted",
    ),
    (
        "--transformer-impl",
        lambda args: None if (impl := args.transformer_impl) == "transformer_engine" else impl,
        "only Transformer Engine layers are counted",
    ),
    ("--attention-backend", _attention, "only flash and fused attention are counted"),
    ("--fp32-residual-connection", _given("fp32_residual_connection"), _LEAVE_OUT),
    ("--cpu-offloading-num-layers", _given("cpu_offloading_num_layers"), _LEAVE_OUT),
    (
        "--fine-grained-activation-offloading",
        _given("fine_grained_activation_offloading"),
        _LEAVE_OUT,
    ),
    ("--pipeline-model-parallel-layout", _given("pipeline_model_parallel_layout"), _EVEN),
    ("--decoder-first-pipeline-num-layers", _given("decoder_first_pipeline_num_layers"), _EVEN),
    ("--decoder-last-pipeline-num-layers", _given("decoder_last_pipeline_num_layers"), _EVEN),
    (
        "--account-for-embedding-in-pipeline-split",
        _given("account_for_embedding_in_pipeline_split"),
        _EVEN,
    ),
    ("--account-for-loss-in-pipeline-split", _given("account_for_loss_in_pipeline_split"), _EVEN),
    ("--freeze-all-layers", _given("freeze_all_layers"), _LEAVE_OUT),
    ("--yaml-cfg", _given("yaml_cfg"), _TYPED),
    ("--use-checkpoint-args", _given("use_checkpoint_args"), _TYPED),
    (
        "--use-mp-args-from-checkpoint-args",
        _given("use_mp_args_from_checkpoint_args"),
        _TYPED,
    ),
)


def refuse_uncounted(args: argparse.Namespace) -> None:
    """Raises UserError for a flag in use that would change the estimate, if it knew how."""
    if not (args.bf16 or args.fp16):
        raise UserError("--bf16: only activations of 16 bits are counted; give it, or --fp16")
    for flag, value_of, remedy in UNCOUNTED:
        value = value_of(args)
        if value:
            shown = "" if value is True else f" {value}"
            raise UserError(f"{flag}{shown}: is not in the estimate; {remedy}")
