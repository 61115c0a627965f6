"""Recomputing what mHC adds, alone and with Megatron's own recomputation: the same bits."""

import pytest
import torch

from megatron_mhc import MHCConfig
from megatron_mhc.hyper_connection import HyperConnection
from tests.models import SEED, build_gpt, random_tokens, scramble_mappings
from tests.recompute_settings import DENSE, UNIFORM, selective, settings_id

DTYPES = [torch.float32, torch.bfloat16]

EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 64,
    "moe_shared_expert_intermediate_size": 64,
    "moe_router_load_balancing_type": "aux_loss",
    "moe_aux_loss_coeff": 0.01,
    "moe_grouped_gemm": False,
}


def gradients(mhc=None, dtype=torch.float32, **settings):
    """Loss and gradients of three layers with dropout, the same for every call but for ``mhc``."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(1)
    tokens, positions, labels = random_tokens()
    precision = {"bf16": dtype == torch.bfloat16, "params_dtype": dtype}
    settings = {"num_layers": 3, "hidden_dropout": 0.2, **precision, **settings}
    model = build_gpt(mhc or MHCConfig(), **settings)
    scramble_mappings(model)
    model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
    torch.manual_seed(SEED)
    loss = model(tokens, positions, None, labels=labels).mean()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_bits(ours, theirs) -> None:
    (loss, gradient_of), (expected, expected_of) = ours, theirs
    assert torch.equal(loss, expected)
    assert any(gradient.abs().max() > 0 for gradient in expected_of.values())
    for name, gradient in expected_of.items():
        assert torch.equal(gradient_of[name], gradient), name


@pytest.fixture(scope="module")
def expert_gradients():
    return gradients(**EXPERTS)


@pytest.fixture(scope="module")
def plain_gradients():
    """Without any recomputation, by dtype."""
    return {dtype: gradients(dtype=dtype) for dtype in DTYPES}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layers", [1, 2, 3, None], ids=lambda n: f"N={n or 'auto'}")
def test_mhc_recompute_gives_the_same_bits(layers, dtype, plain_gradients):
    """Three layers: blocks of one, of two and one, the whole stage, and the paper's choice."""
    mhc = MHCConfig(recompute=True, recompute_layer_num=layers)
    assert_same_bits(gradients(mhc, dtype), plain_gradients[dtype])


@pytest.mark.parametrize("mhc", [MHCConfig(), MHCConfig(recompute=True, recompute_layer_num=2)])
@pytest.mark.parametrize("settings", DENSE, ids=settings_id)
def test_megatrons_recompute_gives_the_same_bits(settings, mhc, plain_gradients):
    assert_same_bits(gradients(mhc, **settings), plain_gradients[torch.float32])


def test_full_recompute_gives_the_same_bits_in_bf16(plain_gradients):
    mhc = MHCConfig(recompute=True, recompute_layer_num=1)
    ours = gradients(mhc, torch.bfloat16, **UNIFORM, recompute_num_layers=2)
    assert_same_bits(ours, plain_gradients[torch.bfloat16])


@pytest.mark.parametrize("mixing", ["identity", "unconstrained"])
def test_every_mixing_is_recomputed(mixing):
    plain = gradients(MHCConfig(residual_mixing=mixing))
    ours = gradients(MHCConfig(residual_mixing=mixing, recompute=True))
    assert_same_bits(ours, plain)


@pytest.mark.parametrize("mhc", [MHCConfig(), MHCConfig(recompute=True)])
@pytest.mark.parametrize("modules", [(), ("moe",), ("shared_experts",), ("core_attn", "moe")])
def test_mixtures_of_experts(modules, mhc, expert_gradients):
    assert_same_bits(gradients(mhc, **EXPERTS, **selective(*modules)), expert_gradients)


@pytest.mark.parametrize("normalization", ["LayerNorm", "RMSNorm"])
def test_biases_and_layer_norms(normalization):
    settings = {"normalization": normalization, "add_bias_linear": True}
    plain = gradients(**settings)
    assert_same_bits(gradients(MHCConfig(recompute=True), **settings), plain)


def test_blocks_start_where_they_should():
    def starts(layers, block):
        mhc = MHCConfig(recompute=True, recompute_layer_num=block)
        decoder = build_gpt(mhc, num_layers=layers).decoder
        return [layer.starts_recomputed_block for layer in decoder.layers]

    assert starts(4, 2) == [True, False, True, False]
    assert starts(3, 2) == [True, False, True]
    assert starts(3, 9) == [True, False, False]


def test_pytorchs_mappings_run_once_more_and_sublayers_do_not(monkeypatch):
    calls = {"mapping": 0, "attention": 0}
    map_streams = HyperConnection._map

    def counted_map(self, *tensors):
        calls["mapping"] += 1
        return map_streams(self, *tensors)

    def counted_attention(*_):
        calls["attention"] += 1

    monkeypatch.setattr(HyperConnection, "_map", counted_map)
    model = build_gpt(MHCConfig(recompute=True, recompute_layer_num=2), num_layers=3)
    for layer in model.decoder.layers:
        layer.self_attention.register_forward_hook(counted_attention)
    tokens, positions, labels = random_tokens()
    loss = model(tokens, positions, None, labels=labels).mean()
    assert calls == {"mapping": 6, "attention": 3}
    loss.backward()
    assert calls == {"mapping": 12, "attention": 3}


def test_without_gradients_nothing_is_recomputed():
    model = build_gpt(MHCConfig(recompute=True)).eval()
    plain = build_gpt(MHCConfig()).eval()
    tokens, positions, _ = random_tokens()
    with torch.no_grad():
        logits = model(tokens, positions, None)
        assert torch.equal(logits, plain(tokens, positions, None))
