"""Tensors in one memory: apart from each other, and where their addresses say."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_mhc.kernels.workspace import LINE, Workspace, tensor_of

SHAPES = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16])


@given(st.lists(st.tuples(SHAPES, DTYPES), min_size=1, max_size=6))
def test_tensors_lie_apart(wanted):
    parts = Workspace(*wanted).allocate(torch.empty(0))
    tensors = [tensor_of(part) for part in parts]
    for number, tensor in enumerate(tensors):
        tensor.fill_(number)
    for number, (part, tensor, kind) in enumerate(zip(parts, tensors, wanted)):
        assert (part.shape, part.dtype) == kind == (tuple(tensor.shape), tensor.dtype)
        assert torch.equal(tensor, torch.full_like(tensor, number))
        if tensor.numel():
            assert part.data_ptr() == tensor.data_ptr()
        assert (part.data_ptr() - parts[0].data_ptr()) % LINE == 0
        assert tensor.is_contiguous()


def test_a_tensor_stays_when_its_workspace_is_forgotten():
    (part,) = Workspace(((1000,), torch.float32)).allocate(torch.empty(0))
    tensor = part.tensor().fill_(7)
    del part
    others = [torch.zeros(1000) for _ in range(20)]
    assert tensor.eq(7).all()
    assert not sum(other.sum() for other in others)
    assert tensor_of(tensor) is tensor
    assert tensor_of(None) is None
