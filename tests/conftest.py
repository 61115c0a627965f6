"""Every test sees fresh random numbers of a fixed seed; without a GPU, Triton is interpreted."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Read when Triton is imported, so before any test module is.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(1234)
