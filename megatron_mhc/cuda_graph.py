"""--cuda-graph-impl full_iteration: a step's forward and backward pass as one CUDA graph."""

import argparse

import torch

from .errors import UserError

FLAG, FULL_ITERATION = "--cuda-graph-impl", "full_iteration"


def refuse_uncapturable(args: argparse.Namespace) -> None:
    """What such a graph would get wrong or fail on after its first steps, also without mHC.

    Args:
        args: Megatron's arguments after its own validation.

    Raises:
        UserError: names the flag, its value and the remedy.
    """
    impl = args.cuda_graph_impl
    if impl == "none":
        return
    if not torch.cuda.is_available():
        raise UserError(f"{FLAG} {impl}: there is no GPU here; leave it out")
    if impl != FULL_ITERATION:
        return
    if args.step_batch_size_schedule is not None:
        raise UserError(
            f"--step-batch-size-schedule {args.step_batch_size_schedule}: with {FLAG} {impl} every "
            "step has the captured one's micro-batches; give --global-batch-size instead"
        )
    if args.timing_log_level:
        raise UserError(
            f"--timing-log-level {args.timing_log_level}: with {FLAG} {impl} there is nothing to "
            "time inside of a step; use 0"
        )
    if args.check_for_spiky_loss:
        raise UserError(
            f"--check-for-spiky-loss: with {FLAG} {impl} the host does not see a loss before its "
            "step is over; leave one of them out"
        )


def describe(args: argparse.Namespace) -> str:
    """What it does, for the start of a training."""
    return (
        f"CUDA graph: after {args.cuda_graph_warmup_steps} steps, forward and backward pass of a "
        f"step are one ({FLAG} {FULL_ITERATION})"
    )
