"""Whether the Gluon kernels for Hopper may run, and what their bulk copies take."""

import logging
import os
from functools import lru_cache

import torch
import triton
from torch import Tensor

from .run_kernel import TESTED_TRITON

logger = logging.getLogger(__name__)


@lru_cache
def hopper(device: torch.device) -> bool:
    """Whether the Hopper kernels run on ``device``; says so if only Triton's version forbids it."""
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        return False
    if torch.cuda.get_device_capability(device)[0] != 9:
        return False
    if not triton.__version__.startswith(TESTED_TRITON):
        logger.warning(
            "mHC kernels: those for Hopper were tested with Triton %sx, this is %s: the slower "
            "ones for all GPUs are in use",
            TESTED_TRITON,
            triton.__version__,
        )
        return False
    return True


def serves_hopper(x: Tensor, f: Tensor | None, n: int) -> bool:
    """Whether the Hopper kernels take these streams, merged with f: of x's dtype, or None."""
    same = f is None or f.dtype == x.dtype
    return same and n == 4 and x.dtype == torch.bfloat16 and hopper(x.device)


def aligned(tensor: Tensor) -> Tensor:
    """For bulk copies, which take addresses that are multiples of 16."""
    return tensor.clone() if tensor.data_ptr() % 16 else tensor
