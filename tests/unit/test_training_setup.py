"""What Megatron's own optimizer, wrappers and checkpoints make of the mHC parameters."""

import torch

from megatron_mhc import MHCConfig
from tests.models import build_gpt


def mapping_parameters(model):
    return {name: p for name, p in model.named_parameters() if "hyper" in name}


def test_parameter_names_are_those_of_the_design():
    names = set(mapping_parameters(build_gpt(MHCConfig())))
    connections = [
        f"decoder.layers.{i}.{part}_hyper_connection"
        for i in (0, 1)
        for part in ("self_attention", "mlp")
    ]
    owners = [*connections, "decoder.hyper_head"]
    assert names == {f"{o}.{p}" for o in owners for p in ("fn", "base", "scale")}


def test_scale_and_base_get_no_weight_decay_and_fn_does():
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer

    model = build_gpt(MHCConfig())
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    optimizer = get_megatron_optimizer(OptimizerConfig(lr=1e-3, weight_decay=0.1), [wrapped])
    decays = {
        names[id(parameter)]: group["wd_mult"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    for name in mapping_parameters(model):
        assert decays[name] == (1.0 if name.endswith("fn") else 0.0), name


def test_a_bf16_model_keeps_its_mappings_in_float32():
    from megatron.core.transformer.module import Float16Module

    model = build_gpt(MHCConfig(), bf16=True, params_dtype=torch.bfloat16)
    wrapped = Float16Module(model.config, model)
    for name, parameter in wrapped.named_parameters():
        expected = torch.float32 if "hyper" in name else torch.bfloat16
        assert parameter.dtype == expected, name


def test_checkpoint_keys_hold_every_parameter_under_its_name():
    model = build_gpt(MHCConfig())
    sharded = model.sharded_state_dict()
    for name in mapping_parameters(model):
        assert name in sharded
    assert sharded["decoder.hyper_head.fn"].key == "decoder.hyper_head.fn"
    assert (
        sharded["decoder.layers.1.mlp_hyper_connection.fn"].key
        == "decoder.layers.mlp_hyper_connection.fn"
    )


def test_groups_of_the_optimizer_have_one_dtype():
    """Megatron's own, of a bf16 model, have its float32 mappings among the others."""
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.transformer.module import Float16Module

    from megatron_mhc import patches

    model = build_gpt(MHCConfig(), bf16=True, params_dtype=torch.bfloat16)
    model = Float16Module(model.config, model)
    wrapped = DistributedDataParallel(model.config, DistributedDataParallelConfig(), model)
    config = OptimizerConfig(lr=1e-3, weight_decay=0.1, bf16=True, params_dtype=torch.bfloat16)
    found = []
    for patched in (False, True):
        (patches.apply if patched else patches.undo)()
        optimizer = get_megatron_optimizer(config, [wrapped])
        (optimizer,) = optimizer.chained_optimizers
        halves, wide = optimizer.float16_groups, optimizer.fp32_from_fp32_groups
        found.append([(len(half), len(whole)) for half, whole in zip(halves, wide)])
    assert all(half and whole for half, whole in found[0])
    assert all(bool(half) != bool(whole) for half, whole in found[1])
    assert sum(map(sum, found[0])) == sum(map(sum, found[1]))


def test_the_head_is_called_so_that_its_hooks_run():
    """Megatron's DDP waits for gathered parameters in a hook."""
    model = build_gpt(MHCConfig())
    called = []
    model.decoder.hyper_head.register_forward_pre_hook(lambda *_: called.append(True))
    tokens = torch.zeros(1, 8, dtype=torch.long)
    model(tokens, tokens, None)
    assert called == [True]
