"""Which attention a sequence can be divided for."""

import argparse

from .errors import UserError


def refuse_undivided_attention(args: argparse.Namespace) -> None:
    """Context parallelism needs an attention that reaches other ranks' tokens, also without mHC.

    Args:
        args: Megatron's arguments after its own validation.

    Raises:
        UserError: names --context-parallel-size, its value, the attention that takes whole
            sequences only, and the remedy.
    """
    ranks = args.context_parallel_size
    if ranks == 1:
        return
    for flag, value, remedy in (
        (
            "--transformer-impl",
            args.transformer_impl,
            "--transformer-impl transformer_engine, which needs a GPU",
        ),
        ("--attention-backend", args.attention_backend.name, "leave --attention-backend out"),
    ):
        if value in ("local", "unfused"):
            raise UserError(
                f"--context-parallel-size {ranks}: the attention of {flag} {value} takes whole "
                f"sequences only; use 1, or {remedy}"
            )
