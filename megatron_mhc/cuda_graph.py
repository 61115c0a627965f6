"""--cuda-graph-impl full_iteration: a step's forward and backward pass as one CUDA graph."""

import argparse

import torch

from .errors import UserError

FLAG, FULL_ITERATION = "--cuda-graph-impl", "full_iteration"

_SEES_NO_STEP = "a replay runs no Python, which it needs in every step"
_WAITS = "the host cannot look at a tensor of a step before the step is over"
# Megatron's arguments that a graph would get wrong without a word, or end in a CUDA error.
_REFUSED: dict[str, str] = {
    "step_batch_size_schedule": "every step has the captured one's micro-batches",
    "timing_log_level": "there is nothing to time inside of a step",
    "log_straggler": "there is nothing to time inside of a step",
    "check_for_spiky_loss": _WAITS,
    "check_for_large_grads": _WAITS,
    "qk_clip": _SEES_NO_STEP,
    "log_max_attention_logit": _SEES_NO_STEP,
    "save_activations_interval": _SEES_NO_STEP,
    "save_dgrads_interval": _SEES_NO_STEP,
    "save_wgrads_interval": _SEES_NO_STEP,
}


def refuse_uncapturable(args: argparse.Namespace) -> None:
    """What such a graph would get wrong or fail on after its first steps, also without mHC.

    Args:
        args: Megatron's arguments after its own validation.

    Raises:
        UserError: names each flag, its value and the remedy.
    """
    impl = args.cuda_graph_impl
    if impl == "none":
        return
    if not torch.cuda.is_available():
        raise UserError(f"{FLAG} {impl}: there is no GPU here; leave it out")
    if impl != FULL_ITERATION:
        return
    problems = []
    for name, why in _REFUSED.items():
        value = getattr(args, name)
        if value:
            given = "--" + name.replace("_", "-") + ("" if value is True else f" {value}")
            problems.append(f"{given}: with {FLAG} {impl} {why}; leave one of them out")
    if args.fp16 and args.loss_scale is None:
        problems.append(
            f"--fp16: with {FLAG} {impl} every step has the captured one's loss scale; give a "
            "--loss-scale that stays, or --bf16"
        )
    if args.cuda_graph_warmup_steps < 1:
        problems.append(
            f"--cuda-graph-warmup-steps {args.cuda_graph_warmup_steps}: kernels are compiled and "
            "parameters gathered in a step before the graph's; use 1 or more"
        )
    if problems:
        raise UserError("\n".join(problems))


def describe(args: argparse.Namespace) -> str:
    """What it does, for the start of a training."""
    return (
        f"CUDA graph: after {args.cuda_graph_warmup_steps} steps, forward and backward pass of a "
        f"step are one ({FLAG} {FULL_ITERATION})"
    )
