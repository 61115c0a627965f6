"""From the command line to what ``pretrain`` takes; what can be refused is refused here."""

import argparse

from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.config import PretrainConfigContainer

from megatron_mhc import kernels, patches

from . import cpu_arguments
from .arguments import add_mhc_args, validate_mhc_args
from .checkpoint_guard import check_checkpoint
from .config import MHCConfig
from .errors import UserError
from .pretraining import refuse_unsupported_data
from .specs import MHCLayerSpec


def _add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    cpu_arguments.set_defaults(parser)
    return add_mhc_args(parser)


def _model_line(args: argparse.Namespace, mhc: MHCConfig | None) -> str:
    if mhc is None:
        why = "--mhc-num-residual-streams 1" if args.mhc else "no --mhc"
        return f"mHC: off ({why}); the residual is plain"
    line = f"mHC: {mhc.num_streams} residual streams, {mhc.residual_mixing} mixing"
    if mhc.residual_mixing == "sinkhorn":
        line += f" with {mhc.sinkhorn_iterations} iterations"
    try:
        chosen = kernels.choose_backend(
            mhc.backend,
            n=mhc.num_streams,
            channels=args.hidden_size,
            residual_mixing=mhc.residual_mixing,
            dtype=args.params_dtype,
        )
    except RuntimeError as problem:
        raise UserError(f"--mhc-{problem}") from None
    return f"{line}, kernels: {chosen} (--mhc-backend {mhc.backend})"


def parse_arguments() -> PretrainConfigContainer:
    """Parse and check the command line, patch Megatron, and configure the model.

    Returns:
        The container that ``megatron.training.pretrain`` takes.

    Raises:
        UserError: names the flag or file, its value and what would be right.
    """
    args = parse_and_validate_args(extra_args_provider=_add_arguments)
    refuse_unsupported_data(args)
    mhc = validate_mhc_args(args)
    lines = [_model_line(args, mhc), *check_checkpoint(args)]
    try:
        patches.apply(force=args.mhc_force_patches)
    except patches.PatchRefused as refusal:
        raise UserError(str(refusal)) from None
    lines.append(patches.start_up_line())
    if args.rank == 0:
        print("\n".join(lines), flush=True)

    model = gpt_config_from_args(args)
    if mhc is not None:
        model.transformer_layer_spec = MHCLayerSpec(mhc)
    return pretrain_cfg_container_from_args(args, model)
