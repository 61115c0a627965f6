"""Megatron's own activation recomputation around mHC layers: the same gradients, bit for bit."""

import pytest
import torch

from megatron_mhc import MHCConfig
from tests.models import SEED, build_gpt, random_tokens, scramble_mappings


def gradients(**recompute):
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    tokens, positions, labels = random_tokens()
    model = build_gpt(MHCConfig(), num_layers=3, hidden_dropout=0.2, **recompute)
    scramble_mappings(model)
    model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
    torch.manual_seed(SEED)
    loss = model(tokens, positions, None, labels=labels).mean()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
        {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 2},
        {"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": 2},
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {"recompute_granularity": "selective", "recompute_modules": ["mlp"]},
    ],
    ids=lambda settings: " ".join(str(value) for value in settings.values()),
)
def test_recompute_gives_the_same_loss_and_gradients(recompute):
    torch.manual_seed(1)
    loss, plain = gradients()
    torch.manual_seed(1)
    recomputed_loss, recomputed = gradients(**recompute)
    assert torch.equal(loss, recomputed_loss)
    assert any(gradient.abs().max() > 0 for gradient in plain.values())
    for name, gradient in plain.items():
        assert torch.equal(recomputed[name], gradient), name
