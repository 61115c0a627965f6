"""From the flags of a training run to a table of what its activations take."""

import argparse

from rich.table import Table

from . import activation_memory
from .activation_memory import Stage, passes_in_flight
from .arguments import DEFAULTS, add_mhc_args, mhc_config_from_args
from .config import MHCConfig
from .errors import UserError
from .memory_sizes import check_sizes, virtual_stages
from .micro_batch_groups import check_groups
from .recompute_blocks import best_block_layers
from .uncounted import refuse_uncounted


def make_parser(description: str) -> argparse.ArgumentParser:
    """Takes the flags of a training, and how many replicas it has, which Megatron works out."""
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--data-parallel-size",
        type=int,
        default=1,
        help="of this tool: replicas that share --global-batch-size [1]",
    )
    return add_mhc_args(add_megatron_arguments(parser))


def settings(args: argparse.Namespace) -> MHCConfig:
    """What recompute would run with: the flags' values, with and without --mhc.

    Raises:
        UserError: names the flag, its value and what would be right.
    """
    given = {name: getattr(args, name) for name in DEFAULTS}
    filled = {name: DEFAULTS[name] if value is None else value for name, value in given.items()}
    mhc = mhc_config_from_args(argparse.Namespace(**{**filled, "mhc_recompute": True}))
    if mhc.num_streams == 1:
        raise UserError("--mhc-num-residual-streams 1: is the plain residual; use 2 or more")
    return mhc


def stages(args: argparse.Namespace) -> list[Stage]:
    """One stage of every pipeline rank, with the passes in flight there.

    Args:
        args: from :func:`make_parser`; need not have been validated by Megatron.

    Raises:
        UserError: a flag that is missing, that cannot be, or whose effect is not counted.
    """
    refuse_uncounted(args)
    check_sizes(args)
    layers, hidden, heads = args.num_layers, args.hidden_size, args.num_attention_heads
    ranks = args.pipeline_model_parallel_size
    virtual = virtual_stages(args)
    channels = args.kv_channels or hidden // heads
    ffn = args.ffn_hidden_size
    if ffn is None:  # Megatron's own defaults
        ffn = int(4 * hidden * 2 / 3 / 64) * 64 if args.swiglu else 4 * hidden
    groups = args.num_query_groups if args.group_query_attention else heads
    tokens = args.seq_length * args.micro_batch_size // args.context_parallel_size
    # Without chunks there are no groups.
    group = args.microbatch_group_size_per_vp_stage if virtual > 1 else None
    group = ranks if group is None else group
    micro_batches = group * virtual  # without a batch size the pipeline is taken to be full
    if args.global_batch_size is not None:
        micro_batches = args.global_batch_size // args.micro_batch_size // args.data_parallel_size
    if virtual > 1:
        batch = args.global_batch_size
        given = "a full pipeline" if batch is None else f"--global-batch-size {batch}"
        check_groups(group, ranks, micro_batches, given)
    return [
        Stage(
            layers=layers // (ranks * virtual),
            tokens=tokens,
            hidden=hidden,
            ffn=ffn,
            query=heads * channels,
            key_value=groups * channels,
            heads=heads,
            gated=args.swiglu,
            fp8=args.fp8 is not None,
            dropout=args.hidden_dropout > 0,
            tensor_parallel=args.tensor_model_parallel_size,
            sequence_parallel=args.sequence_parallel and args.tensor_model_parallel_size > 1,
            in_flight=passes_in_flight(rank, ranks, virtual, micro_batches, group),
        )
        for rank in range(ranks)
    ]


def report(args: argparse.Namespace, streams: int, block: int | None) -> Table:
    """GiB of activations on every pipeline rank: plain, mHC, mHC + recompute, and the best block.

    Args:
        args: as :func:`stages`. streams: n. block: layers to a block, None for eq. 20.

    Raises:
        UserError: as :func:`stages`, or a block larger than a stage.
    """
    table = Table(title="GiB of activations at the peak")
    for heading in ("rank", "layers of a stage", "passes in flight", "plain", "mHC"):
        table.add_column(heading, justify="right")
    table.add_column("mHC + recompute (N)", justify="right")
    table.add_column("the best N", justify="right")
    for rank, stage in enumerate(stages(args)):
        if block is not None and block > stage.layers:
            raise UserError(
                f"--mhc-recompute-layer-num {block}: a stage has {stage.layers} layers; "
                f"use 1 to {stage.layers}"
            )
        chosen = block or best_block_layers(stage.layers, streams)
        best = activation_memory.best_block(stage, streams)
        peaks = [
            activation_memory.plain(stage).peak,
            activation_memory.mhc(stage, streams).peak,
            activation_memory.recomputed(stage, streams, chosen).peak,
            activation_memory.recomputed(stage, streams, best).peak,
        ]
        plain, mhc, recomputed, least = (f"{peak / 2**30:.2f}" for peak in peaks)
        table.add_row(
            str(rank),
            str(stage.layers),
            str(stage.in_flight),
            plain,
            mhc,
            f"{recomputed} ({chosen})",
            f"{least} ({best})",
        )
    return table
