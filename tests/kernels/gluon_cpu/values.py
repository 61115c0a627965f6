"""Tensors of a kernel, computed when something depends on them: a store, a branch, a wait.

The compiler may move arithmetic past barriers, and the loads of what it needs are over only when it
is done: here they are read at the last moment.
"""

import operator
from collections.abc import Callable
from functools import wraps
from typing import NamedTuple

import torch
from torch import Tensor

UINT32 = "uint32"  # in int64: PyTorch lacks most of its operations


class Pointers(NamedTuple):
    """Addresses, int64, of elements of ``dtype``."""

    addresses: Tensor
    dtype: torch.dtype

    @property
    def shape(self) -> torch.Size:
        return self.addresses.shape

    def __getitem__(self, index) -> "Pointers":
        return self._replace(addresses=self.addresses[index])


class Value:
    """A tensor, or Pointers, that ``make`` returns when it is first asked for."""

    __slots__ = ("__weakref__", "_data", "_make")

    def __init__(self, make: Callable[[], Tensor | Pointers]) -> None:
        self._make, self._data = make, None

    def force(self) -> Tensor | Pointers:
        if self._make:
            self._data = self._make()
            self._make = None
        return self._data

    def __bool__(self) -> bool:
        return bool(self.force().item())

    def __index__(self) -> int:
        return int(self.force().item())

    def __getitem__(self, index) -> "Value":
        return Value(lambda: self.force()[index])

    def to(self, dtype, bitcast: bool = False) -> "Value":
        return Value(lambda: cast(self.force(), dtype, bitcast))


def forced(value):
    """A value's tensor; anything else as it is."""
    return value.force() if isinstance(value, Value) else value


def known(data) -> Value:
    """A tensor, or number, as a value."""
    if isinstance(data, bool):
        data = torch.tensor(data)
    elif isinstance(data, int):
        data = torch.tensor(data, dtype=torch.int32)
    elif isinstance(data, float):
        data = torch.tensor(data, dtype=torch.float32)
    return data if isinstance(data, Value) else Value(lambda: data)


def late(function: Callable) -> Callable:
    """The function of tensors as one of values."""

    @wraps(function)
    def later(*arguments) -> Value:
        return Value(lambda: function(*map(forced, arguments)))

    return later


def cast(data, dtype, bitcast: bool):
    if isinstance(data, Pointers):
        return Pointers(data.addresses, dtype.dtype) if bitcast else data.addresses
    if dtype == UINT32:
        assert bitcast
        return data.view(torch.int32).long() & 0xFFFFFFFF
    return data.view(dtype) if bitcast else data.to(dtype)


def alike(a, b) -> tuple:
    """Two tensors in the wider of their types, whatever their shapes; numbers are as narrow as
    can be.
    """
    if isinstance(a, Tensor) and isinstance(b, Tensor) and a.dtype != b.dtype:
        dtype = torch.promote_types(a.dtype, b.dtype)
        return a.to(dtype), b.to(dtype)
    return a, b


def _add(a, b):
    if isinstance(a, Pointers):
        return Pointers(a.addresses + torch.as_tensor(b).long() * a.dtype.itemsize, a.dtype)
    return operator.add(*alike(a, b))


def _divide(a, b):
    return torch.div(a, b, rounding_mode="trunc")


def _binary(function: Callable) -> tuple[Callable, Callable]:
    """The operator of values, and with its sides exchanged."""
    straight = late(lambda a, b: function(*alike(a, b)))
    return straight, lambda a, b: straight(known(b), a)


for name, function in {
    "mul": operator.mul,
    "sub": operator.sub,
    "truediv": operator.truediv,
    "floordiv": _divide,
    "mod": torch.fmod,
    "and": operator.and_,
    "or": operator.or_,
    "rshift": operator.rshift,
    "lshift": operator.lshift,
    "xor": operator.xor,
}.items():
    straight, exchanged = _binary(function)
    setattr(Value, f"__{name}__", straight)
    setattr(Value, f"__r{name}__", exchanged)
Value.__add__ = late(_add)
Value.__radd__ = lambda a, b: known(b) + a
Value.__neg__ = late(operator.neg)
for name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Value, f"__{name}__", _binary(getattr(operator, name))[0])
