"""Mapping parameters: float32 in every model, and where they start."""

import math

import torch
from torch import Tensor


class Float32Parameters(torch.nn.Module):
    """A module whose parameters move with the model and stay float32 when it is cast.

    Sinkhorn is exponential in the logits: with mappings in bf16 its row sums are some 300 times
    worse, so ``model.bfloat16()`` (Megatron's Float16Module) passes these parameters by.
    """

    def _apply(self, fn, recurse=True):
        def keep_float32(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            if moved.dtype == tensor.dtype:
                return moved
            # Rounding to the lower precision and back would lose bits: only the move is taken.
            return tensor.to(moved.device)

        return super()._apply(keep_float32, recurse)

    def add_parameters(self, device, sequence_parallel: bool, **values: Tensor) -> None:
        """Register ``values`` as float32 parameters with Megatron's mark for split tokens.

        With ``sequence_parallel`` each tensor-parallel rank sees a part of the tokens, so Megatron
        sums the gradients of marked parameters over these ranks.
        """
        for name, value in values.items():
            parameter = torch.nn.Parameter(value.to(device=device, dtype=torch.float32))
            parameter.sequence_parallel = sequence_parallel
            self.register_parameter(name, parameter)


def logit(p: float) -> float:
    """The x with sigmoid(x) = p, for 0 < p < 1."""
    return math.log(p / (1 - p))


def rotate(sublayer: int, n: int) -> list[float]:
    """Weights that sum to 1: 0.9 on stream (sublayer mod n), the rest shared by the others.

    Streams start equal, and with equal weights they would stay so for a hundred steps.
    """
    rest = 0.1 / (n - 1)
    return [0.9 if i == sublayer % n else rest for i in range(n)]
