"""The paper model, the trace's lanes and the tables of tools/benchmark_pipeline.py."""

import gzip
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_mhc.report.pipeline_estimate import Cluster
from megatron_mhc.report.pipeline_results import (
    COLUMNS,
    markdown,
    on_paper,
    overhead,
    pipeline_cost,
    rows,
)
from megatron_mhc.report.timeline import draw_timelines
from megatron_mhc.report.trace import busy_us, chrome_trace, read_kernels, window_us

ROOT = Path(__file__).resolve().parents[2]
TOOL = ROOT / "tools" / "benchmark_pipeline.py"
CLUSTER = Cluster(
    stages=2,
    chunks=2,
    micro_batches=8,
    channels=4096,
    streams=4,
    tokens=8192,
    link=50.0,
    forward_ms=18.0,
)


def event(name: str, stream: int, start: float, duration: float) -> dict:
    timing = {"ts": start, "dur": duration}
    return {"ph": "X", "cat": "kernel", "name": name, "tid": stream, **timing}


TRACE = {
    "traceEvents": [
        event("gemm", 7, 0, 100),
        event("attention", 7, 100, 50),
        event("merge_map_kernel", 7, 150, 10),
        event("gemm", 7, 200, 100),
        event("merge_map_kernel", 20, 160, 30),
        event("ncclDevKernel_SendRecv", 24, 190, 80),
        event("ncclDevKernel_SendRecv", 28, 30, 20),
        event("fill", 31, 0, 1),
        {"ph": "X", "cat": "cpu_op", "name": "aten::mm", "tid": 1, "ts": 0, "dur": 900},
    ]
}


def test_transfers_and_merges_are_bytes_over_bandwidth():
    assert CLUSTER.transfer_ms("none") == pytest.approx(8192 * 16384 * 2 / 50e6)
    assert CLUSTER.transfer_ms("plain") == pytest.approx(CLUSTER.transfer_ms("post") / 4)
    assert CLUSTER.merge_ms == pytest.approx(9 * 8192 * 4096 * 2 / 4e9)
    assert CLUSTER.compute_ms == 18 * 3 * 16
    assert CLUSTER.bubble_ms == 18 * 3


def test_post_is_seen_only_while_the_pipeline_fills_and_drains():
    transfer = CLUSTER.transfer_ms("post")
    assert CLUSTER.exposed_ms("post") == pytest.approx(6 * transfer)
    more = replace(CLUSTER, micro_batches=64)
    assert more.exposed_ms("post") == CLUSTER.exposed_ms("post")
    assert more.exposed_ms("none") > 6 * CLUSTER.exposed_ms("none")


def test_a_group_hides_the_way_back_to_a_stage():
    transfer = CLUSTER.transfer_ms("post")
    assert replace(CLUSTER, group=2).exposed_ms("post") == CLUSTER.exposed_ms("post")
    one_more = replace(CLUSTER, group=3, forward_ms=6.0)  # 2 transfers, or 6 ms and 12 ms of passes
    fill, drain = transfer + 2 * transfer - 6, transfer
    assert one_more.exposed_ms("post") == pytest.approx(fill + drain)
    assert replace(CLUSTER, group=4).exposed_ms("post") == pytest.approx(2 * transfer)


def test_a_link_slower_than_compute_is_seen_in_every_pass():
    slow = replace(CLUSTER, link=5.0)
    transfer = slow.transfer_ms("post")
    late = (transfer - 36) + (transfer - 18)
    assert slow.exposed_ms("post") == pytest.approx(6 * transfer + 16 * late)


def test_streams_are_told_apart_by_what_runs_on_them():
    kernels = read_kernels(TRACE, rank=1)
    lanes = {(k.name, k.lane) for k in kernels}
    assert ("gemm", "main") in lanes
    assert ("merge_map_kernel", "main") in lanes
    assert ("merge_map_kernel", "priority") in lanes
    assert {lane for name, lane in lanes if name.startswith("nccl")} == {"NCCL", "NCCL 2"}
    assert ("fill", "other") in lanes
    assert len(kernels) == 8, "what the CPU did is left out"
    assert {k.kind for k in kernels if k.lane == "priority"} == {"merge"}


def test_busy_time_counts_overlap_once():
    kernels = read_kernels(TRACE, rank=0)
    assert busy_us(k for k in kernels if k.kind != "transfer") == 160 + 30 + 100
    assert busy_us(kernels) == 300
    assert window_us(kernels) == 300


def test_the_chrome_trace_names_ranks_and_streams():
    events = chrome_trace(read_kernels(TRACE, 0) + read_kernels(TRACE, 1))["traceEvents"]
    names = {(e["pid"], e["args"]["name"]) for e in events if e["name"] == "thread_name"}
    assert {(0, "main"), (1, "priority"), (1, "NCCL 2")} <= names
    assert sum(e["ph"] == "X" for e in events) == 16
    assert min(e["ts"] for e in events if e["ph"] == "X") == 0
    json.dumps(events)


def test_the_timeline_is_drawn(tmp_path):
    kernels = read_kernels(TRACE, 0) + read_kernels(TRACE, 1)
    draw_timelines({"none 2": kernels, "post 2": kernels}, tmp_path / "steps.png")
    assert (tmp_path / "steps.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("benchmark_pipeline", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_workers_kernels_become_traces_and_a_picture(tool, tmp_path):
    kernels = read_kernels(TRACE, 0) + read_kernels(TRACE, 1)
    kept = [[k.name, k.rank, k.lane, k.start, k.duration] for k in kernels]
    for case in ("none", "nccl@4"):
        (tmp_path / f"trace-nvlink-{case}-2.json").write_text(json.dumps(kept))
    tool.finish_traces(tmp_path)
    left = {path.name for path in tmp_path.iterdir()}
    traces = {f"trace-nvlink-{case}-2.json.gz" for case in ("none", "nccl@4")}
    assert left == {*traces, "pipeline-nvlink.png"}
    with gzip.open(tmp_path / "trace-nvlink-nccl@4-2.json.gz", "rt") as file:
        assert len(json.load(file)["traceEvents"]) == len(chrome_trace(kernels)["traceEvents"])


GROUP = "--microbatch-group-size-per-virtual-pipeline-stage"
SETTINGS = {"micro_batches": 8, "hidden": 4096, "streams": 4, "length": 4096, "micro_batch": 2}
SETTINGS |= {"group": 0}


def result(mode: str, stages: int, step_ms: float, **more) -> dict:
    where = {"link": "nvlink", "link_gb_s": 50.0, "chunks": stages, "p2p_channels": None}
    return {**where, "mode": mode, "stages": stages, "step_ms": step_ms, "peak_gib": [2], **more}


RESULTS = [
    result("plain", 1, 1000.0),
    result("none", 1, 1040.0),
    result("plain", 2, 500.0),
    result("none", 2, 540.0),
    result(
        "post", 2, 523.0, compute_ms=[860.0, 864.0], bubble_ms=[50.0, 54.0], exposed_ms=[9.0, 4.0]
    ),
]


def test_pipeline_cost_is_what_one_gpu_does_not_pay():
    assert overhead(RESULTS[4], RESULTS) == pytest.approx(0.046)
    assert pipeline_cost(RESULTS[4], RESULTS) == pytest.approx(0.006)
    assert pipeline_cost(RESULTS[3], RESULTS) == pytest.approx(0.04)
    assert pipeline_cost(RESULTS[2], RESULTS) is None
    assert pipeline_cost(RESULTS[1], RESULTS) is None, "one GPU is no pipeline"
    assert on_paper(RESULTS[4], SETTINGS) == pytest.approx(CLUSTER.exposed_ms("post"))
    assert on_paper(RESULTS[3], SETTINGS) is None, "its compute was not measured"


def test_recomputation_is_compared_with_recomputation_on_one_gpu():
    recomputed = [
        *RESULTS,
        result("none+recompute", 1, 1100.0),
        result("post+recompute", 2, 560.0),
    ]
    assert pipeline_cost(recomputed[-1], recomputed) == pytest.approx(0.02)


def test_the_table_has_a_row_for_every_result():
    lines = markdown(RESULTS, SETTINGS).splitlines()
    assert len(lines) == 2 + len(RESULTS)
    assert all(line.count(" | ") == len(COLUMNS) - 1 for line in lines)
    assert rows(RESULTS, SETTINGS)[4][4:9] == ["-", "523.0", "+4.60 %", "+0.60 %", "864.0"]


def run_tool(*flags: object) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(TOOL), *map(str, flags)],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def call(tool, monkeypatch, capsys):
    """Runs the tool in this process, where it is refused; returns what it said."""

    def called(*flags: object) -> str:
        monkeypatch.setattr(sys, "argv", [str(TOOL), *map(str, flags)])
        monkeypatch.setattr(tool.signal, "signal", lambda *_: None)
        with pytest.raises(SystemExit) as ended:
            tool.run_tool(tool.main)
        assert ended.value.code == 2
        return capsys.readouterr().err

    return called


def test_the_estimate_needs_no_gpu():
    done = run_tool("--estimate", "--chunks", 2, "--link", 50, "--forward-ms", 18)
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if "post" in line]
    assert f"{CLUSTER.exposed_ms('post'):.2f}" in line


def test_a_folder_is_asked_for():
    done = run_tool()
    assert done.returncode == 2
    assert "error: --out: a folder for the results is needed, or --estimate" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((GROUP, 1), f"{GROUP} 1: has to be from 2, the number of stages, to 8"),
        ((GROUP, 9), f"{GROUP} 9: has to be from 2, the number of stages, to 8"),
        ((GROUP, -2), f"{GROUP} -2: has to be from 2"),
        ((GROUP, 4, "--chunks", 1), f"{GROUP} 4: only chunks have groups"),
        (("--micro-batches", 7), "--micro-batches 7: in groups of 2 the last one has 1"),
    ],
)
def test_groups_that_megatron_does_not_take_are_refused(tmp_path, flags, message):
    done = run_tool("--out", tmp_path / "out", *flags)
    assert done.returncode == 2
    assert f"error: {message}" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--stages", 4, GROUP, 3), f"{GROUP} 3: has to be from 4"),
        (("--stages", 1), "argument --stages: 1: expected a whole number, 2 or more"),
        (("--link", 0), "argument --link: 0: expected a number above 0"),
        (("--link", -5), "argument --link: -5: expected a number above 0"),
        (("--forward-ms", "nan"), "argument --forward-ms: nan: expected a number above 0"),
        (("--chunks", 0), "argument --chunks: 0: expected a whole number, 1 or more"),
        (("--hidden", 0), "argument --hidden: 0: expected a whole number, 1 or more"),
        (("--chunks", 1, 2), "--chunks 1 2: --estimate is of one pipeline; give one number"),
        (("--out", "there"), "--out there: has no effect with --estimate; leave one of them out"),
        (("--trace",), "--trace: has no effect with --estimate; leave one of them out"),
    ],
)
def test_an_estimate_of_what_cannot_be_is_refused(call, flags, message):
    assert f"error: {message}" in call("--estimate", *flags)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--steps", 0), "argument --steps: 0: expected a whole number, 1 or more"),
        (("--stages", 4), "--stages 4: has no effect without --estimate; add it, or leave this"),
        (("--chunks", 3), "--chunks 3: --layers 8 is no multiple of 6, of 2 stages with 3 chunks"),
    ],
)
def test_a_measurement_that_cannot_start_leaves_no_folder(call, tmp_path, flags, message):
    assert f"error: {message}" in call("--out", tmp_path / "out", *flags)
    assert not (tmp_path / "out").exists()


def test_a_run_that_cannot_start_leaves_earlier_results(tool, call, tmp_path, monkeypatch):
    worker = tmp_path / "worker.py"
    worker.write_text("raise SystemExit('no NCCL here')")
    monkeypatch.setattr(tool, "WORKER", worker)
    for name in ("pipeline.jsonl", "pipeline.md"):
        (tmp_path / name).write_text("earlier")
    assert "rank 0 on link nvlink failed:\nno NCCL here" in call("--out", tmp_path)
    for name in ("pipeline.jsonl", "pipeline.md"):
        assert (tmp_path / name).read_text() == "earlier"


@pytest.mark.parametrize("case", ["posts", "plain@2", "post@2", "nccl@", "nccl@few"])
def test_a_case_that_is_none_is_refused(case):
    done = run_tool("--cases", case)
    assert done.returncode == 2
    assert f"{case} is none of plain, none, post" in done.stderr


def test_the_benchmark_runs_end_to_end_on_tiny_models(tmp_path):
    """Its numbers mean nothing on a CPU; that every way to send gives one loss does."""
    sizes = [
        "--layers",
        "4",
        "--hidden",
        "32",
        "--ffn",
        "48",
        "--vocabulary",
        "64",
        "--length",
        "8",
        "--micro-batch",
        "1",
    ]
    few = ["--micro-batches", "4", "--steps", "1", "--chunks", "2", "--links", "nvlink"]
    cases = [
        "plain",
        "none",
        "post",
        "late",
        "shared",
        "sends",
        "plain-kept",
        "none-kept",
        "plain-free",
    ]
    cases += ["none+recompute", "post+recompute", "nccl@2"]
    few += ["--cases", *cases, "--nccl-p2p-channels", "4"]
    (tmp_path / "pipeline.jsonl").write_text("of an earlier run\n")
    done = run_tool("--out", tmp_path, *sizes, *few)
    assert done.returncode == 0, done.stdout + done.stderr
    results = [json.loads(line) for line in (tmp_path / "pipeline.jsonl").read_text().splitlines()]
    assert [(r["mode"], r["stages"]) for r in results] == [
        ("plain", 1),
        ("none", 1),
        ("none+recompute", 1),
        *((case, 2) for case in cases),
    ]
    assert {r["p2p_channels"] for r in results} == {4}
    assert (tmp_path / "pipeline.md").read_text().count("\n") == 2 + len(results)
    staged = [r for r in results if r["stages"] == 2]
    assert len({r["loss"] for r in staged if not r["mode"].startswith("plain")}) == 1
    assert len({r["loss"] for r in staged if r["mode"].startswith("plain")}) == 1
