"""The PyTorch reference against DeepSeek-V4's modules in transformers, and against calculus."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import (
    DeepseekV4HyperConnection,
    DeepseekV4HyperHead,
)

from megatron_mhc import kernels

CHANNELS, TOKENS, ITERATIONS, EPS, NORM_EPS = 24, (2, 5), 20, 1e-6, 3e-6
# Relative errors of fp32 against fp32 in another order of summation.
TOLERANCE = 1e-5


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


def deepseek_config(n: int) -> DeepseekV4Config:
    return DeepseekV4Config(
        hidden_size=CHANNELS,
        hc_mult=n,
        hc_sinkhorn_iters=ITERATIONS,
        hc_eps=EPS,
        rms_norm_eps=NORM_EPS,
    )


def randomize(module: torch.nn.Module, std: float) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=std)


@pytest.mark.parametrize(("n", "std"), itertools.product((2, 4, 8), (0.02, 0.3, 3.0)))
def test_mapping_and_merge_equal_deepseek_v4(n, std):
    theirs = DeepseekV4HyperConnection(deepseek_config(n))
    randomize(theirs, std)
    x = torch.randn(*TOKENS, n, CHANNELS, requires_grad=True)
    f = torch.randn(*TOKENS, CHANNELS, requires_grad=True)
    parameters = [theirs.fn, theirs.scale, theirs.base]
    weights = [torch.randn(*TOKENS, CHANNELS), torch.randn(*TOKENS, n, CHANNELS)]

    post, comb, u = theirs(x)
    merged = post.unsqueeze(-1) * f.unsqueeze(-2) + comb.transpose(-1, -2) @ x
    outputs = [u, post, comb, merged]
    loss = (u * weights[0]).sum() + (merged * weights[1]).sum()
    gradients = torch.autograd.grad(loss, [x, f, *parameters])

    our_u, our_post, our_comb = kernels.mhc_pre(
        x, *parameters, iterations=ITERATIONS, eps=EPS, norm_eps=NORM_EPS
    )
    our_merged = kernels.mhc_post(x, f, our_post, our_comb)
    our_loss = (our_u * weights[0]).sum() + (our_merged * weights[1]).sum()
    our_gradients = torch.autograd.grad(our_loss, [x, f, *parameters])

    for ours, expected in zip([our_u, our_post, our_comb, our_merged], outputs, strict=True):
        assert relative_error(ours, expected) < TOLERANCE
    for ours, expected in zip(our_gradients, gradients, strict=True):
        assert relative_error(ours, expected) < TOLERANCE


@pytest.mark.parametrize(("n", "std"), itertools.product((2, 4, 8), (0.02, 0.3, 3.0)))
def test_head_equals_deepseek_v4(n, std):
    theirs = DeepseekV4HyperHead(deepseek_config(n))
    randomize(theirs, std)
    x = torch.randn(*TOKENS, n, CHANNELS, requires_grad=True)
    weight = torch.randn(*TOKENS, CHANNELS)
    parameters = [theirs.hc_fn, theirs.hc_scale, theirs.hc_base]

    expected = theirs(x)
    gradients = torch.autograd.grad((expected * weight).sum(), [x, *parameters])
    ours = kernels.mhc_head(x, *parameters, eps=EPS, norm_eps=NORM_EPS)
    our_gradients = torch.autograd.grad((ours * weight).sum(), [x, *parameters])

    assert relative_error(ours, expected) < TOLERANCE
    for our_gradient, gradient in zip(our_gradients, gradients, strict=True):
        assert relative_error(our_gradient, gradient) < TOLERANCE


def double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("mixing", kernels.RESIDUAL_MIXINGS)
def test_gradients_of_post_pre_in_fp64(mixing):
    n, channels = 3, 4
    shapes = kernels.mapping_shapes(mixing, n, channels)
    inputs = (
        double(2, n, channels),
        double(2, channels),
        double(2, n),
        double(2, n, n),
        *(double(*shapes[name]) for name in ("fn", "scale", "base")),
    )

    def post_pre(*tensors):
        return kernels.mhc_post_pre(*tensors, residual_mixing=mixing, iterations=4)

    assert gradcheck(post_pre, inputs)


def test_gradients_of_sinkhorn_head_and_expand_in_fp64():
    n, channels = 3, 4
    assert gradcheck(lambda logits: kernels.sinkhorn(logits, 5), (double(2, n, n),))
    head = (double(2, n, channels), double(n, n * channels), double(1), double(n))
    assert gradcheck(kernels.mhc_head, head)
    assert gradcheck(lambda h: kernels.mhc_expand(h, n), (double(2, channels),))


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_sinkhorn_columns_sum_to_one_and_rows_converge(n):
    logits = 0.5 * torch.randn(50, n, n, dtype=torch.float64)
    comb = kernels.sinkhorn(logits, iterations=20, eps=0.0)
    torch.testing.assert_close(comb.sum(-2), torch.ones(50, n, dtype=torch.float64))
    assert (comb.sum(-1) - 1).abs().max() < 1e-3
    assert (comb >= 0).all()


def test_sinkhorn_ends_on_columns_not_rows():
    """The trap: with large logits rows are far from 1 after 20 iterations, columns are not."""
    torch.manual_seed(0)
    comb = kernels.sinkhorn(10 * torch.randn(200, 4, 4, dtype=torch.float64))
    assert (comb.sum(-2) - 1).abs().max() < 1e-5
    assert (comb.sum(-1) - 1).abs().max() > 1e-2


def test_merge_reads_comb_as_in_out():
    """Stream 0 goes to stream 1 and nowhere else: comb[0, 1] = 1."""
    x = torch.tensor([[[1.0], [10.0]]])
    comb = torch.tensor([[[0.0, 1.0], [0.0, 0.0]]])
    merged = kernels.mhc_post(x, torch.zeros(1, 1), torch.zeros(1, 2), comb)
    assert merged.flatten().tolist() == [0.0, 1.0]


def test_eps_is_inside_the_root():
    x = torch.zeros(1, 2, 4)
    fn, scale, base = torch.randn(8, 8), torch.ones(3), torch.zeros(8)
    u, post, _ = kernels.mhc_pre(x, fn, scale, base)
    assert torch.isfinite(u).all()
    torch.testing.assert_close(post, torch.ones(1, 2))


@pytest.mark.parametrize("n", [1, 2, 5])
def test_streams_keep_their_dtype_and_mappings_are_float32(n):
    x = torch.randn(3, n, 8, dtype=torch.bfloat16)
    shapes = kernels.mapping_shapes("sinkhorn", n, 8)
    mapping = [torch.randn(*shape) for shape in shapes.values()]
    u, post, comb = kernels.mhc_pre(x, *mapping)
    merged = kernels.mhc_post(x, u, post, comb)
    assert (u.dtype, merged.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (post.dtype, comb.dtype) == (torch.float32, torch.float32)


def test_unconstrained_follows_equation_5():
    """H = alpha tanh(theta RMSNorm(x)^T) + b, stream by stream, written out for one token."""
    n, channels = 3, 5
    x, fn = torch.randn(n, channels).double(), torch.randn(2 + n, channels).double()
    scale, base = torch.randn(3).double(), torch.randn((2 + n) * n).double()
    pre, post, comb = kernels.mhc_mappings(
        x, fn, scale, base, residual_mixing="unconstrained", norm_eps=0.0
    )
    for i in range(n):
        normed = x[i] / x[i].square().mean().sqrt()
        assert pre[i].item() == pytest.approx((scale[0] * (fn[0] @ normed).tanh() + base[i]).item())
        expected_post = scale[1] * (fn[1] @ normed).tanh() + base[n + i]
        assert post[i].item() == pytest.approx(expected_post.item())
        for o in range(n):
            expected = scale[2] * (fn[2 + o] @ normed).tanh() + base[2 * n + i * n + o]
            assert comb[i, o].item() == pytest.approx(expected.item())


def test_identity_mixing_keeps_streams_apart():
    x = torch.randn(4, 2, 8)
    mapping = [torch.randn(*s) for s in kernels.mapping_shapes("identity", 2, 8).values()]
    _, _, comb = kernels.mhc_pre(x, *mapping, residual_mixing="identity")
    torch.testing.assert_close(comb, torch.eye(2).expand(4, 2, 2))


def test_expand_repeats_into_memory_of_its_own():
    h = torch.randn(2, 3)
    x = kernels.mhc_expand(h, 4)
    assert all(torch.equal(x[:, i], h) for i in range(4))
    x[:, 0] = 0
    assert torch.equal(x[:, 1], h)


@pytest.mark.parametrize("tokens", [(0,), (1,), (2, 0, 3)])
def test_no_tokens_and_one_token(tokens):
    x, f = torch.randn(*tokens, 4, 8), torch.randn(*tokens, 8)
    mapping = [torch.randn(*s) for s in kernels.mapping_shapes("sinkhorn", 4, 8).values()]
    u, post, comb = kernels.mhc_pre(x, *mapping)
    assert u.shape == f.shape
    assert kernels.mhc_post(x, f, post, comb).shape == x.shape


@pytest.mark.parametrize("mixing", kernels.RESIDUAL_MIXINGS)
def test_autocast_leaves_mappings_in_float32(mixing):
    x = torch.randn(5, 4, 16).bfloat16()
    mapping = [torch.randn(*s) for s in kernels.mapping_shapes(mixing, 4, 16).values()]
    expected = kernels.mhc_mappings(x, *mapping, residual_mixing=mixing)
    with torch.autocast("cpu", torch.bfloat16):
        found = kernels.mhc_mappings(x, *mapping, residual_mixing=mixing)
    for ours, theirs in zip(found, expected):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_meta_tensors_have_shapes():
    x = torch.empty(5, 4, 16, dtype=torch.bfloat16, device="meta")
    shapes = kernels.mapping_shapes("sinkhorn", 4, 16).values()
    u, post, comb = kernels.mhc_pre(x, *(torch.empty(s, device="meta") for s in shapes))
    assert [u.shape, post.shape, comb.shape] == [(5, 16), (5, 4), (5, 4, 4)]
