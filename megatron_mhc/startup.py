"""From the command line to what ``pretrain`` takes; what can be refused is refused here."""

import argparse
import itertools
import os
import traceback
from pathlib import Path

from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import LayerType
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
from megatron.training.arguments import parse_and_validate_args
from megatron.training.config import PretrainConfigContainer
from megatron.training.models.gpt import GPTModelConfig

from megatron_mhc import kernels, patches

from . import cpu_arguments, cuda_graph
from .arguments import add_mhc_args, validate_mhc_args
from .checkpoint_guard import check_checkpoint
from .config import MHCConfig
from .context_parallel import refuse_undivided_attention
from .errors import UserError
from .pipeline.boundary import PriorityStream
from .pipeline.slots import DeferredCommunicator, DeferredGroups, make_communicator
from .pretraining import refuse_missing_data, refuse_unsupported_data
from .recompute_blocks import describe_blocks
from .specs import MHCLayerSpec


def _add_arguments(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    cpu_arguments.set_defaults(parser)
    return add_mhc_args(parser)


CONNECTIONS = "CUDA_DEVICE_MAX_CONNECTIONS"


def _parse() -> argparse.Namespace:
    """Megatron's arguments, as it validates them."""
    try:
        return parse_and_validate_args(extra_args_provider=_add_arguments)
    except AssertionError as refusal:
        said = str(refusal)
        if CONNECTIONS not in said:
            # Not every message names a flag, and some asserts have none: their code does.
            at = traceback.extract_tb(refusal.__traceback__)[-1]
            raise UserError(
                f"Megatron: {said or 'refused'} ({Path(at.filename).name}:{at.lineno}: {at.line})"
            ) from refusal
    value = os.environ.get(CONNECTIONS, "is not set")
    if value == "1":
        raise UserError(
            f"{CONNECTIONS} 1: with --use-torch-fsdp2 or --use-megatron-fsdp Megatron wants more "
            "than 1; unset it"
        )
    raise UserError(
        f"{CONNECTIONS} {value}: with --tensor-model-parallel-size or --context-parallel-size "
        f"above 1 Megatron wants 1 on GPUs before Blackwell; export {CONNECTIONS}=1"
    )


MEGATRON_ROPE_SCALING = 8.0


def _model_config(args: argparse.Namespace) -> GPTModelConfig:
    model = gpt_config_from_args(args)
    # Megatron 0.19.2 has this flag and forgets it.
    model.rope_scaling_factor = args.rope_scaling_factor
    return model


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


_COMBINED = (
    "mHC: combined 1F1B, a mixture's merge follows its combine on a high-priority stream "
    "(--overlap-moe-expert-parallel-comm)"
)


def _pipeline_line(config, communicator: DeferredCommunicator, overlap: str) -> str:
    """Which schedule and which streams are in use."""
    chunks = config.virtual_pipeline_model_parallel_size
    schedule = f"interleaved 1F1B, {chunks} chunks per stage" if chunks else "1F1B"
    if overlap == "none":
        how = "merged and sent on the main stream, as Megatron does"
    elif isinstance(communicator.boundary, PriorityStream):
        how = "merged and sent on a high-priority stream that nothing waits for"
    else:
        how = "merged and sent in program order (no streams on a CPU), not waited for"
    return (
        f"mHC pipeline: {config.pipeline_model_parallel_size} stages, {schedule}; boundaries "
        f"[s, b, {communicator.num_streams * config.hidden_size}] are {how} "
        f"(--mhc-pipeline-overlap {overlap})"
    )


def _stage_layers(config: TransformerConfig) -> list[int]:
    """Transformer layers of every pipeline stage, virtual ones apart."""
    virtual = config.virtual_pipeline_model_parallel_size
    places = itertools.product(range(config.pipeline_model_parallel_size), range(virtual or 1))
    layout = config.pipeline_model_parallel_layout
    if layout is not None:
        return [layout.layout[rank][stage].count(LayerType.decoder) for rank, stage in places]
    return [
        get_num_layers_to_build(config, vp_stage=None if virtual is None else stage, pp_rank=rank)
        for rank, stage in places
    ]


def parse_arguments() -> tuple[PretrainConfigContainer, dict]:
    """Parse and check the command line, patch Megatron, and configure the model.

    Returns:
        The container that ``megatron.training.pretrain`` takes, and further keyword arguments for
        it: what a model of several pipeline stages needs, else none.

    Raises:
        UserError: names the flag or file, its value and what would be right.
    """
    args = _parse()
    refuse_unsupported_data(args)
    refuse_undivided_attention(args)
    cuda_graph.refuse_uncapturable(args)
    mhc = validate_mhc_args(args)
    refuse_missing_data(args)
    model = _model_config(args)
    lines = [_model_line(args, mhc)]
    if mhc is not None and mhc.recompute:
        lines.append(describe_blocks(mhc, _stage_layers(model.transformer)))
    if args.cuda_graph_impl == cuda_graph.FULL_ITERATION:
        lines.append(cuda_graph.describe(args))
    if args.use_rope_scaling and args.rope_scaling_factor != MEGATRON_ROPE_SCALING:
        lines.append(
            f"--rope-scaling-factor {args.rope_scaling_factor} is used; Megatron 0.19.2 alone, and "
            f"checkpoints that it made, have {MEGATRON_ROPE_SCALING} whatever the flag says"
        )
    lines += check_checkpoint(args)
    used = {
        "--mhc-recompute": mhc is not None and mhc.recompute,
        "--overlap-moe-expert-parallel-comm": mhc is not None
        and args.overlap_moe_expert_parallel_comm,
    }
    flags = [flag for flag, use in used.items() if use]
    try:
        patches.apply(force=args.mhc_force_patches, flags=flags)
    except patches.PatchRefused as refusal:
        raise UserError(str(refusal)) from None
    lines.append(patches.start_up_line())

    slots = {}
    if mhc is not None:
        if args.overlap_moe_expert_parallel_comm:
            model.transformer.high_priority_a2a_comm_stream = True
            lines.insert(1, _COMBINED)
        overlap = args.mhc_pipeline_overlap
        communicator = make_communicator(
            model.transformer, mhc.num_streams, overlap, args.mhc_pipeline_transport
        )
        model.transformer_layer_spec = MHCLayerSpec(mhc, communicator)
        if communicator is not None:
            slots = {"p2p_communicator": communicator, "pg_collection": DeferredGroups()}
            lines.insert(1, _pipeline_line(model.transformer, communicator, overlap))
    if args.rank == 0:
        print("\n".join(lines), flush=True)
    return pretrain_cfg_container_from_args(args, model), slots
