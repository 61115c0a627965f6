"""The groups in which Megatron's interleaved schedule takes a step's micro-batches."""

from .errors import UserError

GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"


def check_groups(group: int, stages: int, micro_batches: int, given: str) -> None:
    """That Megatron takes ``micro_batches`` in groups of ``group``, over ``stages`` with chunks.

    Args:
        given: the flag that decides the number of micro-batches, and its value.

    Raises:
        UserError: it does not.
    """
    if not stages <= group <= micro_batches:
        raise UserError(
            f"{GROUP} {group}: has to be from {stages}, the number of stages, "
            f"to {micro_batches}, the micro-batches of {given}"
        )
    if 0 < (left := micro_batches % group) < stages:
        raise UserError(
            f"{given}: in groups of {group} the last one has {left}, "
            f"Megatron takes no fewer than stages ({stages}); change either number"
        )
