"""On a CPU, the generator that Megatron's tracker saves and sets is the CPU's."""

import torch

from .no_gpu import why_not
from .record import Patch


def _build(original):
    def set_rng_state(new_state, device=-1, graph_safe=False):
        torch.set_rng_state(new_state)

    return set_rng_state


PATCH = Patch(
    name="cpu_rng_state",
    target="megatron.core.tensor_parallel.random:_set_cuda_rng_state",
    reason="on a CPU: sets the state of a CUDA generator, which would be queued and never run",
    tested={"0.19.2": "b179c9d95438b61c"},
    build=_build,
    why_not=why_not,
)
