"""What stages tell each other before anything is sent, and that they agree on it."""

import torch
from torch.distributed import ProcessGroup

from megatron_mhc.errors import UserError


class StageMismatch(UserError):
    """Two neighbouring pipeline stages would not understand each other."""

    every_rank = True


def gather(value: object, group: ProcessGroup | None = None) -> list:
    """``value`` of every rank of ``group``, None: of the job; a collective of them."""
    values: list = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(values, value, group=group)
    return values


def agree(pp_group: ProcessGroup, **facts: object) -> None:
    """Compare what every stage is going to send; a collective of ``pp_group``.

    Args:
        facts: by name, what must be equal on all stages.

    Raises:
        StageMismatch: on every rank of the group; names two neighbours and what differs.
    """
    stages = gather((torch.distributed.get_rank(), facts), pp_group)
    for (rank, here), (next_rank, there) in zip(stages, stages[1:]):
        different = [name for name in here if here[name] != there.get(name)]
        if different:
            raise StageMismatch(
                f"pipeline stages do not fit: rank {rank} has {_said(here, different)}, rank "
                f"{next_rank} after it has {_said(there, different)}; start all ranks with the "
                "same flags"
            )


def _said(facts: dict, names: list[str]) -> str:
    return ", ".join(f"{name} {facts.get(name)}" for name in names)
