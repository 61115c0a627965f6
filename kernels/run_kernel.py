"""Launches of kernels: the compiled form of an earlier launch is called directly.

In every launch Triton binds the arguments by name and asks each what it specialises on, 60 to 100
us of a host's time for a kernel of twenty arguments, where the kernel itself may take 10. Ours
specialise on the same few things every time, and those make the key under which a compiled kernel
is kept here.
"""

import torch
import triton
from torch import Tensor

# What is called below is not public in Triton, so no other minor version is taken on trust: it
# gets Triton's own launch.
TESTED_TRITON = "3.6."

_compiled: dict[tuple, tuple] = {}
_valued: dict[int, tuple] = {}
"""By a kernel's identity, the kernel, so that no other can take that, and what _values_matter says.
"""


class Descriptor:
    """A tensor to copy tiles of in bulk (Hopper); becomes a Gluon TensorDescriptor when it must.

    Args:
        tensor: contiguous, at an address that is a multiple of 16.
        block: shape of a tile. layout: of a tile in shared memory.
    """

    __slots__ = ("base", "block", "layout", "padding", "shape", "strides")

    def __init__(self, tensor: Tensor, block: tuple[int, ...], layout) -> None:
        self.base, self.block, self.layout, self.padding = tensor, block, layout, "zero"
        self.shape, self.strides = tensor.shape, tensor.stride()

    def checked(self):
        """The descriptor that Triton's own launch takes, which looks at all of it."""
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

        return TensorDescriptor(
            self.base, list(self.shape), list(self.strides), list(self.block), self.layout
        )


def run_kernel(kernel, grid: tuple[int, ...], *arguments, **options) -> None:
    """``kernel[grid](*arguments, **options)``, on the current stream.

    Args:
        arguments: what is not constexpr, in the kernel's order: tensors, tuples of them,
            Descriptors, numbers and None.
        options: its constexprs, num_warps and the like.
    """
    if not _takes_known_launches(kernel):
        kernel[grid](*map(_checked, arguments), **options)
        return
    if id(kernel) not in _valued:
        _valued[id(kernel)] = kernel, _values_matter(kernel)
    _, valued = _valued[id(kernel)]
    device = torch.cuda.current_device()
    key = (
        id(kernel),
        device,
        *map(_kind, arguments, valued),
        *options.items(),
    )
    found = _compiled.get(key)
    if found is None:
        compiled = kernel[grid](*map(_checked, arguments), **options)
        constants = tuple(options[name] for name in kernel.arg_names[len(arguments) :])
        _compiled[key] = compiled, compiled.function, compiled.packed_metadata, constants
        return
    compiled, function, metadata, constants = found
    stream = torch._C._cuda_getCurrentRawStream(device)
    y = grid[1] if len(grid) > 1 else 1
    compiled.run(
        grid[0], y, 1, stream, function, metadata, None, None, None, *arguments, *constants
    )


def _takes_known_launches(kernel) -> bool:
    """Whether a kernel is one that Triton compiled, and nobody listens to its launches."""
    hooks = triton.knobs.runtime
    return (
        isinstance(kernel, triton.runtime.JITFunction)  # else the interpreter's
        and triton.__version__.startswith(TESTED_TRITON)
        and not hooks.launch_enter_hook.calls
        and not hooks.launch_exit_hook.calls
    )


def _values_matter(kernel) -> tuple[bool, ...]:
    """For each parameter, whether Triton compiles for the value of a number given there."""
    return tuple(not parameter.do_not_specialize for parameter in kernel.params)


def _kind(argument, valued: bool):
    """What a compiled kernel depends on: types, alignment, None, and numbers where they count."""
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if isinstance(argument, int):
        return argument if valued else -(2**31) <= argument < 2**31
    if isinstance(argument, tuple):
        return tuple(_kind(part, valued) for part in argument)
    if isinstance(argument, Descriptor):
        return argument.base.dtype, argument.block
    return type(argument)


def _checked(argument):
    return argument.checked() if isinstance(argument, Descriptor) else argument
