"""Gains as the paper defines them, recorded from a running model, at no cost when off."""

from types import SimpleNamespace

import pytest
import torch

from megatron_mhc import MHCConfig, environment
from tests.models import build_gpt, random_tokens, scramble_mappings


@pytest.fixture(scope="module")
def diagnostics():
    environment.prepare()
    from megatron_mhc import diagnostics

    return diagnostics


def test_gains_are_row_and_column_sums_of_the_residual_matrix(diagnostics):
    h_res = torch.tensor([[1.0, -4.0], [0.5, 0.25]])
    comb = h_res.T  # index (in, out)
    assert diagnostics.forward_gain(comb).item() == 3.0
    assert diagnostics.backward_gain(comb).item() == 3.75


def test_composite_gain_is_of_the_product_over_sublayers(diagnostics):
    first, second = torch.randn(5, 3, 3), torch.randn(5, 3, 3)
    mean = torch.zeros(5, 3)
    records = [
        diagnostics.MappingRecord("layer_001/attention", mean, mean, first),
        diagnostics.MappingRecord("layer_001/mlp", mean, mean, second),
    ]
    scalars = diagnostics.summarize(records)
    h_res = second.transpose(-1, -2) @ first.transpose(-1, -2)  # the later one is on the left
    rows = h_res.sum(-1).abs().amax(-1).mean()
    columns = h_res.sum(-2).abs().amax(-1).mean()
    torch.testing.assert_close(scalars["mhc/composite_forward_gain"], rows)
    torch.testing.assert_close(scalars["mhc/composite_backward_gain"], columns)


def test_a_models_mappings_are_recorded_in_order(diagnostics):
    model = build_gpt(MHCConfig(), num_layers=3)
    scramble_mappings(model)
    tokens, positions, _ = random_tokens(batch=2, length=16)
    with diagnostics.recorded(model) as records:
        model(tokens, positions, None)
    names = [f"layer_{i:03d}/{part}" for i in (1, 2, 3) for part in ("attention", "mlp")]
    assert [record.name for record in records] == names
    assert all(record.comb.shape == (16, 4, 4) for record in records)
    scalars = diagnostics.summarize(records)
    # Sinkhorn makes rows of H_res exact: forward gains are 1, backward ones near it.
    for name in names:
        assert scalars[f"mhc-forward_gain/{name}"].item() == pytest.approx(1, abs=1e-4)
        assert scalars[f"mhc-backward_gain/{name}"].item() >= 1 - 1e-4
        assert 0 < scalars[f"mhc-pre/{name}"].item() < 1
        assert 0 < scalars[f"mhc-post/{name}"].item() < 2


def test_nothing_is_left_behind(diagnostics):
    model = build_gpt(MHCConfig())
    tokens, positions, _ = random_tokens()
    with diagnostics.recorded(model) as records:
        model(tokens, positions, None)
    count = len(records)
    model(tokens, positions, None)
    assert len(records) == count
    connections = [connection for _, connection in diagnostics.hyper_connections(model)]
    assert not any(connection._forward_hooks for connection in connections)


def test_unconstrained_gains_can_exceed_one(diagnostics):
    model = build_gpt(MHCConfig(residual_mixing="unconstrained"), num_layers=3)
    scramble_mappings(model)
    tokens, positions, _ = random_tokens()
    with diagnostics.recorded(model) as records:
        model(tokens, positions, None)
    assert diagnostics.summarize(records)["mhc/composite_forward_gain"] > 2


class FakeWriters:
    """Stands for TensorBoard's writer and W&B's run."""

    def __init__(self):
        self.tensorboard, self.wandb = {}, {}

    def add_scalar(self, name, value, step):
        self.tensorboard.setdefault(step, {})[name] = value

    def log(self, scalars, step):
        self.wandb[step] = scalars


def test_gain_log_writes_once_every_interval_to_both_writers(diagnostics, monkeypatch):
    args, writers = SimpleNamespace(mhc=True, mhc_log_gain_interval=2), FakeWriters()
    monkeypatch.setattr(diagnostics, "get_args", lambda: args)
    monkeypatch.setattr(diagnostics, "get_tensorboard_writer", lambda: writers)
    monkeypatch.setattr(diagnostics, "get_wandb_writer", lambda: writers)
    model, gain_log = build_gpt(MHCConfig()), diagnostics.GainLog()
    tokens, positions, _ = random_tokens()

    def step(iteration, training=True):
        args.curr_iteration = iteration
        model.train(training)
        with gain_log.around_forward(model):
            model(tokens, positions, None)

    for iteration in range(5):
        step(iteration)
        step(iteration)  # another micro-batch of the same step
    step(5, training=False)  # validation
    assert list(writers.tensorboard) == [1, 2, 4]
    assert writers.wandb == writers.tensorboard
    logged = writers.tensorboard[4]
    assert logged["mhc/composite_forward_gain"] == pytest.approx(1, abs=1e-4)
    assert "mhc-comb_diagonal/layer_002/mlp" in logged

    args.mhc_log_gain_interval = 0
    step(6)
    assert 7 not in writers.tensorboard
