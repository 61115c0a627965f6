"""Every test sees fresh random numbers of a fixed seed, and Megatron one process to run in."""

import os

import pytest

# The CPU stand-ins must be in place before anything imports Megatron.
os.environ.setdefault("OMP_NUM_THREADS", "2")


@pytest.fixture(autouse=True)
def _seed():
    import torch

    torch.manual_seed(1234)
