"""Recompute with the Triton kernels, interpreted: the same bits, alone and in full recompute."""

import interpreter  # noqa: F401  (first: it mends the interpreter)
import pytest
import torch

from megatron_mhc import MHCConfig
from tests.models import build_gpt, random_tokens, scramble_mappings


def gradients(recompute: bool = False, **settings):
    torch.manual_seed(1)
    tokens, positions, labels = random_tokens(1, 4)
    mhc = MHCConfig(backend="triton", recompute=recompute)
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
