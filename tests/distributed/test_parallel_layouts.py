"""Every parallel layout gives the losses and gradients of a single process (CPU, gloo)."""

import functools
from pathlib import Path

import pytest
import torch
from layout_cases import CASES, LAYOUTS, RUNS
from workers import load_ranks, run_worker

TOLERANCE = 1e-5
MHC_PARAMETERS = ("hyper_connection.", "hyper_head.")
# 3 layers with two connections each, and the head; each has fn, scale and base.
MHC_COUNT = 3 * (3 * 2 + 1)

COMPARED = [
    (layout, case)
    for layout, cases in RUNS.items()
    for case in cases
    if layout != "single" and not CASES[case].optimizer
]
REFERENCE = {
    "sequence_parallel": "sinkhorn",
    "classic_sequence_parallel": "classic",
    "recompute": "sinkhorn",
    "experts_recompute": "experts",
    "experts_combined": "experts",
    "experts_sequence_parallel": "experts",
}
"""Cases that no single process runs, to the case whose numbers they must give."""


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Path:
    """The folder of the worker's results, all layouts run once."""
    folder = tmp_path_factory.mktemp("layouts")
    run_worker("layout_worker.py", folder, seconds=280)
    return folder


def load(results: Path, layout: str, case: str) -> list[dict]:
    """The results of every rank of one run, in rank order."""
    return load_ranks(results, f"{layout}.{case}", LAYOUTS[layout].world)


def whole_tensors(tp_ranks: list[dict]) -> dict[str, list[torch.Tensor]]:
    """Every parameter's values over one tensor-parallel group: shards joined, replicas all kept."""
    whole = {}
    shardings = functools.reduce(dict.__or__, (rank["sharding"] for rank in tp_ranks))
    for name, sharding in shardings.items():
        # An expert is on one rank.
        values = [rank["values"][name] for rank in tp_ranks if name in rank["values"]]
        if sharding is not None:
            dim, stride = sharding
            parts = [value.chunk(stride, dim) for value in values]
            values = [torch.cat([part[i] for i in range(stride) for part in parts], dim)]
        whole[name] = values
    return whole


def relative_error(value: torch.Tensor, reference: torch.Tensor) -> float:
    value, reference = value.double(), reference.double()
    return ((value - reference).norm() / reference.norm()).item()


@pytest.mark.parametrize(("layout", "case"), COMPARED)
def test_losses_are_the_single_process_ones(results, layout, case):
    (single,) = load(results, "single", REFERENCE.get(case, case))
    seen = set()
    for rank in load(results, layout, case):
        for index, loss in rank["losses"].items():
            reference = single["losses"][index].item()
            assert loss.item() == pytest.approx(reference, rel=TOLERANCE)
            seen.add(index)
    assert seen == set(single["losses"])


@pytest.mark.parametrize(("layout", "case"), COMPARED)
def test_gradients_are_the_single_process_ones(results, layout, case):
    """On every rank, replicas too: a gradient that one rank failed to reduce shows."""
    (single,) = load(results, "single", REFERENCE.get(case, case))
    ranks = load(results, layout, case)
    tp = LAYOUTS[layout].tp
    seen = set()
    for first in range(0, len(ranks), tp):
        gradients = whole_tensors(ranks[first : first + tp])
        seen |= gradients.keys()
        for name, values in gradients.items():
            for value in values:
                error = relative_error(value, single["values"][name])
                assert error < TOLERANCE, f"{name}, tensor-parallel group of rank {first}"
    assert seen == single["values"].keys()


@pytest.mark.parametrize("case", RUNS["single"])
def test_every_parameter_has_a_gradient(results, case):
    """Else the comparisons above compare nothing."""
    (single,) = load(results, "single", case)
    mhc = [name for name in single["values"] if any(part in name for part in MHC_PARAMETERS)]
    assert len(mhc) == MHC_COUNT
    for name, gradient in single["values"].items():
        assert gradient.norm() > 1e-6, name


def test_tensor_parallel_ranks_hold_parts_and_mhc_parameters_whole(results):
    for rank in load(results, "tp2", "sinkhorn"):
        sharding = rank["sharding"]
        assert sharding["decoder.layers.0.mlp.linear_fc1.weight"] == (0, 2)
        assert sum(part is not None for part in sharding.values()) == 3 * 4 + 2
        for name, part in sharding.items():
            if any(mark in name for mark in MHC_PARAMETERS):
                assert part is None, name


def test_bf16_model_keeps_mhc_parameters_in_float32(results):
    for layout in ("single", "dp2"):
        for rank in load(results, layout, "bf16"):
            for name, dtype in rank["dtypes"].items():
                mhc = any(part in name for part in MHC_PARAMETERS)
                assert dtype == (torch.float32 if mhc else torch.bfloat16), name


def test_recompute_gives_the_bits_of_the_same_layout_without_it(results):
    pairs = zip(load(results, "tp2", "recompute"), load(results, "tp2", "sequence_parallel"))
    for recomputed, kept in pairs:
        assert recomputed["losses"] == kept["losses"]
        for name, value in kept["values"].items():
            assert torch.equal(recomputed["values"][name], value), name


# A last bit of the gradients' norm rounds some bf16 weights the other way; their spacing is 0.004.
@pytest.mark.parametrize(("precision", "tolerance"), [("", 1e-6), ("bf16_", 4e-3)])
def test_distributed_optimizer_steps_as_the_plain_one(results, precision, tolerance):
    plain = load(results, "dp2", f"{precision}adam")
    distributed = load(results, "dp2", f"{precision}distributed_adam")
    (before,) = load(results, "single", "bf16" if precision else "sinkhorn")
    for one, other in zip(plain, distributed, strict=True):
        assert one["dtypes"] == other["dtypes"] == before["dtypes"]
        for index, loss in other["losses"].items():
            assert loss < before["losses"][index] - 0.1, "it did not learn"
        for name, value in one["values"].items():
            error = relative_error(other["values"][name], value)
            assert error < tolerance, name
