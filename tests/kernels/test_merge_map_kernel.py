"""The merge and the products with fn, in pieces and whole, against float64."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import relative_error, streams_inputs

from megatron_mhc.kernels import launch, reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_merge_and_mappings(dtype):
    x, f, post, comb, fn, scale, base = streams_inputs((67,), 4, 136, dtype)
    x_next, u, *_, m, r = launch.forward(x, (f, post, comb), (fn, scale, base), 20, 1e-6, 1e-6)
    exact = reference.mhc_post(x.double(), f.double(), post.double(), comb.double())
    assert relative_error(x_next, exact) < (5e-3 if dtype == torch.bfloat16 else 1e-6)
    # Sums of squares are taken before rounding, products after; tf32's are good to 3e-4.
    flat = x_next.double().flatten(1)
    root = torch.rsqrt(flat.square().mean(-1, keepdim=True) + 1e-6)
    assert relative_error(r, torch.rsqrt(exact.square().mean((1, 2)) + 1e-6)) < 1e-6
    assert relative_error(m, root * (flat @ fn.double().T)) < 2e-4
    assert u.dtype == dtype


def test_pieces_cover_every_unit():
    for units in range(1, 40):
        for programs in (1, 7, 64, 300):
            count, size = launch.pieces(units, programs, 132)
            assert (count - 1) * size < units <= count * size
