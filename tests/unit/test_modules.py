"""MHCConfig, HyperConnection, HyperHead and the deferred state, without Megatron."""

import copy

import pytest
import torch

from megatron_mhc import HyperConnection, HyperHead, MHCConfig, StreamState, kernels

MIXINGS = kernels.RESIDUAL_MIXINGS


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_streams": 0}, "num_streams=0: expected a whole number from 1"),
        ({"num_streams": 4.0}, "num_streams=4.0"),
        ({"sinkhorn_iterations": 0}, "sinkhorn_iterations=0"),
        ({"eps": -1.0}, "eps=-1.0: expected 0 <= eps"),
        ({"eps": float("nan")}, "eps=nan"),
        ({"init_gating_factor": float("inf")}, "init_gating_factor=inf"),
        ({"residual_mixing": "none"}, "residual_mixing='none': expected one of sinkhorn"),
        ({"backend": "cuda"}, "backend='cuda': expected one of auto"),
    ],
)
def test_config_refuses_what_is_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        MHCConfig(**settings)


def test_one_stream_is_no_connection():
    with pytest.raises(ValueError, match="num_streams=1: one stream is the plain residual"):
        HyperConnection(MHCConfig(num_streams=1), 16)


@pytest.mark.parametrize("mixing", MIXINGS)
@pytest.mark.parametrize("sublayer", [0, 3, 5])
def test_connection_starts_as_the_plain_residual(mixing, sublayer):
    config = MHCConfig(residual_mixing=mixing)
    connection, h = HyperConnection(config, 16, sublayer), torch.randn(5, 2, 16)
    u, residual = connection(StreamState.expand(h, 4))
    torch.testing.assert_close(u, h)
    torch.testing.assert_close(residual.post, torch.ones(5, 2, 4))
    f = torch.randn(5, 2, 16)
    merged = residual.add(f).merged()
    torch.testing.assert_close(merged, (h + f).unsqueeze(-2).expand(5, 2, 4, 16))


def test_initial_mappings_are_those_of_the_design():
    connection = HyperConnection(MHCConfig(), 16, sublayer=6)
    x = torch.randn(3, 4, 16)
    pre, _, comb = kernels.mhc_mappings(x, connection.fn, connection.scale, connection.base)
    assert pre[0, 2].item() == pytest.approx(0.9)
    assert pre[0].sum().item() == pytest.approx(1.0)
    assert comb[0].diagonal().mean().item() == pytest.approx(0.948, abs=2e-3)
    assert connection.fn.abs().max() == 0
    assert connection.scale.tolist() == pytest.approx([0.01] * 3)


def test_head_starts_as_the_mean():
    x = torch.randn(3, 4, 16)
    torch.testing.assert_close(HyperHead(MHCConfig(), 16)(StreamState(x)), x.mean(-2))


def test_pending_merge_is_formed_by_every_consumer_alike():
    config = MHCConfig()
    first, second, head = (
        HyperConnection(config, 8),
        HyperConnection(config, 8, 1),
        HyperHead(config, 8),
    )
    for parameter in [*first.parameters(), *second.parameters(), *head.parameters()]:
        torch.nn.init.normal_(parameter)
    u, residual = first(StreamState(torch.randn(3, 4, 8)))
    pending = residual.add(torch.tanh(u))
    formed = StreamState(pending.merged())
    torch.testing.assert_close(second(pending)[0], second(formed)[0])
    torch.testing.assert_close(head(pending), head(formed))
    torch.testing.assert_close(pending.to_flat(), formed.x.flatten(-2))


def test_flat_streams_are_stream_major():
    x = torch.randn(2, 3, 4, 8)
    flat = StreamState(x).to_flat()
    assert torch.equal(flat[..., 8:16], x[..., 1, :])
    assert torch.equal(StreamState.from_flat(flat, 4).x, x)
    with pytest.raises(ValueError, match="width 30 does not hold 4 streams"):
        StreamState.from_flat(torch.zeros(2, 30), 4)


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casting_a_model_leaves_mappings_in_float32_to_the_last_bit(cast):
    model = torch.nn.ModuleList([HyperConnection(MHCConfig(), 8), HyperHead(MHCConfig(), 8)])
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)
    before = copy.deepcopy(model.state_dict())
    getattr(model, cast)()
    for name, value in model.state_dict().items():
        assert value.dtype == torch.float32
        assert torch.equal(value, before[name])


def test_mappings_still_move_to_another_device():
    connection = HyperConnection(MHCConfig(), 8).to("meta")
    assert {p.device.type for p in connection.parameters()} == {"meta"}
    assert {p.dtype for p in connection.bfloat16().parameters()} == {torch.float32}


def test_bf16_streams_stay_bf16():
    connection = HyperConnection(MHCConfig(), 8)
    u, residual = connection(StreamState(torch.randn(3, 4, 8).bfloat16()))
    merged = residual.add(u).merged()
    assert (u.dtype, merged.dtype) == (torch.bfloat16, torch.bfloat16)
    assert (residual.post.dtype, residual.comb.dtype) == (torch.float32, torch.float32)


def test_sequence_parallel_mark():
    for flag in (False, True):
        connection = HyperConnection(MHCConfig(), 8, sequence_parallel=flag)
        assert {p.sequence_parallel for p in connection.parameters()} == {flag}
