"""examples/pretrain_gpt.py with --overlap-moe-expert-parallel-comm: combined 1F1B trains alike."""

import pytest
from training_runs import STEPS, train

FLAGS = ("--mhc", "--num-experts", 4, "--moe-router-topk", 2, "--disable-bias-linear", "--bf16")
FLAGS += ("--expert-model-parallel-size", 2, "--moe-token-dispatcher-type", "alltoall")
FLAGS += ("--hidden-dropout", 0, "--attention-dropout", 0, "--global-batch-size", 8)
COMBINED = "--overlap-moe-expert-parallel-comm"
# Streams between layers are rounded to bf16 in either, gradients meet in another order.
ROUNDING = 1e-3


def test_combined_1f1b_trains_as_the_plain_schedule_does():
    plain, combined = (train(*FLAGS, *more, processes=2) for more in ((), (COMBINED,)))
    assert plain.code == combined.code == 0, combined.tail
    assert list(plain.losses) == list(combined.losses) == list(range(1, STEPS + 1))
    assert combined.losses == pytest.approx(plain.losses, rel=ROUNDING)
    assert combined.validation_loss == pytest.approx(plain.validation_loss, rel=ROUNDING)
    assert "mHC: combined 1F1B" in combined.log
    assert "layer_callables" in combined.log
    assert "mHC: combined 1F1B" not in plain.log
