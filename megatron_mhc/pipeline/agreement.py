"""Neighbouring stages agree on what they exchange before anything is sent."""

import torch
from torch.distributed import ProcessGroup

from megatron_mhc.errors import UserError


class StageMismatch(UserError):
    """Two neighbouring pipeline stages would not understand each other."""

    every_rank = True


def agree(pp_group: ProcessGroup, **facts: object) -> None:
    """Compare what every stage is going to send; a collective of ``pp_group``.

    Args:
        facts: by name, what must be equal on all stages.

    Raises:
        StageMismatch: on every rank of the group; names two neighbours and what differs.
    """
    stages: list = [None] * pp_group.size()
    mine = (torch.distributed.get_rank(), facts)
    torch.distributed.all_gather_object(stages, mine, group=pp_group)
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
