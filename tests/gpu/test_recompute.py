"""Recompute on a GPU, Transformer Engine layers: the same bits, and far less memory."""

import gc

import pytest
import torch

from megatron_mhc import MHCConfig
from tests.models import SEED, build_gpt, random_tokens, scramble_mappings
from tests.recompute_settings import DENSE, UNIFORM, selective, settings_id

WIDE = {"hidden_size": 256, "ffn_hidden_size": 512, "num_layers": 3}
EXPERTS = {
    "num_moe_experts": 4,
    "moe_router_topk": 2,
    "moe_ffn_hidden_size": 256,
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
}


def gradients(mhc=None, dtype=torch.bfloat16, transformer_engine=True, ahead=False, **settings):
    """Loss and gradients with dropout; ``ahead``: replayed before the backward pass."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(1)
    tokens, positions, labels = random_tokens(batch=2, length=64)
    precision = {"bf16": dtype == torch.bfloat16, "params_dtype": dtype}
    model = build_gpt(
        mhc or MHCConfig(),
        transformer_engine=transformer_engine,
        **{"hidden_dropout": 0.1, **precision, **WIDE, **settings},
    ).cuda()
    scramble_mappings(model)
    model_parallel_cuda_manual_seed(SEED, force_reset_rng=True)
    loss = model(tokens, positions, None, labels=labels).mean()
    if ahead:
        assert model.decoder.replay_ahead()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in model.named_parameters()}


def assert_same_bits(ours, theirs) -> None:
    (loss, gradient_of), (expected, expected_of) = ours, theirs
    assert torch.equal(loss, expected)
    assert any(gradient.abs().max() > 0 for gradient in expected_of.values())
    for name, gradient in expected_of.items():
        assert torch.equal(gradient_of[name], gradient), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layers", [1, 2, 3, None], ids=lambda n: f"N={n or 'auto'}")
def test_mhc_recompute_gives_the_same_bits(layers, dtype):
    mhc = MHCConfig(recompute=True, recompute_layer_num=layers)
    # Attention in float32 needs the local layers: fused attention is for 16 bits.
    layer = {"transformer_engine": dtype == torch.bfloat16}
    assert_same_bits(gradients(mhc, dtype, **layer), gradients(None, dtype, **layer))


@pytest.mark.parametrize("mhc", [MHCConfig(), MHCConfig(recompute=True, recompute_layer_num=2)])
@pytest.mark.parametrize("settings", DENSE, ids=settings_id)
def test_megatrons_recompute_gives_the_same_bits(settings, mhc):
    """With the Triton kernels: the deferred merge crosses the checkpoint."""
    assert_same_bits(gradients(mhc, **settings), gradients())


# mHC's recomputation has the norms in it, so it never goes with Megatron's of them.
@pytest.mark.parametrize(
    ("modules", "recompute"),
    [(("layernorm",), False)]
    + [(modules, mhc) for modules in ((), ("moe",), ("moe_act",)) for mhc in (False, True)],
)
def test_mixtures_of_experts(modules, recompute):
    mhc = MHCConfig(recompute=recompute)
    expected = gradients(**EXPERTS)
    assert_same_bits(gradients(mhc, **EXPERTS, **selective(*modules)), expected)


@pytest.mark.parametrize("recipe", ["tensorwise", "blockwise"])
@pytest.mark.parametrize("full", [False, True], ids=["mHC", "mHC in full"])
def test_fp8_gives_the_same_bits(recipe, full):
    fp8 = {"fp8": "hybrid", "fp8_recipe": recipe}
    recompute = {**UNIFORM, "recompute_num_layers": 2} if full else {}
    ours = gradients(MHCConfig(recompute=True), **fp8, **recompute)
    assert_same_bits(ours, gradients(**fp8))


def test_replay_ahead_gives_the_same_bits():
    ours = gradients(MHCConfig(recompute=True, recompute_layer_num=3), ahead=True)
    assert_same_bits(ours, gradients())


def test_only_block_starts_and_sublayer_outputs_are_kept():
    """What mHC adds to a plain model falls from 12 C a layer to 4 C a block and little else."""
    kept = {}
    for name, mhc in {
        "plain": None,
        "mhc": MHCConfig(),
        "recomputed": MHCConfig(recompute=True, recompute_layer_num=4),
    }.items():
        wide = {"hidden_size": 512, "ffn_hidden_size": 1024, "num_layers": 4}
        precision = {"bf16": True, "params_dtype": torch.bfloat16}
        model = build_gpt(mhc, transformer_engine=True, **wide, **precision).cuda()
        tokens, positions, _ = random_tokens(batch=64, length=64)
        model(tokens, positions, None)
        gc.collect()
        before = torch.cuda.memory_allocated()
        logits = model(tokens, positions, None)
        kept[name] = (torch.cuda.memory_allocated() - before) / (64 * 64 * 512 * 2)
        del logits, model
    # In units of C, 8 sublayers. A plain one keeps the residual and its normalised form; mHC X, u,
    # its normalised form and f, and the streams at the end; recompute one X, and f. The
    # coefficients are below two units in all.
    assert kept["mhc"] - kept["plain"] == pytest.approx(8 * (4 + 1) + 4, abs=3)
    assert kept["recomputed"] - kept["plain"] == pytest.approx(4 - 8, abs=3)
