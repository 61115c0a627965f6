"""From the flags of a training run to a table of what its activations take."""

import argparse
from collections.abc import Callable

from rich.table import Table

from . import activation_memory
from .activation_memory import Stage, passes_in_flight
from .errors import UserError
from .recompute_blocks import best_block_layers

_NOT_COUNTED: tuple[tuple[str, Callable[[argparse.Namespace], object], str], ...] = (
    ("--recompute-granularity", lambda args: args.recompute_granularity, "leave it out"),
    ("--num-experts", lambda args: args.num_experts, "only dense layers are counted"),
    (
        "--multi-latent-attention",
        lambda args: args.multi_latent_attention,
        "only multi-head and group-query attention are counted",
    ),
    (
        "--transformer-impl",
        lambda args: None if args.transformer_impl == "transformer_engine" else "local",
        "only Transformer Engine layers are counted",
    ),
)


def _needed(args: argparse.Namespace, name: str) -> int:
    value = getattr(args, name)
    if value is None:
        raise UserError(f"--{name.replace('_', '-')}: is needed to count activations; give it")
    return value


def _virtual_stages(args: argparse.Namespace, layers: int) -> int:
    """Stages to a pipeline rank."""
    if args.num_virtual_stages_per_pipeline_rank is not None:
        return args.num_virtual_stages_per_pipeline_rank
    if args.num_layers_per_virtual_pipeline_stage is not None:
        return layers // (
            args.pipeline_model_parallel_size * args.num_layers_per_virtual_pipeline_stage
        )
    return 1


def stages(args: argparse.Namespace) -> list[Stage]:
    """One stage of every pipeline rank, with the passes in flight there.

    Args:
        args: from Megatron's parser; need not have been validated.

    Raises:
        UserError: a flag that is missing, or whose effect is not counted.
    """
    for flag, value_of, remedy in _NOT_COUNTED:
        value = value_of(args)
        if value:
            shown = "" if value is True else f" {value}"
            raise UserError(f"{flag}{shown}: is not in the estimate; {remedy}")
    layers, hidden = _needed(args, "num_layers"), _needed(args, "hidden_size")
    heads = _needed(args, "num_attention_heads")
    micro_batch = _needed(args, "micro_batch_size")
    ranks = args.pipeline_model_parallel_size
    virtual = _virtual_stages(args, layers)
    if virtual < 1 or layers % (ranks * virtual):
        raise UserError(
            f"--num-layers {layers}: does not divide into {ranks} pipeline ranks of {virtual} "
            f"stages; use a multiple of {ranks * max(1, virtual)}"
        )
    channels = args.kv_channels or hidden // heads
    ffn = args.ffn_hidden_size
    if ffn is None:  # Megatron's own defaults
        ffn = int(4 * hidden * 2 / 3 / 64) * 64 if args.swiglu else 4 * hidden
    groups = args.num_query_groups if args.group_query_attention else heads
    tokens = _needed(args, "seq_length") * micro_batch // args.context_parallel_size
    # Without a batch size the pipeline is taken to be full.
    batch = args.global_batch_size
    micro_batches = ranks * virtual if batch is None else batch // micro_batch
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
            tensor_parallel=args.tensor_model_parallel_size,
            sequence_parallel=args.sequence_parallel,
            in_flight=passes_in_flight(rank, ranks, virtual, micro_batches),
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
