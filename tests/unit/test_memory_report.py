"""From flags to the estimate: what the stages are, and which flags it refuses."""

import copy
import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_mhc import activation_memory, environment
from megatron_mhc.activation_memory import Stage, passes_in_flight
from megatron_mhc.errors import UserError
from megatron_mhc.known_flags import GROUPS_WITHOUT_EFFECT, KNOWN, unknown_flags

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "estimate_memory.py"

MODEL = (
    "--num-layers 16 --hidden-size 4096 --ffn-hidden-size 14336 --num-attention-heads 32 "
    "--group-query-attention --num-query-groups 8 --swiglu --seq-length 4096 --micro-batch-size 2 "
    "--hidden-dropout 0 --bf16"
)
PIPELINE = f"{MODEL} --pipeline-model-parallel-size 2"
STAGE = Stage(layers=16, tokens=8192, hidden=4096, ffn=14336, query=4096, key_value=1024, heads=32)


@pytest.fixture(scope="module")
def parser():
    environment.prepare()
    from megatron_mhc.memory_report import make_parser

    return make_parser("")


@pytest.fixture(scope="module")
def stages(parser):
    from megatron_mhc import memory_report

    return lambda words: memory_report.stages(parser.parse_args(words.split()))


def test_flags_make_the_stage(stages):
    assert stages(MODEL) == [STAGE]


def test_megatrons_defaults(stages):
    words = "--num-layers 2 --hidden-size 1024 --num-attention-heads 16 --seq-length 128 --bf16"
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
        ("--num-layers 4 --bf16", "--hidden-size: is needed"),
        ("--num-layers 4", "--bf16: only activations of 16 bits are counted; give it, or --fp16"),
        (f"{MODEL} --num-experts 8", "--num-experts 8: is not in the estimate; only dense"),
        (f"{MODEL} --transformer-impl local", "--transformer-impl local: is not in"),
        (
            f"{MODEL} --recompute-granularity full",
            "--recompute-granularity full: is not in the estimate; leave it out",
        ),
        (
            f"{MODEL} --pipeline-model-parallel-size 3",
            "--pipeline-model-parallel-size 3: --num-layers 16 is no multiple of it",
        ),
        (
            f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 3",
            "--num-layers-per-virtual-pipeline-stage 3: does not divide the 8 layers of a pipeline "
            "rank; use one of 1, 2, 4, 8",
        ),
        (
            f"{PIPELINE} --num-layers-per-virtual-pipeline-stage 2 "
            "--num-virtual-stages-per-pipeline-rank 4",
            "--num-virtual-stages-per-pipeline-rank: give one of them",
        ),
        (
            f"{MODEL} --num-virtual-stages-per-pipeline-rank 2",
            "--num-virtual-stages-per-pipeline-rank 2: needs --pipeline-model-parallel-size 2",
        ),
        (
            f"{PIPELINE} --num-virtual-stages-per-pipeline-rank 2 "
            "--microbatch-group-size-per-virtual-pipeline-stage 1",
            "-stage 1: has to be from 2, the number of stages, to",
        ),
        (
            f"{PIPELINE} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 2",
            "-stage 2: has to be from 2, the number of stages, to 1, the micro-batches of --glob",
        ),
        (
            f"{PIPELINE} --num-virtual-stages-per-pipeline-rank 2 --global-batch-size 6",
            "--global-batch-size 6: in groups of 2 the last one has 1",
        ),
        (
            f"{MODEL} --global-batch-size 8 --data-parallel-size 3",
            "--global-batch-size 8: expected a multiple of --micro-batch-size 2 times --data-p",
        ),
        (
            f"{MODEL} --tensor-model-parallel-size 16",
            "--tensor-model-parallel-size 16: --num-query-groups 8 is no multiple of 16",
        ),
        (f"{MODEL} --num-attention-heads 0", "--num-attention-heads 0: expected 1 or more"),
        (f"{MODEL} --hidden-dropout 2", "--hidden-dropout 2.0: expected 0 or more, less than 1"),
        (f"{MODEL} --yaml-cfg run.yaml", "--yaml-cfg run.yaml: is not in the estimate; no file"),
        (f"{MODEL} --recompute-activations", "--recompute-activations: is not in the estimate"),
        (f"{MODEL} --attention-backend unfused", "--attention-backend unfused: is not in"),
        (f"{MODEL} --decoder-first-pipeline-num-layers 4", "only pipelines of equal stages"),
        (f"{MODEL} --mtp-num-layers 1", "--mtp-num-layers 1: is not in"),
        (f"{MODEL} --fp32-residual-connection", "--fp32-residual-connection: is not in"),
        (f"{MODEL} --cpu-offloading-num-layers 4", "--cpu-offloading-num-layers 4: is not in"),
        (f"{MODEL} --micro-batch-size 0", "--micro-batch-size 0: expected 1 or more"),
        (f"{MODEL} --pipeline-model-parallel-size 0", "-size 0: expected 1 or more"),
        (
            f"{MODEL} --tensor-model-parallel-size 3",
            "--tensor-model-parallel-size 3: --num-attention-heads 32 is no multiple of 3",
        ),
        (
            f"{MODEL} --context-parallel-size 3",
            "--context-parallel-size 3: --seq-length 4096 is no multiple of 6",
        ),
    ],
)
def test_what_is_not_counted_is_refused(stages, words, message):
    with pytest.raises(UserError, match=message):
        stages(words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--mhc-num-residual-streams 1", "--mhc-num-residual-streams 1: is the plain residual"),
        ("--mhc-num-residual-streams 0", "--mhc-num-residual-streams 0: expected a whole number"),
        ("--mhc-recompute-layer-num -2", "--mhc-recompute-layer-num -2: expected a number"),
        ("--mhc-recompute-layer-num 0", "--mhc-recompute-layer-num 0: expected a number"),
        ("--mhc-eps 7", "--mhc-eps 7.0: expected"),
    ],
)
def test_settings_of_mhc_are_checked(parser, words, message):
    from megatron_mhc.memory_report import settings

    with pytest.raises(UserError, match=message):
        settings(parser.parse_args(words.split()))


def test_recompute_needs_no_flag_here(parser):
    from megatron_mhc.memory_report import settings

    mhc = settings(parser.parse_args(["--mhc-recompute-layer-num", "2"]))
    assert (mhc.num_streams, mhc.recompute_layer_num) == (4, 2)


def test_every_output_that_is_dropped_from_has_a_mask(stages):
    (dropped,) = stages(MODEL.replace("--hidden-dropout 0 ", ""))
    assert dropped == dataclasses.replace(STAGE, dropout=True)
    masks = 2 * 16 * 8192 * 4096
    for estimate in (
        activation_memory.plain,
        lambda stage: activation_memory.mhc(stage, 4),
        lambda stage: activation_memory.recomputed(stage, 4, 2),
    ):
        assert estimate(dropped).peak - estimate(STAGE).peak == masks


def test_replicas_share_the_global_batch(stages):
    words = f"{MODEL} --pipeline-model-parallel-size 4 --global-batch-size 16"
    assert [stage.in_flight for stage in stages(words)] == [4, 3, 2, 1]
    assert [stage.in_flight for stage in stages(f"{words} --data-parallel-size 4")] == [2, 2, 2, 1]


def test_flags_that_nobody_looked_at_are_named(parser):
    words = f"{MODEL} --qk-layernorm --cp-comm-type a2a --lr 1 --save here --train-iters 7"
    found = unknown_flags(parser, parser.parse_args(words.split()))
    assert sorted(found) == ["--cp-comm-type a2a", "--qk-layernorm"]


def test_a_new_flag_of_megatrons_is_named(parser):
    newer = copy.deepcopy(parser)
    newer.add_argument_group("transformer configuration").add_argument("--keep-twice", type=int)
    args = newer.parse_args(f"{MODEL} --keep-twice 2".split())
    assert unknown_flags(newer, args) == ["--keep-twice 2"]


def test_the_known_flags_are_the_parsers(parser):
    typed = {option for action in parser._actions for option in action.option_strings}
    assert typed >= KNOWN
    assert {group.title for group in parser._action_groups} >= GROUPS_WITHOUT_EFFECT


def test_the_launch_scripts_flags_are_known(tmp_path):
    names = {"TORCHRUN": "echo", "DATA": "d", "OUT": str(tmp_path), "FP8": "tensorwise"}
    launched = subprocess.run(
        ["bash", ROOT / "examples" / "pretrain_node.sh"],
        env={**os.environ, **names},
        capture_output=True,
        text=True,
        check=True,
    )
    flags = launched.stdout.split("pretrain_gpt.py")[1].split()
    done = subprocess.run(
        [sys.executable, TOOL, *flags], capture_output=True, text=True, check=True
    )
    assert "mHC + recompute (N)" in done.stdout
    assert "Not in the estimate" not in done.stdout


def test_larger_groups_of_micro_batches_are_longer_in_flight(stages):
    words = f"{MODEL} --pipeline-model-parallel-size 2 --num-layers-per-virtual-pipeline-stage 4"
    assert [stage.in_flight for stage in stages(words)] == [5, 3]
    group = "--microbatch-group-size-per-virtual-pipeline-stage 8"
    assert [stage.in_flight for stage in stages(f"{words} {group}")] == [11, 9]


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
