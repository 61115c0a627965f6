"""The replay of merges and aggregations: the forward pass's bits, and float64's values."""

import interpreter  # noqa: F401
import pytest
import torch
from kernel_checks import OPTIONS, relative_error, replay_inputs, streams_inputs

from megatron_mhc import kernels
from megatron_mhc.kernels import launch_replay, reference


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(
    ("tokens", "n", "channels", "sublayers"),
    [
        ((19,), 4, 136, 5),
        ((3, 7), 4, 520, 2),
        ((1,), 4, 8, 1),
        ((5,), 2, 1032, 3),
        ((3,), 8, 24, 3),
    ],
)
def test_replay_has_the_forward_passs_bits(tokens, n, channels, sublayers, dtype):
    entered, inputs, formed = replay_inputs(tokens, n, channels, sublayers, dtype, "triton")
    assert launch_replay.SUBLAYERS == 4  # five sublayers are two launches
    # A stage's first block starts with the streams themselves, a later one with a merge.
    for first, x in ((0, entered), (1, formed[0][0])):
        merges, pres = inputs[0][first:], inputs[1][first:]
        replayed = kernels.mhc_replay(x, merges, pres, backend="triton") if pres else []
        assert len(replayed) == sublayers - first
        for (x_next, u), (expected_x, expected_u) in zip(replayed, formed[first:]):
            assert torch.equal(x_next, expected_x)
            assert torch.equal(u, expected_u)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("n", [2, 4, 8])
def test_replay_equals_float64(n, dtype):
    x, (merges, pres), _ = replay_inputs((11,), n, 72, 4, dtype, "triton")
    exact = reference.mhc_replay(
        x.double(),
        [merge and tuple(tensor.double() for tensor in merge) for merge in merges],
        [pre.double() for pre in pres],
    )
    ours = kernels.mhc_replay(x, merges, pres, backend="triton")
    for pair, exact_pair in zip(ours, exact):
        for tensor, exact_tensor in zip(pair, exact_pair):
            assert tensor.dtype == dtype
            assert relative_error(tensor, exact_tensor) < (
                1e-2 if dtype == torch.bfloat16 else 1e-6
            )


def test_inputs_need_not_be_contiguous():
    x, (merges, pres), _ = replay_inputs((6,), 4, 16, 3, torch.float32, "triton")
    strided = torch.stack([x, x], -1)[..., 0]
    f, post, comb = merges[1]
    apart = [merges[0], (torch.stack([f, f], 1)[:, 0], post, comb.mT.contiguous().mT), merges[2]]
    plain = kernels.mhc_replay(x, merges, pres, backend="triton")
    replayed = kernels.mhc_replay(strided, apart, pres, backend="triton")
    assert replayed[0][0] is strided
    for ours, theirs in zip(replayed, plain):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_no_tokens():
    x, f, post, comb, *_ = streams_inputs((0,), 4, 16, torch.float32)
    ((x_next, u),) = kernels.mhc_replay(x, [(f, post, comb)], [post], backend="triton")
    assert x_next.shape == x.shape
    assert u.shape == f.shape


@pytest.mark.parametrize("mixing", reference.RESIDUAL_MIXINGS)
def test_torch_replays_every_mixing_to_the_bit(mixing):
    x, f, *_ = streams_inputs((5, 3), 3, 20, torch.bfloat16)
    shapes = kernels.mapping_shapes(mixing, 3, 20).values()
    mapping = [torch.randn(shape) for shape in shapes]
    options = {"residual_mixing": mixing, "return_pre": True, "backend": "torch", **OPTIONS}
    u, post, comb, pre = kernels.mhc_pre(x, *mapping, **options)
    x_next, u_next, _, _, pre_next = kernels.mhc_post_pre(x, f, post, comb, *mapping, **options)
    merges = [None, (f, post, comb)]
    first, second = kernels.mhc_replay(x, merges, [pre, pre_next], backend="torch")
    assert first[0] is x
    assert torch.equal(first[1], u)
    assert torch.equal(second[0], x_next)
    assert torch.equal(second[1], u_next)
