"""Where there is a GPU, tests/gpu runs the kernels themselves, and Triton is not interpreted."""

import interpreter  # noqa: F401  (first: it mends the interpreter)
import pytest
import torch
from gluon_cpu import Launcher

from megatron_mhc.kernels import (
    launch_backward,
    launch_backward_hopper,
    launch_post_pre_hopper,
    launch_state,
)

if torch.cuda.is_available():
    collect_ignore_glob = ["test_*_kernel.py", "test_ops.py"]


def forget_plans() -> None:
    launch_post_pre_hopper.plan_of.cache_clear()
    launch_state._states.clear()
    launch_backward_hopper.hopper_streams_plan.cache_clear()
    launch_backward_hopper.hopper_pre_plan.cache_clear()
    launch_backward_hopper.cut_of.cache_clear()


@pytest.fixture
def hopper_on_cpu(monkeypatch):
    """A function of a seed, of how many multiprocessors there are, and of what Launcher takes: sets
    how the kernels in Gluon run from then on, and returns the Launcher. Memory that nobody has
    written is NaN.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small
    torch.use_deterministic_algorithms(True)

    def run_so(seed: int, multiprocessors: int = 6, **options) -> Launcher:
        forget_plans()
        launcher = Launcher(seed, **options)
        for module in (launch_post_pre_hopper, launch_backward, launch_backward_hopper):
            monkeypatch.setattr(module, "Launch", launcher)
            monkeypatch.setattr(module, "multiprocessors", lambda device: multiprocessors)
        return launcher

    yield run_so
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    forget_plans()
