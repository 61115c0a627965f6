"""On a CPU, a forked generator is the CPU's own, so its change is no accident to warn of."""

import contextlib

import torch

from .no_gpu import why_not
from .record import Patch


def _build(original):
    @contextlib.contextmanager
    def fork(self, name="model-parallel-rng"):
        if name not in self.states_:
            raise KeyError(f"rng state {name!r} is not tracked: have {sorted(self.states_)}")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    return fork


PATCH = Patch(
    name="cpu_rng_fork",
    target="megatron.core.tensor_parallel.random:CudaRNGStatesTracker.fork",
    reason="on a CPU: the fork warns of every draw, because the CPU's generator moved",
    tested={"0.19.2": "6821e1e397253d43"},
    build=_build,
    why_not=why_not,
)
