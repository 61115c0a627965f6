"""The sizes that the memory estimate needs: given, positive, and divided as Megatron does it."""

import argparse

from .arguments import flag
from .errors import UserError

NEEDED = (
    "num_layers",
    "hidden_size",
    "num_attention_heads",
    "micro_batch_size",
    "seq_length",
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "context_parallel_size",
    "data_parallel_size",
)
VIRTUAL = ("num_layers_per_virtual_pipeline_stage", "num_virtual_stages_per_pipeline_rank")
OPTIONAL = (
    *VIRTUAL,
    "ffn_hidden_size",
    "kv_channels",
    "num_query_groups",
    "global_batch_size",
)


def virtual_stages(args: argparse.Namespace) -> int:
    """Stages to a pipeline rank.

    Raises:
        UserError: the layers do not divide so, or Megatron has no such pipeline.
    """
    layers, ranks = args.num_layers, args.pipeline_model_parallel_size
    if layers % ranks:
        raise UserError(
            f"--pipeline-model-parallel-size {ranks}: --num-layers {layers} is no multiple of it"
        )
    given = [name for name in VIRTUAL if getattr(args, name) is not None]
    if not given:
        return 1
    if len(given) == 2:
        raise UserError(f"{' and '.join(map(flag, given))}: give one of them")
    (name,) = given
    size, each = getattr(args, name), layers // ranks
    if each % size:
        fitting = [str(number) for number in range(1, each + 1) if each % number == 0]
        raise UserError(
            f"{flag(name)} {size}: does not divide the {each} layers of a pipeline rank; "
            f"use one of {', '.join(fitting)}"
        )
    stages = each // size if name == VIRTUAL[0] else size
    if stages > 1 and ranks == 1:
        raise UserError(f"{flag(name)} {size}: needs --pipeline-model-parallel-size 2 or more")
    return stages


def _check_divisions(args: argparse.Namespace) -> None:
    tensor, context = args.tensor_model_parallel_size, args.context_parallel_size
    heads = args.num_attention_heads
    divisions = [("tensor_model_parallel_size", "num_attention_heads", tensor)]
    if args.ffn_hidden_size is not None:
        divisions.append(("tensor_model_parallel_size", "ffn_hidden_size", tensor))
    if args.kv_channels is None:
        divisions.append(("num_attention_heads", "hidden_size", heads))
    if args.group_query_attention:
        divisions.append(("num_query_groups", "num_attention_heads", args.num_query_groups))
        divisions.append(("tensor_model_parallel_size", "num_query_groups", tensor))
    if context > 1:
        divisions.append(("context_parallel_size", "seq_length", 2 * context))
    if args.sequence_parallel and tensor > 1:  # else Megatron turns it off
        divisions.append(("sequence_parallel", "seq_length", tensor * context))
    for divisor, name, parts in divisions:
        whole = getattr(args, name)
        if whole % parts:
            value = getattr(args, divisor)
            shown = flag(divisor) if value is True else f"{flag(divisor)} {value}"
            raise UserError(f"{shown}: {flag(name)} {whole} is no multiple of {parts}")


def check_sizes(args: argparse.Namespace) -> None:
    """That a model of these sizes can be built and divided so.

    Raises:
        UserError: names the flag, its value and what would be right.
    """
    for name in NEEDED:
        if getattr(args, name) is None:
            raise UserError(f"{flag(name)}: is needed to count activations; give it")
    for name in (*NEEDED, *OPTIONAL):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} {value}: expected 1 or more")
    if not 0 <= args.hidden_dropout < 1:
        raise UserError(f"--hidden-dropout {args.hidden_dropout}: expected 0 or more, less than 1")
    batch, micro, replicas = args.global_batch_size, args.micro_batch_size, args.data_parallel_size
    if batch is not None and batch % (micro * replicas):
        raise UserError(
            f"--global-batch-size {batch}: expected a multiple of --micro-batch-size {micro} times "
            f"--data-parallel-size {replicas}"
        )
    _check_divisions(args)
