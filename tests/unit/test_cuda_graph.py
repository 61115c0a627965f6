"""What --cuda-graph-impl is refused with before a training starts."""

import argparse
from types import SimpleNamespace

import pytest

from megatron_mhc import environment
from megatron_mhc.cuda_graph import _REFUSED, describe, refuse_uncapturable
from megatron_mhc.errors import UserError


@pytest.fixture
def args(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    return SimpleNamespace(
        **dict.fromkeys(_REFUSED),
        cuda_graph_impl="full_iteration",
        cuda_graph_warmup_steps=3,
        fp16=False,
        loss_scale=None,
    )


def test_what_can_be_captured_is_not_refused(args):
    assert refuse_uncapturable(args) is None
    assert describe(args).startswith("CUDA graph: after 3 steps, forward and backward pass")


def test_without_a_gpu_it_is_refused(args, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="--cuda-graph-impl full_iteration: there is no GPU"):
        refuse_uncapturable(args)
    args.cuda_graph_impl = "none"
    assert refuse_uncapturable(args) is None


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("step_batch_size_schedule", "0:8 1M:16", r"--step-batch-size-schedule 0:8 1M:16: with"),
        ("timing_log_level", 1, r"--timing-log-level 1: .*; leave one of them out"),
        ("log_straggler", True, r"--log-straggler: with"),
        ("check_for_spiky_loss", True, r"--check-for-spiky-loss: with .* leave one of them out"),
        ("check_for_large_grads", True, r"--check-for-large-grads: with"),
        ("qk_clip", True, r"--qk-clip: with"),
        ("log_max_attention_logit", True, r"--log-max-attention-logit: with"),
        ("save_activations_interval", 5, r"--save-activations-interval 5: with"),
        ("save_dgrads_interval", 5, r"--save-dgrads-interval 5: with"),
        ("save_wgrads_interval", 5, r"--save-wgrads-interval 5: with"),
        ("fp16", True, r"--fp16: .* loss scale; give a --loss-scale that stays, or --bf16"),
        ("cuda_graph_warmup_steps", 0, r"--cuda-graph-warmup-steps 0: .*; use 1 or more"),
    ],
)
def test_what_a_graph_would_get_wrong_is_refused(args, name, value, message):
    setattr(args, name, value)
    with pytest.raises(UserError, match=message):
        refuse_uncapturable(args)
    args.cuda_graph_impl = "local"
    assert refuse_uncapturable(args) is None


def test_a_constant_loss_scale_can_be_captured(args):
    args.fp16, args.loss_scale = True, 1024.0
    assert refuse_uncapturable(args) is None


def test_what_is_refused_are_flags_of_megatrons():
    environment.prepare()
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    known = {option for action in parser._actions for option in action.option_strings}
    flags = {"--" + name.replace("_", "-") for name in _REFUSED}
    assert flags <= known
    assert {action.dest for action in parser._actions} >= set(_REFUSED)


def test_the_script_asks(args, monkeypatch):
    environment.prepare()
    from megatron_mhc import startup

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args.context_parallel_size = 1
    monkeypatch.setattr(startup, "parse_and_validate_args", lambda extra_args_provider: args)
    monkeypatch.setattr(startup, "refuse_unsupported_data", lambda args: None)
    with pytest.raises(UserError, match="--cuda-graph-impl full_iteration: there is no GPU"):
        startup.parse_arguments()
