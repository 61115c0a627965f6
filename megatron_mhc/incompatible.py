"""The features of Megatron that do not work with mHC yet: one row each, refused by name."""

import argparse
from collections.abc import Callable
from dataclasses import dataclass

from .cuda_graph import FULL_ITERATION
from .errors import UserError

RECOMPUTE_MODULES = {"core_attn", "mlp", "moe", "shared_experts"}
"""Values of --recompute-modules that were tested with mHC."""


@dataclass(frozen=True)
class Incompatibility:
    """One feature that mHC refuses.

    Attributes:
        flag: as it is typed.
        used: the offending value from Megatron's arguments, or None where it is not in use.
        remedy: what to do instead.
    """

    flag: str
    used: Callable[[argparse.Namespace], object]
    remedy: str


def _set(name: str) -> Callable[[argparse.Namespace], object]:
    """The argument's value where it is truthy."""
    return lambda args: getattr(args, name, None) or None


def _other_than(name: str, *fine: object) -> Callable[[argparse.Namespace], object]:
    return lambda args: None if getattr(args, name, None) in fine else getattr(args, name)


def _untested_recompute(args: argparse.Namespace) -> object:
    if args.recompute_granularity != "selective":
        return None
    return " ".join(sorted(set(args.recompute_modules or []) - RECOMPUTE_MODULES)) or None


def _gains_of_stages(args: argparse.Namespace) -> object:
    if (args.pipeline_model_parallel_size or 1) == 1:
        return None
    return args.mhc_log_gain_interval or None


def _with_combined_1f1b(name: str) -> Callable[[argparse.Namespace], object]:
    def used(args: argparse.Namespace) -> object:
        combined = getattr(args, "overlap_moe_expert_parallel_comm", False)
        return (getattr(args, name) or None) if combined else None

    return used


def _with_full_iteration(name: str, fine: object) -> Callable[[argparse.Namespace], object]:
    def used(args: argparse.Namespace) -> object:
        graph = getattr(args, "cuda_graph_impl", None) == FULL_ITERATION
        return getattr(args, name) if graph and getattr(args, name) not in (None, fine) else None

    return used


def _unsaved_optimizer(args: argparse.Namespace) -> object:
    """--save, where Megatron's optimizer of a 16-bit model has no place for float32 parameters."""
    half = getattr(args, "bf16", False) or getattr(args, "fp16", False)
    if not half or args.use_distributed_optimizer or args.no_save_optim or args.skip_train:
        return None
    return args.save or None


_LEAVE_OUT = "leave it out with --mhc"

INCOMPATIBLE: tuple[Incompatibility, ...] = (
    Incompatibility(
        "--mhc-log-gain-interval",
        _gains_of_stages,
        "with --pipeline-model-parallel-size above 1 a stage sees the gains of its own layers "
        "only; use 0",
    ),
    Incompatibility(
        "--save",
        _unsaved_optimizer,
        "without --use-distributed-optimizer a 16-bit model's optimizer cannot be saved; add it "
        "(on one GPU too), or --no-save-optim",
    ),
    Incompatibility("--ckpt-format", _other_than("ckpt_format", "torch_dist"), "use torch_dist"),
    Incompatibility(
        "--optimizer-cpu-offload",
        _set("optimizer_cpu_offload"),
        "it cannot load float32 parameters of a 16-bit model; leave it out",
    ),
    Incompatibility(
        "--use-precision-aware-optimizer",
        _set("use_precision_aware_optimizer"),
        "its checkpoints do not have float32 parameters as they are; leave it out",
    ),
    Incompatibility("--mtp-num-layers", _set("mtp_num_layers"), _LEAVE_OUT),
    Incompatibility("--fp32-residual-connection", _set("fp32_residual_connection"), _LEAVE_OUT),
    Incompatibility(
        "--cuda-graph-impl",
        _other_than("cuda_graph_impl", None, "none", FULL_ITERATION),
        "a layer's graph takes plain tensors, not streams whose merge is deferred; use "
        f"{FULL_ITERATION}, or none",
    ),
    Incompatibility(
        "--pipeline-model-parallel-size",
        _with_full_iteration("pipeline_model_parallel_size", 1),
        f"--cuda-graph-impl {FULL_ITERATION} cannot capture a pipeline's boundaries; use 1",
    ),
    Incompatibility(
        "--mhc-log-gain-interval",
        _with_full_iteration("mhc_log_gain_interval", 0),
        f"--cuda-graph-impl {FULL_ITERATION} replays no Python, where gains are taken; use 0",
    ),
    Incompatibility(
        "--num-experts",
        _with_full_iteration("num_experts", None),
        f"--cuda-graph-impl {FULL_ITERATION} cannot capture counts of tokens that the host reads; "
        "leave one of them out",
    ),
    Incompatibility("--optimizer-cuda-graph", _set("optimizer_cuda_graph"), _LEAVE_OUT),
    Incompatibility("--enable-cuda-graph", _set("enable_cuda_graph"), _LEAVE_OUT),
    Incompatibility("--external-cuda-graph", _set("external_cuda_graph"), _LEAVE_OUT),
    Incompatibility(
        "--transformer-impl",
        lambda args: (
            args.transformer_impl if args.transformer_impl == "inference_optimized" else None
        ),
        "use transformer_engine or local",
    ),
    Incompatibility(
        "--recompute-modules",
        _untested_recompute,
        f"use some of {' '.join(sorted(RECOMPUTE_MODULES))}, or --recompute-granularity full",
    ),
    Incompatibility(
        "--distribute-saved-activations",
        _set("distribute_saved_activations"),
        "leave it out; sequence parallelism splits the streams that are kept",
    ),
    Incompatibility(
        "--mhc-recompute",
        _with_combined_1f1b("mhc_recompute"),
        "--overlap-moe-expert-parallel-comm cuts the graph that it replays; leave one of them out",
    ),
    Incompatibility(
        "--mhc-log-gain-interval",
        _with_combined_1f1b("mhc_log_gain_interval"),
        "--overlap-moe-expert-parallel-comm runs no layer's forward pass, where gains are taken; "
        "use 0",
    ),
    Incompatibility(
        "--fine-grained-activation-offloading",
        _set("fine_grained_activation_offloading"),
        _LEAVE_OUT,
    ),
    Incompatibility("--cpu-offloading-num-layers", _set("cpu_offloading_num_layers"), _LEAVE_OUT),
    Incompatibility(
        "--heterogeneous-layers-config-path", _set("heterogeneous_layers_config_path"), _LEAVE_OUT
    ),
    Incompatibility("--hybrid-layer-pattern", _set("hybrid_layer_pattern"), _LEAVE_OUT),
    Incompatibility(
        "--experimental-attention-variant", _set("experimental_attention_variant"), _LEAVE_OUT
    ),
    Incompatibility("--use-megatron-fsdp", _set("use_megatron_fsdp"), "use Megatron's own DDP"),
    Incompatibility("--use-torch-fsdp2", _set("use_torch_fsdp2"), "use Megatron's own DDP"),
    Incompatibility(
        "--init-model-with-meta-device", _set("init_model_with_meta_device"), _LEAVE_OUT
    ),
    Incompatibility("--inprocess-restart", _set("inprocess_restart"), _LEAVE_OUT),
    Incompatibility("--logits-load-dir", _set("logits_load_dir"), _LEAVE_OUT),
    Incompatibility("--spec", _set("spec"), "mHC brings its own layer spec; leave it out"),
    Incompatibility("--yaml-cfg", _set("yaml_cfg"), "give the flags on the command line"),
)


def refuse_incompatible(args: argparse.Namespace) -> None:
    """Refuse features that do not work with mHC yet, all in one message.

    Raises:
        UserError: one line per flag: its name, its value and the remedy.
    """
    lines = []
    for row in INCOMPATIBLE:
        value = row.used(args)
        if value is not None:
            shown = "" if value is True else f" {value}"
            with_mhc = "" if row.flag.startswith("--mhc") else " with --mhc"
            lines.append(f"{row.flag}{shown}: does not work{with_mhc} yet; {row.remedy}")
    if lines:
        raise UserError("\n".join(lines))
