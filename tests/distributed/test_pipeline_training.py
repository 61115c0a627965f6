"""examples/pretrain_gpt.py in pipeline stages: the same training, on the same checkpoints."""

from pathlib import Path

import pytest
from training_runs import SAVE_INTERVAL, STEPS, Run, train

# Dropout draws from generators that each stage has for itself.
FLAGS = ("--mhc", "--num-layers", 4, "--hidden-dropout", 0, "--attention-dropout", 0)
PIPELINE = ("--pipeline-model-parallel-size", 2, "--num-virtual-stages-per-pipeline-rank", 2)
LOG_PRECISION = 1e-6
"""Losses are printed with 7 digits."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    """One process saves; stages go on from its first save; one process reads what they saved."""
    folder: Path = tmp_path_factory.mktemp("pipeline-training")
    single, staged = folder / "single", folder / "staged"
    from_first = ("--load", single, "--ckpt-step", SAVE_INTERVAL)
    return {
        "single": train(*FLAGS, "--save", single),
        "staged": train(*FLAGS, *PIPELINE, *from_first, "--save", staged, processes=2),
        "single again": train(*FLAGS, "--load", staged),
    }


def test_stages_go_on_from_a_single_process_with_its_losses(runs):
    single, staged = runs["single"], runs["staged"]
    assert single.code == 0, single.tail
    assert staged.code == 0, staged.tail
    assert list(single.losses) == list(range(1, STEPS + 1)), single.tail
    after = {step: loss for step, loss in single.losses.items() if step > SAVE_INTERVAL}
    assert staged.losses == pytest.approx(after, rel=LOG_PRECISION), staged.tail
    assert staged.validation_loss == pytest.approx(single.validation_loss, rel=LOG_PRECISION)


def test_a_single_process_loads_what_stages_saved(runs):
    again = runs["single again"]
    assert again.code == 0, again.tail
    assert not again.losses, "the training was over: it only evaluates"
    expected = runs["staged"].validation_loss
    assert again.validation_loss == pytest.approx(expected, rel=LOG_PRECISION)


def test_the_start_up_line_says_schedule_and_streams(runs):
    lines = [line for line in runs["staged"].log.splitlines() if line.startswith("mHC pipeline")]
    assert lines == [
        "mHC pipeline: 2 stages, interleaved 1F1B, 2 chunks per stage; boundaries [s, b, 128] are "
        "merged and sent in program order (no streams on a CPU), not waited for "
        "(--mhc-pipeline-overlap post)"
    ]
    assert "mHC pipeline" not in runs["single"].log
