"""Launches: a kernel's own functions, with Gluon's names meaning those of this package."""

import inspect
import textwrap
from collections.abc import Callable
from types import FunctionType

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonJITFunction

from megatron_mhc.kernels.run_kernel import Launch
from megatron_mhc.kernels.workspace import Part, tensor_of

from . import hopper, language
from .machine import Machine
from .memory import Memory
from .values import Pointers, Value, known


class Program:
    """A Gluon kernel as a Python function. changes: {text of its functions: what to put there}."""

    def __init__(self, kernel: GluonJITFunction, changes: dict[str, str] | None = None) -> None:
        self._changes, self._functions = changes or {}, {}
        self.found: set[str] = set()
        self.function = self._python(kernel)
        if self.found != set(self._changes):
            raise ValueError(f"no function has {set(self._changes) - self.found}")

    def _python(self, kernel: GluonJITFunction) -> FunctionType:
        if kernel not in self._functions:
            function = kernel.fn
            names = {}
            self._functions[kernel] = FunctionType(
                self._code(function), names, function.__name__, function.__defaults__
            )
            names.update({name: self._meaning(of) for name, of in function.__globals__.items()})
        return self._functions[kernel]

    def _code(self, function: FunctionType):
        changed = source = textwrap.dedent(inspect.getsource(function))
        for old, new in self._changes.items():
            if old in changed:
                self.found.add(old)
                changed = changed.replace(old, new)
        if changed == source:
            return function.__code__
        names = {"gluon": gluon, "gl": gl}
        changed = changed[changed.index("def ") :]
        exec(changed, names)
        return names[function.__name__].__code__

    def _meaning(self, of):
        if isinstance(of, GluonJITFunction):
            return self._python(of)
        if isinstance(of, gl.constexpr):
            return of.value
        if of is gl:
            return language
        name = getattr(of, "__name__", "")
        if getattr(of, "__module__", name).startswith("triton.experimental.gluon.language"):
            return getattr(hopper, name.rsplit(".")[-1], of)
        return of


class Launcher:
    """Takes the place of kernels.run_kernel.Launch, where kernels in Gluon get tensors of the CPU.

    Args:
        seed: of the schedule. resident: blocks that run at a time, by default all.
        changes: of the kernel's text, for a kernel that must be found to be wrong.

    Attributes:
        ran: the names of the kernels in Gluon that were launched.
    """

    def __init__(
        self, seed: int, resident: int | None = None, changes: dict[str, str] | None = None
    ) -> None:
        self._seed, self._resident, self._changes = seed, resident, changes
        self.ran: list[str] = []

    def __call__(self, kernel, grid, numbers=(), tiles=(), **options) -> Callable:
        if not isinstance(kernel, GluonJITFunction):
            return Launch(kernel, grid, numbers, tiles, **options)
        program = Program(kernel, self._changes)

        def launch(*tensors: torch.Tensor | Part) -> None:
            self.ran.append(kernel.fn.__name__)
            tensors = tuple(map(tensor_of, tensors))
            described = [tile.of(tensor) for tile, tensor in zip(tiles, tensors)]
            plain = tensors[len(tiles) :]
            memory = Memory([*tensors[: len(tiles)], *plain])
            pointers = [_pointer(tensor) for tensor in plain]
            arguments = (*described, *pointers, *map(known, numbers))
            machine = Machine(memory, self._seed, self._resident)
            machine.run(*grid, lambda: program.function(*arguments, **options))

        launch.compiled = True  # there is nothing to compile
        return launch


def _pointer(tensor: torch.Tensor) -> Value:
    return Value(lambda: Pointers(torch.tensor(tensor.data_ptr()), tensor.dtype))
