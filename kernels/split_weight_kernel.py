"""fn laid out for the matrix units: zero-padded rows, as bf16 hi + lo planes for bf16 streams."""

import triton
import triton.language as tl


@triton.jit
def split_weight_kernel(
    fn_ptr,
    planes_ptr,
    K: tl.constexpr,
    COUNT: tl.constexpr,
    ROWS: tl.constexpr,
    PLANES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """fn [COUNT, K] float32 to planes [PLANES * ROWS, K].

    With two planes, hi = bf16(fn) and lo = bf16(fn - hi): together 16 bits of mantissa, and two
    bf16 products cost what one tf32 product does.
    """
    row = tl.program_id(0)
    k = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(fn_ptr + row * K + k, mask=(k < K) & (row < COUNT), other=0.0)
    hi = value.to(planes_ptr.dtype.element_ty)
    tl.store(planes_ptr + row * K + k, hi, mask=k < K)
    if PLANES == 2:
        lo = (value - hi.to(tl.float32)).to(planes_ptr.dtype.element_ty)
        tl.store(planes_ptr + (ROWS + row) * K + k, lo, mask=k < K)
