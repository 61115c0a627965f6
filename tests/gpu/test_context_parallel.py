"""Two GPUs: with Transformer Engine, divided sequences train as whole ones do.

With the variable OUT, a run that is cut off leaves context_parallel_job.jsonl and its logs there.
"""

from pathlib import Path

import pytest
import torch
from two_gpus import Job, means, run_job

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")

JOB = Path(__file__).resolve().with_name("context_parallel_job.py")
LIMIT = 180
"""Seconds for the whole job."""


@pytest.fixture(scope="module")
def losses(tmp_path_factory) -> Job:
    """The job's runs."""
    return run_job(JOB, folder=tmp_path_factory.mktemp("context-parallel"), limit=LIMIT)


@pytest.mark.parametrize("division", ["divided", "divided recomputed"])
def test_divided_sequences_train_as_whole_ones_do(losses, division):
    """Within what rounding to bf16 at other places changes on one GPU.

    The gradient of a weight is a sum of bf16 parts: of micro-batches, and of parts of sequences.
    """
    single, halves, divided = (
        means(losses[name]) for name in ("single", "single in halves", division)
    )
    assert len(single) == len(divided) == 20
    assert single[-1] < single[0] - 0.5, "it did not learn"
    noise = max(abs(one - other) for one, other in zip(single, halves, strict=True))
    assert noise < 0.02 * single[-1]
    for step, (one, other) in enumerate(zip(single, divided, strict=True)):
        assert abs(one - other) <= max(3 * noise, 0.002 * one), step
