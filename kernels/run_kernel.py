"""Launches of kernels: the compiled form of an earlier launch is called directly.

In every launch Triton binds the arguments by name and asks each what it specialises on, 60 to 100
us of a host's time for a kernel of twenty arguments, where the kernel itself may take 10. Ours
specialise on the same few things every time, and those make the key under which a compiled kernel
is kept here. It is then called with addresses, which Triton need not ask a tensor and the driver
for, and with tensor maps of earlier launches.
"""

import inspect
import math
from functools import partial
from types import FunctionType

import torch
import triton
from torch import Tensor

from . import compile_ahead
from .workspace import Part, tensor_of

# What is called below is not public in Triton, so no other minor version is taken on trust: it
# gets Triton's own launch.
TESTED_TRITON = "3.6."

# Tensor maps that one launch keeps: every address that an allocator gave for an argument.
MAPS = 4096

_compiled: dict[tuple, tuple] = {}
"""By a kernel's identity and what else is constant: the kernel, so that no other can take that
identity, and its compiled forms.
"""


class Tiles:
    """A tensor of ``shape`` as what a bulk copy (Hopper) takes tiles of.

    Args:
        shape: of the tensor. block: of a tile. layout: of a tile in shared memory.
        strides: of the tensor, in elements; it is contiguous if None.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        block: tuple[int, ...],
        layout,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        self.shape, self.block, self.layout = list(shape), list(block), layout
        self.strides = list(strides or [math.prod(shape[k + 1 :]) for k in range(len(shape))])

    def of(self, tensor: Tensor):
        """The descriptor that Triton's own launch takes; the address is a multiple of 16."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        return TensorDescriptor(tensor, self.shape, self.strides, self.block, self.layout)


class Launch:
    """``kernel[grid](*tensors, *numbers, **options)``, on the current stream and device, where the
    tensors are.

    Args:
        numbers: the kernel's arguments between its tensors and its constexprs.
        tiles: for each of its first arguments that is a tensor descriptor, what of.
        options: its constexprs, num_warps and the like.
    """

    __slots__ = (
        "_compiled",
        "_grid",
        "_kernel",
        "_last",
        "_maps",
        "_numbers",
        "_options",
        "_tiles",
    )

    def __init__(
        self,
        kernel,
        grid: tuple[int, ...],
        numbers: tuple = (),
        tiles: tuple[Tiles, ...] = (),
        **options,
    ) -> None:
        self._kernel, self._grid, self._numbers, self._tiles = kernel, grid, numbers, tiles
        self._options = options
        self._maps = tuple({} for _ in tiles)
        constants = tuple(options[name] for name in kernel.arg_names if name in options)
        # The last arguments of every launch: those that are no tensors.
        self._last = (*numbers, *constants)
        self._compiled = None
        if _takes_known_launches(kernel):
            first = len(kernel.arg_names) - len(self._last)
            kinds = tuple(map(_kind, numbers, kernel.params[first:]))
            blocks = tuple(tuple(tile.block) for tile in tiles)
            key = (id(kernel), kinds, blocks, *options.items())
            _, self._compiled = _compiled.setdefault(key, (kernel, {}))

    def __call__(self, *tensors: Tensor | Part | tuple[Tensor, ...] | None) -> None:
        hooks = triton.knobs.runtime
        listened = hooks.launch_enter_hook.calls or hooks.launch_exit_hook.calls
        if self._compiled is None or listened:
            self._by_triton(tensors)
            return
        device = torch._C._cuda_getDevice()
        addresses, key, bits = [], [device], 0
        for tensor in tensors:
            if tensor is None:
                addresses.append(None)
                key.append(None)
            elif type(tensor) is tuple:
                parts = tuple(part.data_ptr() for part in tensor)
                addresses.append(parts)
                key.append(tuple(part.dtype for part in tensor))
                for part in parts:
                    bits |= part
            else:
                address = tensor.data_ptr()
                bits |= address
                addresses.append(address)
                key.append(tensor.dtype)
        # Triton compiles for which addresses are multiples of 16: as a rule, all are.
        if bits % 16:
            key.append(tuple(map(_aligned, addresses)))
        key = tuple(key)
        found = self._compiled.get(key)
        if found is None:
            compiled = self._by_triton(tensors)
            if not (compiled.run.global_scratch_size or compiled.run.profile_scratch_size):
                self._compiled[key] = _called_directly(compiled)
            return
        launch, before, after, maps = found
        if maps:
            addresses = self._with_maps(tensors, addresses, maps)
        stream = torch._C._cuda_getCurrentRawStream(device)
        grid = self._grid
        y = grid[1] if len(grid) > 1 else 1
        launch(grid[0], y, 1, stream, *before, None, None, *after, *addresses, *self._last)

    @property
    def compiled(self) -> bool:
        """Whether the kernel has been launched with these constants, if for other numbers."""
        return bool(self._compiled)

    def begin(self, *dtypes: torch.dtype | None) -> None:
        """Begins to compile for tensors of ``dtypes``, None where there is none."""
        tensors = [dtype and torch.empty(0, dtype=dtype, device="meta") for dtype in dtypes]
        compile_ahead.begin(self._kernel, self._grid, self._arguments(tensors), self._options)

    def _by_triton(self, tensors):
        """Triton's own launch, which looks at every argument; returns what it compiled."""
        arguments = self._arguments(tuple(map(tensor_of, tensors)))
        return compile_ahead.launch(self._kernel, self._grid, arguments, self._options)

    def _arguments(self, tensors) -> tuple:
        """Those of Triton's own launch that are no options."""
        described = tuple(map(Tiles.of, self._tiles, tensors))
        return (*described, *tensors[len(described) :], *self._numbers)

    def _with_maps(self, tensors: tuple, addresses: list, maps: tuple) -> list:
        """The addresses, for each tensor descriptor what the compiled kernel takes instead."""
        arguments = []
        for tensor, address, tile, found, make in zip(
            tensors, addresses, self._tiles, self._maps, maps
        ):
            key = address, tensor.dtype
            if key not in found:
                if len(found) == MAPS:
                    found.clear()
                found[key] = make(tile.of(tensor_of(tensor)))
            arguments += found[key]
        return arguments + addresses[len(maps) :]


def _takes_known_launches(kernel) -> bool:
    """Whether a kernel is one that Triton compiled: not the interpreter's."""
    known = isinstance(kernel, triton.runtime.JITFunction)
    return known and triton.__version__.startswith(TESTED_TRITON)


def _called_directly(compiled) -> tuple:
    """The function in C that launches what Triton compiled, its arguments before and after those
    for scratch memory, and for each tensor descriptor what makes a tensor map of it.
    """
    run = compiled.run
    launch, maps = run.launch, ()
    if isinstance(launch, FunctionType):  # which makes the maps anew in every launch
        from triton.backends.nvidia.driver import make_tensordesc_arg

        inner = inspect.getclosurevars(launch).nonlocals
        launch = inner["launcher"]
        maps = tuple(partial(make_tensordesc_arg, metadata=of) for of in inner["tensordesc_meta"])
    before = (compiled.function, run.launch_cooperative_grid, run.launch_pdl)
    return launch, before, (compiled.packed_metadata, None, None, None), maps


def _kind(number, parameter):
    """What a compiled kernel depends on in a number: its type, or itself where that counts."""
    if isinstance(number, int):
        in_32_bits = -(2**31) <= number < 2**31
        return in_32_bits if parameter.do_not_specialize else number
    return type(number)


def _aligned(address) -> bool | tuple[bool, ...]:
    if isinstance(address, tuple):
        return tuple(map(_aligned, address))
    return address is None or address % 16 == 0
