"""Memory that the launches of one call leave to each other: one allocation for all of it.

An allocation costs a host microseconds, and a backward pass needs seven such tensors.
"""

import math

import torch
from torch import Tensor

# Bytes: a tensor that begins at a multiple has lines of memory of its own.
LINE = 256


class Part:
    """A tensor in a workspace, as a launch takes it. To form the tensor itself would take a host as
    long as to allocate it: that is for launches by Triton, which ask for it.

    Attributes:
        dtype, shape: of the tensor.
    """

    __slots__ = ("_address", "_first", "_memory", "dtype", "shape")

    def __init__(
        self,
        memory: Tensor,
        address: int,
        first: int,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self._memory, self._address, self._first = memory, address, first
        self.shape, self.dtype = shape, dtype

    def data_ptr(self) -> int:
        return self._address

    def tensor(self) -> Tensor:
        """The tensor, contiguous."""
        size = math.prod(self.shape) * self.dtype.itemsize
        part = self._memory[self._first : self._first + size]
        return part.view(self.dtype).view(self.shape)


class Workspace:
    """Where tensors lie in one memory.

    Args:
        tensors: the shape and dtype of each.
    """

    def __init__(self, *tensors: tuple[tuple[int, ...], torch.dtype]) -> None:
        self._layout, self._bytes = [], 0
        for shape, dtype in tensors:
            self._layout.append((self._bytes, shape, dtype))
            size = math.prod(shape) * dtype.itemsize
            self._bytes += -(-size // LINE) * LINE

    def allocate(self, like: Tensor) -> list[Part]:
        """The tensors, in memory that nobody has written, on the device of ``like``."""
        memory = like.new_empty(self._bytes, dtype=torch.uint8)
        address = memory.data_ptr()
        return [
            Part(memory, address + first, first, shape, dtype)
            for first, shape, dtype in self._layout
        ]


def tensor_of(argument):
    """An argument of a launch, where it is a part of a workspace as a tensor."""
    return argument.tensor() if type(argument) is Part else argument
