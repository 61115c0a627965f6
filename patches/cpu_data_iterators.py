"""On a CPU, building the data iterators must not move the generator that dropout draws from."""

import torch

from .no_gpu import why_not
from .record import Patch


def _build(original):
    def build_train_valid_test_data_iterators(provider):
        # iter(DataLoader) draws a seed from the CPU's generator, which a resumed run just restored.
        with torch.random.fork_rng(devices=[]):
            return original(provider)

    return build_train_valid_test_data_iterators


PATCH = Patch(
    name="cpu_data_iterators",
    target="megatron.training.training:build_train_valid_test_data_iterators",
    reason="on a CPU: a resumed run would drop out other elements than an uninterrupted one",
    tested={"0.19.2": "d12ed278f953cc10"},
    build=_build,
    why_not=why_not,
)
