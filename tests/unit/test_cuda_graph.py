"""What --cuda-graph-impl is refused with before a training starts."""

from types import SimpleNamespace

import pytest

from megatron_mhc import environment
from megatron_mhc.cuda_graph import describe, refuse_uncapturable
from megatron_mhc.errors import UserError


@pytest.fixture
def args(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    return SimpleNamespace(
        cuda_graph_impl="full_iteration",
        cuda_graph_warmup_steps=3,
        step_batch_size_schedule=None,
        timing_log_level=0,
        check_for_spiky_loss=False,
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
        (
            "step_batch_size_schedule",
            "0:8 1M:16",
            r"--step-batch-size-schedule 0:8 1M:16: .*; give --global-batch-size instead",
        ),
        ("timing_log_level", 1, r"--timing-log-level 1: .*; use 0"),
        ("check_for_spiky_loss", True, r"--check-for-spiky-loss: .*; leave one of them out"),
    ],
)
def test_what_a_graph_would_get_wrong_is_refused(args, name, value, message):
    setattr(args, name, value)
    with pytest.raises(UserError, match=message):
        refuse_uncapturable(args)
    args.cuda_graph_impl = "local"
    assert refuse_uncapturable(args) is None


def test_the_script_asks(args, monkeypatch):
    environment.prepare()
    from megatron_mhc import startup

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    args.context_parallel_size = 1
    monkeypatch.setattr(startup, "parse_and_validate_args", lambda extra_args_provider: args)
    monkeypatch.setattr(startup, "refuse_unsupported_data", lambda args: None)
    with pytest.raises(UserError, match="--cuda-graph-impl full_iteration: there is no GPU"):
        startup.parse_arguments()
