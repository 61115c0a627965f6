"""mHC around Transformer Engine layers on a GPU: bf16 and fp8."""

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnection
from megatron_mhc.parameters import Float32Parameters
from tests.models import build_gpt, random_tokens, scramble_mappings

MHC = MHCConfig()
WIDE = {"hidden_size": 256, "ffn_hidden_size": 512, "num_layers": 2}


def test_initial_logits_equal_plain_transformer_engine_model():
    tokens, positions, _ = random_tokens()
    plain = build_gpt(None, transformer_engine=True).cuda()
    mhc = build_gpt(MHC, transformer_engine=True).cuda()
    expected, logits = plain(tokens, positions, None), mhc(tokens, positions, None)
    assert (logits - expected).norm() / expected.norm() < 1e-4


def bf16_model(mhc=MHC, **overrides):
    from megatron.core.transformer.module import Float16Module

    model = build_gpt(
        mhc,
        transformer_engine=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        **{**WIDE, **overrides},
    ).cuda()
    scramble_mappings(model)
    return Float16Module(model.config, model)


@pytest.mark.parametrize("recipe", [None, "tensorwise", "blockwise"])
def test_no_mapping_parameter_and_no_stream_is_cast(recipe):
    fp8 = {} if recipe is None else {"fp8": "hybrid", "fp8_recipe": recipe}
    model = bf16_model(**fp8)
    for module in model.modules():
        if isinstance(module, Float32Parameters):
            assert {p.dtype for p in module.parameters()} == {torch.float32}

    seen = []

    def check(connection, inputs, output):
        u, residual = output
        seen.append((inputs[0].x.dtype, residual.x.dtype, u.dtype, residual.comb.dtype))

    for module in model.modules():
        if isinstance(module, HyperConnection):
            module.register_forward_hook(check)
    tokens, positions, labels = random_tokens(batch=2, length=64)
    loss = model(tokens, positions, None, labels=labels).mean()
    loss.backward()

    expected = (torch.bfloat16, torch.bfloat16, torch.bfloat16, torch.float32)
    assert seen == [expected] * 4
    for name, parameter in model.named_parameters():
        gradient = parameter.grad
        if gradient is None:  # Transformer Engine may write main_grad in its place
            gradient = parameter.main_grad
        assert torch.isfinite(gradient).all(), name


def test_fp8_loss_is_near_bf16():
    tokens, positions, labels = random_tokens(batch=2, length=64)
    losses = []
    for fp8 in ({}, {"fp8": "hybrid", "fp8_recipe": "tensorwise"}):
        model = bf16_model(**fp8)
        losses.append(model(tokens, positions, None, labels=labels).mean().item())
    assert losses[0] != losses[1]
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)
