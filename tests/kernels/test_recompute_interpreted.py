"""Recompute with the Triton kernels, interpreted: the same bits, alone and in full recompute."""

import interpreter  # noqa: F401  (first: it mends the interpreter)
import pytest
import torch

from megatron_mhc import HyperConnection, HyperHead, MHCConfig, StreamState, kernels
from tests.models import build_gpt, random_tokens, scramble_mappings


def gradients(recompute: bool = False, recompute_layer_num: int | None = None, **settings):
    torch.manual_seed(1)
    tokens, positions, labels = random_tokens(1, 4)
    mhc = MHCConfig(backend="triton", recompute=recompute, recompute_layer_num=recompute_layer_num)
    settings = {"bf16": True, "params_dtype": torch.bfloat16, "hidden_size": 16, **settings}
    model = build_gpt(
        mhc, ffn_hidden_size=16, num_attention_heads=2, hidden_dropout=0.2, **settings
    )
    scramble_mappings(model)
    torch.manual_seed(2)
    model(tokens, positions, None, labels=labels).mean().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def expected():
    return gradients()


@pytest.mark.parametrize(
    ("recompute", "settings"),
    [
        (True, {}),
        (False, {"recompute_method": "uniform", "recompute_num_layers": 1}),
        (True, {"recompute_method": "block", "recompute_num_layers": 1}),
    ],
    ids=["mHC", "full", "mHC in full"],
)
def test_gradients_have_the_same_bits(recompute, settings, expected):
    full = {"recompute_granularity": "full"} if settings else {}
    found = gradients(recompute, **full, **settings)
    assert any(gradient.abs().max() > 0 for gradient in expected.values())
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_no_mapping_is_computed_again(monkeypatch, expected):
    """One replay for the sublayers of a block, one for the head: no products, no Sinkhorn."""
    calls = []
    watched = ((HyperConnection, "_map"), (HyperHead, "_collapse"), (kernels, "mhc_replay"))
    for owner, name in watched:
        function = getattr(owner, name)

        def noted(*tensors, name=name, function=function, **options):
            calls.append(name)
            return function(*tensors, **options)

        monkeypatch.setattr(owner, name, noted)
    found = gradients(recompute=True, recompute_layer_num=2)
    assert calls == ["_map"] * 4 + ["_collapse"] + ["mhc_replay"] * 2
    for name, gradient in expected.items():
        assert torch.equal(found[name], gradient), name


def test_streams_need_not_be_contiguous():
    """An operator saves a copy of such streams, which no stand-in is known for."""
    grads = []
    for recompute in (False, True):
        torch.manual_seed(3)
        connection = HyperConnection(MHCConfig(backend="triton", recompute=recompute), 16)
        scramble_mappings(connection)
        x = torch.randn(2, 3, 4, 16).bfloat16().requires_grad_()
        u, residual = connection(StreamState(x.transpose(0, 1)))
        u, residual = connection(residual.add(u.tanh()))
        (u.float().square().sum() + residual.x.float().square().sum()).backward()
        grads.append([x.grad, *(parameter.grad for parameter in connection.parameters())])
    for ours, theirs in zip(*grads):
        assert theirs.any()
        assert torch.equal(ours, theirs)
