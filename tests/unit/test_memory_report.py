"""From flags to the estimate: what the stages are, and which flags it refuses."""

import argparse
import dataclasses

import pytest

from megatron_mhc import activation_memory, environment
from megatron_mhc.activation_memory import Stage, passes_in_flight
from megatron_mhc.errors import UserError

MODEL = (
    "--num-layers 16 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --swiglu --seq-length 4096 --micro-batch-size 2"
)
STAGE = Stage(layers=16, tokens=8192, hidden=4096, ffn=14336, query=4096, key_value=1024, heads=32)


@pytest.fixture(scope="module")
def stages():
    environment.prepare()
    from megatron.training.arguments import add_megatron_arguments

    from megatron_mhc import memory_report
    from megatron_mhc.arguments import add_mhc_args

    parser = argparse.ArgumentParser(allow_abbrev=False)
    add_mhc_args(add_megatron_arguments(parser))
    return lambda words: memory_report.stages(parser.parse_args(words.split()))


def test_flags_make_the_stage(stages):
    assert stages(MODEL) == [STAGE]


def test_megatrons_defaults(stages):
    words = "--num-layers 2 --hidden-size 1024 --num-attention-heads 16 --seq-length 128"
    (stage,) = stages(f"{words} --micro-batch-size 1 --swiglu")
    assert (stage.ffn, stage.query, stage.key_value) == (2688, 1024, 1024)
    assert stages(f"{words} --micro-batch-size 1")[0].ffn == 4096


def test_context_parallel_ranks_share_the_tokens(stages):
    (divided,) = stages(f"{MODEL} --context-parallel-size 4")
    assert divided == dataclasses.replace(STAGE, tokens=2048)


def test_a_pipeline_has_a_stage_for_every_rank(stages):
    pipeline = f"{MODEL} --pipeline-model-parallel-size 4"
    assert [stage.in_flight for stage in stages(pipeline)] == [4, 3, 2, 1]
    virtual = stages(f"{pipeline} --num-layers-per-virtual-pipeline-stage 2")
    assert [(stage.layers, stage.in_flight) for stage in virtual] == [
        (2, 11),
        (2, 9),
        (2, 7),
        (2, 5),
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--num-layers 4", "--hidden-size: is needed"),
        (f"{MODEL} --num-experts 8", "--num-experts 8: is not in the estimate; only dense"),
        (f"{MODEL} --transformer-impl local", "--transformer-impl local: is not in"),
        (
            f"{MODEL} --recompute-granularity full",
            "--recompute-granularity full: is not in the estimate; leave it out",
        ),
        (
            f"{MODEL} --pipeline-model-parallel-size 3",
            "--num-layers 16: does not divide into 3 pipeline ranks of 1 stages; use a multiple",
        ),
    ],
)
def test_what_is_not_counted_is_refused(stages, words, message):
    with pytest.raises(UserError, match=message):
        stages(words)


def test_passes_in_flight_end_with_the_micro_batches():
    assert passes_in_flight(0, 8, 1, micro_batches=3) == 3
    assert passes_in_flight(0, 4, 2, micro_batches=2) == 4
    assert passes_in_flight(3, 4, 1, micro_batches=64) == 1


def test_one_layer_by_hand():
    """bf16 bytes of a token: u, y, q, k, v, the output, lse; u, y, both projections, product."""
    unit = 2 * 4096
    layer = 4 * unit + 2 * (2 * 4096 + 2 * 1024) + 4 * 32 + 2 * 3 * 14336
    estimate = activation_memory.plain(STAGE)
    assert estimate.kept == 8192 * (16 * layer + unit)


def test_recompute_is_between_plain_and_mhc():
    plain = activation_memory.plain(STAGE).peak
    mhc = activation_memory.mhc(STAGE, 4).peak
    for block in (1, 2, 4):
        assert plain < activation_memory.recomputed(STAGE, 4, block).peak < mhc
    best = activation_memory.best_block(STAGE, 4)
    peaks = [activation_memory.recomputed(STAGE, 4, block).peak for block in range(1, 17)]
    assert peaks[best - 1] == min(peaks)


def test_sequence_parallelism_splits_the_streams():
    def added(**fields):
        stage = Stage(**{**STAGE.__dict__, **fields})
        return activation_memory.mhc(stage, 4).peak - activation_memory.plain(stage).peak

    assert added(tensor_parallel=4) == pytest.approx(added())
    assert added(tensor_parallel=4, sequence_parallel=True) == pytest.approx(added() / 4)
