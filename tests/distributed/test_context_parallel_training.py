"""examples/pretrain_gpt.py with divided sequences: the same training, on the same checkpoints."""

from pathlib import Path

import pytest
from training_runs import SAVE_INTERVAL, STEPS, Run, train

from megatron_mhc.report.curves import Curve, read_run

# Dropout draws the same for every part of a sequence.
FLAGS = ("--mhc", "--mhc-log-gain-interval", 2, "--hidden-dropout", 0, "--attention-dropout", 0)
DIVIDED = ("--context-parallel-size", 2)
LOG_PRECISION = 1e-6
"""Losses are printed with 7 digits."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("context-parallel-training")


@pytest.fixture(scope="module")
def runs(folder) -> dict[str, Run]:
    """Two processes that share every sequence save; one goes on from their first save."""

    def logged(name: str, *flags: object, **how) -> Run:
        run = train(*FLAGS, "--tensorboard-dir", folder / name, *flags, **how)
        assert run.code == 0, run.tail
        return run

    saved = folder / "saved"
    gathered = {"through": ("gathered_training.py",), "processes": 2}
    return {
        "divided": logged("divided", *DIVIDED, "--save", saved, **gathered),
        "single": logged("single", "--load", saved, "--ckpt-step", SAVE_INTERVAL),
    }


def test_a_single_process_goes_on_with_the_losses_of_two(runs):
    divided, single = runs["divided"], runs["single"]
    assert list(divided.losses) == list(range(1, STEPS + 1)), divided.tail
    after = {step: loss for step, loss in divided.losses.items() if step > SAVE_INTERVAL}
    assert single.losses == pytest.approx(after, rel=LOG_PRECISION), single.tail
    assert single.validation_loss == pytest.approx(divided.validation_loss, rel=LOG_PRECISION)


def test_gains_are_those_of_the_whole_sequence(runs, folder):
    def gains(name: str) -> dict[str, Curve]:
        scalars = read_run(folder / name).scalars
        return {tag: curve for tag, curve in scalars.items() if tag.startswith("mhc")}

    single, divided = gains("single"), gains("divided")
    assert len(single) == 6 * 2 * 2 + 2, "six quantities of two sublayers of two layers"
    assert divided.keys() == single.keys()
    for tag, curve in single.items():
        assert list(curve) == [4, 6]
        found = {step: divided[tag][step] for step in curve}
        assert found == pytest.approx(curve, rel=1e-6, abs=2e-7), tag
