"""Two GPUs: stages train as one GPU does, and no delay of a stream changes a bit of a loss.

With the variable OUT, a run that is cut off leaves pipeline_job.jsonl and its logs in that folder.
"""

import math
from pathlib import Path

import pytest
import torch
from two_gpus import Job, means, run_job

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

JOB = Path(__file__).resolve().with_name("pipeline_job.py")
LIMIT = 330
"""Seconds for the whole job."""
WRONG = {
    "unordered merge": "chunks",
    "unordered gradient": "chunks",
    "forgotten send": "chunks",
    "unordered parts": "experts combined",
}
"""Deliberate errors, and the run without each."""


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> Job:
    """The job's runs."""
    return run_job(JOB, "1", folder=tmp_path_factory.mktemp("pipeline"), limit=LIMIT)


@pytest.mark.parametrize("division", ["stages", "chunks"])
def test_stages_train_as_one_gpu_does(losses, division):
    """Within what rounding to bf16 at other places changes on one GPU.

    Full recomputation forms and rounds the streams at every layer, a pipeline at every stage's end.
    """
    single, recomputed, staged = (
        means(losses[name]) for name in ("single", "single recomputed", division)
    )
    assert len(single) == 100
    assert single[-1] < single[0] - 0.5, "it did not learn"
    noise = max(abs(one - other) for one, other in zip(single, recomputed, strict=True))
    assert noise < 0.02 * single[-1]
    for step, (one, other) in enumerate(zip(single, staged)):
        assert abs(one - other) <= max(3 * noise, 0.002 * one), step


@pytest.mark.parametrize("division", ["stages", "chunks"])
def test_delays_and_poisoned_memory_change_no_bit(losses, division):
    calm, disturbed = losses[division], losses[f"{division} disturbed"]
    assert len(calm) == len(disturbed) == 200
    assert disturbed == calm


def test_replays_ahead_change_no_bit(losses):
    """Under delays too: they run on the priority stream, while gradients are on their way."""
    assert losses["chunks replayed"] == losses["chunks"][: len(losses["chunks replayed"])]


@pytest.mark.parametrize("other", ["chunks none", "chunks nccl disturbed"])
def test_other_ways_to_send_change_no_bit(losses, other):
    assert losses["chunks"][: len(losses[other])] == losses[other]


def test_combined_1f1b_trains_as_the_plain_schedule_does(losses):
    """Streams are rounded to bf16 between layers in either; gradients meet in another order."""
    plain, combined = means(losses["experts"]), means(losses["experts combined"])
    assert len(plain) == len(combined) == 100
    assert plain[-1] < plain[0] - 0.5, "it did not learn"
    for step, (one, other) in enumerate(zip(plain, combined, strict=True)):
        assert abs(one - other) <= 0.005 * one, step


def test_delays_and_poisoned_memory_change_no_bit_of_combined_1f1b(losses):
    assert losses["experts combined disturbed"] == losses["experts combined"]


@pytest.mark.parametrize("wrong", WRONG)
def test_the_disturbance_shows_what_is_wrong(losses, wrong):
    """Else the tests above prove nothing."""
    found, right = losses[wrong], losses[WRONG[wrong]][: len(losses[wrong])]
    assert found != right or any(math.isnan(loss) for step in found for loss in step)
