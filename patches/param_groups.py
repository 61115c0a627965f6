"""Megatron's optimizers mistake parameters of one group for each other where some are float32."""

import torch

from .record import Patch


def _is_wide(parameter) -> bool:
    return parameter.dtype == torch.float32


def _build(original):
    def param_groups(model_chunks, config, config_overrides):
        """The groups, one of two dtypes as two: its float32 parameters, and the others."""
        groups = original(model_chunks, config, config_overrides)
        kinds = [set(map(_is_wide, group["params"])) for group in groups]
        # Ranks without such parameters must have the same groups.
        found = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(found, kinds)
        split = []
        for group, *kinds in zip(groups, *found):
            if len(set().union(*kinds)) < 2:
                split.append(group)
                continue
            for wide in (True, False):
                part = [p for p in group["params"] if _is_wide(p) is wide]
                split.append({**group, "params": part})
        return split

    return param_groups


PATCH = Patch(
    name="param_groups",
    target="megatron.core.optimizer:_get_param_groups",
    reason="an optimizer lists a group's float32 parameters first, the index by which it saves "
    "counts them where they lie: a bf16 model with float32 mappings could not be saved",
    tested={"0.19.2": "af15e73835018079"},
    build=_build,
)
