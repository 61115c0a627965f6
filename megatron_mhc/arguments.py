"""The --mhc group of flags, and what makes of them an MHCConfig."""

import argparse

from .config import MHCConfig
from .errors import UserError
from .incompatible import refuse_incompatible

# Filled in after parsing, so that a flag given without --mhc can be told from a default.
DEFAULTS = {
    "mhc_num_residual_streams": MHCConfig.num_streams,
    "mhc_sinkhorn_iterations": MHCConfig.sinkhorn_iterations,
    "mhc_init_gating_factor": MHCConfig.init_gating_factor,
    "mhc_residual_mixing": MHCConfig.residual_mixing,
    "mhc_eps": MHCConfig.eps,
    "mhc_backend": MHCConfig.backend,
    "mhc_pipeline_overlap": "post",
    "mhc_pipeline_transport": "auto",
    "mhc_recompute": MHCConfig.recompute,
    "mhc_recompute_layer_num": MHCConfig.recompute_layer_num,
    "mhc_log_gain_interval": 0,
}

FLAG_OF_FIELD = {
    "num_streams": "--mhc-num-residual-streams",
    "sinkhorn_iterations": "--mhc-sinkhorn-iterations",
    "init_gating_factor": "--mhc-init-gating-factor",
    "residual_mixing": "--mhc-residual-mixing",
    "eps": "--mhc-eps",
    "backend": "--mhc-backend",
    "recompute": "--mhc-recompute",
    "recompute_layer_num": "--mhc-recompute-layer-num",
}
"""MHCConfig field to the flag that sets it."""


def flag(name: str) -> str:
    """An argument's name as it is typed."""
    return "--" + name.replace("_", "-")


def add_mhc_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the --mhc group; Megatron's ``extra_args_provider``."""
    group = parser.add_argument_group("mHC", "manifold-constrained hyper-connections")
    group.add_argument("--mhc", action="store_true", help="Train with mHC residual streams.")
    group.add_argument(
        "--mhc-num-residual-streams",
        type=int,
        help="Residual streams n; 1 is the plain residual. [4]",
    )
    group.add_argument(
        "--mhc-residual-mixing",
        choices=("sinkhorn", "unconstrained", "identity"),
        help="sinkhorn: doubly stochastic (mHC); unconstrained: hyper-connections, the unstable "
        "baseline; identity: streams do not mix across a sublayer. [sinkhorn]",
    )
    group.add_argument(
        "--mhc-sinkhorn-iterations", type=int, help="Sinkhorn-Knopp iterations. [20]"
    )
    group.add_argument(
        "--mhc-init-gating-factor", type=float, help="Initial value of every scale. [0.01]"
    )
    group.add_argument(
        "--mhc-eps", type=float, help="Added to pre and in Sinkhorn (DeepSeek-V4's hc_eps). [1e-6]"
    )
    group.add_argument(
        "--mhc-backend",
        choices=("auto", "triton", "torch"),
        help="Kernels; auto takes Triton where it can and says so where it cannot. [auto]",
    )
    group.add_argument(
        "--mhc-pipeline-overlap",
        choices=("none", "post"),
        help="post: a pipeline stage's last merge is formed and sent on a high-priority stream, "
        "and nothing waits for it; none: as Megatron sends. [post]",
    )
    group.add_argument(
        "--mhc-pipeline-transport",
        choices=("auto", "copy", "nccl"),
        help="How overlap post moves boundaries. copy: by the GPUs' copy engines, which take no "
        "SM, within one host; auto: copy where it can be had, else nccl. [auto]",
    )
    group.add_argument(
        "--mhc-recompute",
        action="store_true",
        default=None,
        help="Discard streams and sublayer inputs, and replay them in the backward pass. [off]",
    )
    group.add_argument(
        "--mhc-recompute-layer-num",
        type=int,
        help="Transformer layers (two sublayers each) to a recomputed block. "
        "[the paper's eq. 20 for the layers of the stage]",
    )
    group.add_argument(
        "--mhc-log-gain-interval",
        type=int,
        help="Log gains and mean mappings to TensorBoard / W&B every so many steps; 0: never. [0]",
    )
    group.add_argument(
        "--mhc-force-patches",
        action="store_true",
        help="Patch a Megatron whose source is not one that the patches were tested on.",
    )
    # Megatron 0.19.2 has a help text whose bare percent sign ends --help in a traceback.
    for action in parser._actions:
        if action.help and "10%)" in action.help:
            action.help = action.help.replace("10%)", "10%%)")
    return parser


def fill_in_defaults(args: argparse.Namespace) -> None:
    """Set what was not given of DEFAULTS.

    Raises:
        UserError: names the flags that have no effect without --mhc, and their values.
    """
    given = [name for name in DEFAULTS if getattr(args, name, None) is not None]
    if given and not args.mhc:
        values = ", ".join(f"{flag(name)} {getattr(args, name)}" for name in given)
        values = values.replace(" True", "")
        raise UserError(f"{values}: has no effect without --mhc; add --mhc or leave it out")
    for name, default in DEFAULTS.items():
        if name not in given:
            setattr(args, name, default)


def mhc_config_from_args(args: argparse.Namespace) -> MHCConfig:
    """The settings that the flags ask for.

    Raises:
        UserError: names the flag, its value and what would be right.
    """
    values = {
        field: getattr(args, name.lstrip("-").replace("-", "_"))
        for field, name in FLAG_OF_FIELD.items()
    }
    try:
        return MHCConfig(**values)
    except ValueError as error:
        field, _, rest = str(error).partition("=")
        rest = rest.replace("recompute=True", "--mhc-recompute")
        raise UserError(f"{FLAG_OF_FIELD[field]} {rest}") from None


def validate_mhc_args(args: argparse.Namespace) -> MHCConfig | None:
    """Fill in defaults and refuse what cannot work, before any compute.

    Args:
        args: Megatron's arguments after its own validation.

    Returns:
        The settings, or None where the model is to be plain: no --mhc, or one stream.

    Raises:
        UserError: names the flag, its value and the remedy.
    """
    fill_in_defaults(args)
    if not args.mhc:
        return None
    if args.mhc_pipeline_transport != "auto" and args.mhc_pipeline_overlap == "none":
        raise UserError(
            f"--mhc-pipeline-transport {args.mhc_pipeline_transport}: Megatron sends under "
            "--mhc-pipeline-overlap none; leave one of them out"
        )
    if args.mhc_log_gain_interval < 0:
        raise UserError(
            f"--mhc-log-gain-interval {args.mhc_log_gain_interval}: "
            "expected 0 (never) or a number of steps"
        )
    mhc = mhc_config_from_args(args)
    if mhc.num_streams == 1:
        return None
    refuse_incompatible(args)
    return mhc
