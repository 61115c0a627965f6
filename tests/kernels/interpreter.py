"""Mends Triton's interpreter, by which these tests run the kernels on a CPU (tests/conftest.py).

Triton 3.6's lacks scalars as indices under numpy >= 2.5, rounding to bfloat16 (it truncates), and
products of bfloat16 (it multiplies the bit patterns). Import this before the kernels.
"""

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

_patch_tensor = interpreter._patch_lang_tensor
_cast = InterpreterBuilder.cast_impl
_dot = InterpreterBuilder.create_dot


def _patch_lang_tensor(tensor, scope) -> None:
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


def _cast_impl(self, source, dst_type):
    narrow, wide = tl.bfloat16, tl.float32
    pair = (source.dtype.scalar, dst_type.scalar)
    data = np.ascontiguousarray(source.data)
    if pair == (wide, narrow):
        rounded = torch.from_numpy(data).to(torch.bfloat16).view(torch.int16).numpy()
        return TensorHandle(rounded.view(np.uint16), narrow)
    if pair == (narrow, wide):
        tensor = torch.from_numpy(data.view(np.int16)).view(torch.bfloat16)
        return TensorHandle(tensor.float().numpy(), wide)
    return _cast(self, source, dst_type)


def _create_dot(self, a, b, *rest):
    a, b = (
        _cast_impl(self, side, tl.float32) if side.dtype.scalar == tl.bfloat16 else side
        for side in (a, b)
    )
    return _dot(self, a, b, *rest)


interpreter._patch_lang_tensor = _patch_lang_tensor
InterpreterBuilder.cast_impl = _cast_impl
InterpreterBuilder.create_fp_trunc = _cast_impl
InterpreterBuilder.create_fp_ext = _cast_impl
InterpreterBuilder.create_dot = _create_dot
