"""Megatron's own DDP, schedule and --gradient-accumulation-fusion on a model with Triton mappings.

Apex has the linear layers' kernel for that; a product in PyTorch stands in for it.
"""

import types

import interpreter  # noqa: F401  (first: it mends the interpreter)
import pytest
import torch

from megatron_mhc import HyperConnection, HyperHead, MHCConfig
from tests.models import build_gpt, random_tokens, scramble_mappings, start_megatron

MICRO_BATCHES = 2


@pytest.fixture(scope="module", autouse=True)
def _linear_layers_without_apex():
    start_megatron()
    from megatron.core.tensor_parallel import layers

    def accumulate(inputs, grad_output, main_grad):
        main_grad.add_(grad_output.t().float() @ inputs.float())

    apex = types.SimpleNamespace(wgrad_gemm_accum_fp32=accumulate)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(layers, "_grad_accum_fusion_available", True)
        patch.setattr(layers, "fused_weight_gradient_mlp_cuda", apex, raising=False)
        yield


def mappings(model):
    """Parameters of connections and head."""
    for module in model.modules():
        if isinstance(module, HyperConnection | HyperHead):
            yield from module.parameters()


def main_grads(fused=True, recompute=False, full=False, steps=2, **ddp_settings):
    """(name, gradient) of every parameter in each of ``steps`` without an optimizer between them.

    Args:
        fused: the mappings' gradients too, not only those of Megatron's linear layers.
        full: Megatron's full recompute.
    """
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.distributed.finalize_model_grads import finalize_model_grads
    from megatron.core.pipeline_parallel import get_forward_backward_func

    settings = {"recompute_granularity": "full", "recompute_method": "uniform"} if full else {}
    mhc = MHCConfig(backend="triton", recompute=recompute)
    model = build_gpt(
        mhc,
        num_layers=1,
        hidden_size=16,
        ffn_hidden_size=16,
        num_attention_heads=2,
        bf16=True,
        params_dtype=torch.bfloat16,
        gradient_accumulation_fusion=True,
        finalize_model_grads_func=finalize_model_grads,
        recompute_num_layers=1 if full else None,
        **settings,
    )
    scramble_mappings(model)
    for module in model.modules():
        if isinstance(module, HyperConnection | HyperHead):
            assert module.gradient_accumulation_fusion
            module.gradient_accumulation_fusion = fused
    ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True, **ddp_settings)
    model = DistributedDataParallel(model.config, ddp, model)
    model.config.no_sync_func = model.no_sync if ddp.overlap_grad_reduce else None
    torch.manual_seed(3)
    found = []
    for _ in range(steps):
        model.zero_grad_buffer()
        get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter([random_tokens(1, 4) for _ in range(MICRO_BATCHES)]),
            model=[model],
            num_microbatches=MICRO_BATCHES,
            seq_length=4,
            micro_batch_size=1,
        )
        for parameter in mappings(model):
            assert parameter.grad_added_to_main_grad is fused
            assert parameter.grad is None
        found += [(name, p.main_grad.clone()) for name, p in model.named_parameters()]
    return found


def forward_step(iterator, model):
    tokens, positions, labels = next(iterator)
    losses = model(tokens, positions, None, labels=labels)
    return losses, lambda losses: (losses.float().mean(), {})


@pytest.fixture(scope="module")
def added_by_hooks(_linear_layers_without_apex):
    return main_grads(fused=False)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"recompute": True},
        {"full": True},
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True},
    ],
    ids=["plain", "mHC recompute", "full recompute", "distributed optimizer"],
)
def test_gradients_have_the_bits_of_those_added_by_hooks(settings, added_by_hooks):
    found = main_grads(**settings)
    assert len(found) == len(added_by_hooks)
    for (name, gradient), (_, expected) in zip(found, added_by_hooks):
        assert expected.any(), name
        assert torch.equal(gradient, expected), name
