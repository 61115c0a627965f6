"""Every division into stages, and of sequences, gives the losses and gradients of one process."""

import json
from pathlib import Path

import pytest
import torch
from pipeline_cases import PIPELINES, RANDOM_PIPELINES, STARTS, Pipeline
from test_parallel_layouts import relative_error, whole_tensors
from workers import load_ranks, run_worker

TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder of the worker's results, all layouts run once."""
    folder = tmp_path_factory.mktemp("pipelines")
    run_worker("pipeline_worker.py", folder, seconds=400)
    assert (folder / "done").is_file(), (folder / "log").read_text()[-3000:]
    return folder


def assert_equals_single_process(results: Path, pipeline: Pipeline) -> None:
    (single,) = load_ranks(results, pipeline.single.name, 1)
    assert len(single["losses"]) == pipeline.micro_batches
    ranks = load_ranks(results, pipeline.name, pipeline.world)
    for kind in ("losses", "evaluated"):
        last_stage = ranks[-pipeline.stage_ranks :]
        assert not any(rank[kind] for rank in ranks[: -len(last_stage)]), "no other stage has any"
        for rank in last_stage:
            assert rank[kind].keys() == single[kind].keys()
            for index, loss in rank[kind].items():
                reference = single[kind][index].item()
                assert loss.item() == pytest.approx(reference, rel=TOLERANCE), (kind, index)

    gradients = whole_gradients(ranks, pipeline.tp)
    one_stage = load_ranks(results, pipeline.one_stage.name, pipeline.stage_ranks)
    assert_close(gradients, whole_gradients(one_stage, pipeline.tp))
    assert_close(scales_as_one(gradients), scales_as_one(whole_gradients([single], 1)))


def whole_gradients(ranks: list[dict], tp: int) -> dict[str, list[torch.Tensor]]:
    """Every parameter's gradients over all stages: shards joined, replicas in a list."""
    gradients: dict[str, list[torch.Tensor]] = {}
    for first in range(0, len(ranks), tp):
        for name, values in whole_tensors(ranks[first : first + tp]).items():
            gradients.setdefault(name, []).extend(values)
    return gradients


def scales_as_one(gradients: dict[str, list[torch.Tensor]]) -> dict[str, list[torch.Tensor]]:
    """The gradients of all scales joined into one vector.

    A scale's is one number per mapping, a sum over all tokens that may cancel to nearly nothing:
    what tensor parallelism rounds otherwise is then large beside it.
    """
    scales = [gradients[name] for name in sorted(gradients) if name.endswith(".scale")]
    others = {name: values for name, values in gradients.items() if not name.endswith(".scale")}
    return {**others, "scales": [torch.cat(replica) for replica in zip(*scales, strict=True)]}


def assert_close(gradients: dict, reference: dict) -> None:
    assert gradients.keys() == reference.keys()
    for name, values in gradients.items():
        for value in values:
            assert relative_error(value, reference[name][0]) < TOLERANCE, name


@pytest.mark.parametrize("pipeline", PIPELINES, ids=lambda pipeline: pipeline.name)
def test_losses_and_gradients_are_the_single_process_ones(results, pipeline):
    assert_equals_single_process(results, pipeline)


def test_ten_random_layouts_too(results):
    drawn = [Pipeline(**fields) for fields in json.loads((results / "drawn.json").read_text())]
    assert len(set(drawn)) == RANDOM_PIPELINES
    assert {pipeline.overlap for pipeline in drawn} == {"none", "post"}
    assert any(pipeline.vpp > 1 for pipeline in drawn)
    for pipeline in drawn:
        assert_equals_single_process(results, pipeline)


REPLAYED = [p for p in PIPELINES if p.replay and p.overlap == "post"]


@pytest.mark.parametrize("pipeline", REPLAYED, ids=lambda pipeline: pipeline.name)
def test_what_a_gradient_needs_is_replayed_before_it_is_there(results, pipeline):
    """Once for every gradient that is received, for its own backward pass, one at a time."""
    passes = pipeline.vpp * pipeline.micro_batches
    for index, rank in enumerate(load_ranks(results, pipeline.name, pipeline.world)):
        assert len(rank["replays"]) == passes
        received = [replay for replay in rank["replays"] if replay["received"]]
        last = index >= pipeline.world - pipeline.stage_ranks
        assert len(received) == passes - last * pipeline.micro_batches
        assert all(replay["right"] == [True] for replay in received)


def test_every_parameter_has_a_gradient(results):
    """Else the comparisons above compare nothing."""
    for pipeline in {pipeline.single for pipeline in PIPELINES}:
        (single,) = load_ranks(results, pipeline.name, 1)
        mhc = [name for name in single["values"] if "hyper_" in name]
        assert len(mhc) == 3 * (2 * pipeline.layers + 1)
        for name, gradient in single["values"].items():
            assert gradient.norm() > 1e-6, name


def test_stages_that_agree_start(results):
    ranks = load_ranks(results, "equal", 3)
    assert [rank["kind"] for rank in ranks] == ["none"] * 3


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "other-streams",
            "rank 0 has streams 4, width 128, rank 1 after it has streams 2, width 64",
        ),
        (
            "other-width",
            "rank 1 has hidden_size 32, width 128, rank 2 after it has hidden_size 64, width 256",
        ),
    ],
)
def test_a_neighbour_of_other_width_is_named_on_every_rank(results, name, message):
    for rank in load_ranks(results, name, 3):
        assert rank["kind"] == "StageMismatch"
        assert message in rank["message"]
        assert "start all ranks with the same flags" in rank["message"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("batched", "batch_p2p_comm=True: sends without waiting need single operations; set it to"),
        ("crossing", "batch_p2p_comm=True with 2 stages of several chunks: megatron-core 0.19.2"),
        ("variable", "variable_seq_lengths=True: mHC boundaries need a fixed length"),
        ("transport", "transport='pigeon': expected one of auto, copy, nccl"),
        ("ring", "use_ring_exchange_p2p=True: not supported with mHC; set it to False"),
    ],
)
def test_settings_that_would_wait_or_cross_are_refused(results, name, message):
    for rank in load_ranks(results, name, STARTS[name].stages):
        assert rank["kind"] == "ValueError"
        assert rank["message"].startswith(message)
