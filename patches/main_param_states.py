"""The distributed optimizer loads float32 parameters' state into views that need gradients."""

import torch

from .record import Patch

PATCH = Patch(
    name="main_param_states",
    target="megatron.core.optimizer.distrib_optimizer:"
    "DistributedOptimizer._set_main_param_and_optimizer_states",
    reason="the distributed optimizer copies into a float32 parameter while autograd records, "
    "which forbids it: a run could not be resumed",
    tested={"0.19.2": "40cab784659711a8"},
    build=torch.no_grad(),
)
