"""pretrain() calls initialize_megatron without its own allow_no_cuda switch."""

import functools

from .no_gpu import why_not
from .record import Patch

PATCH = Patch(
    name="cpu_initialize",
    target="megatron.training.training:initialize_megatron",
    reason="on a CPU: pretrain() asserts CUDA although initialize_megatron has allow_no_cuda",
    tested={"0.19.2": "d9b467adcaed1325"},
    build=lambda original: functools.partial(original, allow_no_cuda=True),
    why_not=why_not,
)
