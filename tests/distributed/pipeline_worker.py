"""Runs every layout of pipeline_cases and ten random ones with gloo; a file of results per rank.

    python pipeline_worker.py OUTPUT_FOLDER

Megatron is imported once; the processes of a layout are forked from there.
"""

import datetime
import functools
import json
import multiprocessing
import os
import sys
import traceback
from dataclasses import asdict
from pathlib import Path

import torch

from megatron_mhc import environment

environment.prepare()
# Megatron can be imported only now.
from host_engine import HostEngine  # noqa: E402
from hypothesis import HealthCheck, Phase, given, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from layout_model import forward_step, is_sharded  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func, schedules  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from pipeline_cases import PIPELINES, RANDOM_PIPELINES, STARTS, Pipeline, Start  # noqa: E402
from pipeline_model import (  # noqa: E402
    MICRO_BATCH,
    SEQUENCE,
    STREAMS,
    build_chunks,
    micro_batches,
    transformer_config,
    whole_name,
)

from megatron_mhc import patches  # noqa: E402
from megatron_mhc.pipeline import PipelineCommunicator, send_boundary  # noqa: E402
from megatron_mhc.pipeline.copy_tracks import CopyTracks  # noqa: E402
from megatron_mhc.pipeline.replays import Replays  # noqa: E402
from megatron_mhc.pipeline.schedule_model import Schedule  # noqa: E402
from megatron_mhc.recompute_ahead import InFlight  # noqa: E402


def losses_of(pipeline: Pipeline, chunks, communication: dict, **mode) -> dict[int, torch.Tensor]:
    """One global batch through Megatron's schedule; losses where the last stage is."""
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=[micro_batches(pipeline) for _ in chunks],
        model=chunks,
        num_microbatches=pipeline.micro_batches,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        **communication,
        **mode,
    )
    return functools.reduce(dict.__or__, reports, {})


def watch_replays() -> list[dict]:
    """Of every backward pass to come: whether its gradient was received, and of each forward pass
    that was replayed since the one before, whether it is that of this backward pass."""
    log, ahead, pass_of = [], [], {}
    begin, replay, backward = Replays.begin, InFlight.replay, schedules.backward_step

    def watched_begin(self, chunk, passed, output):
        pass_of[id(output)] = passed  # the schedule keeps the output until its backward pass
        begin(self, chunk, passed, output)

    def watched_replay(self):
        ahead.append(self)
        replay(self)

    def watched_backward(input_tensor, output, gradient, config):
        one_output, one_gradient = (
            value[0] if isinstance(value, list) else value for value in (output, gradient)
        )
        passed = pass_of.pop(id(one_output), None)  # None where the output is the loss
        log.append(
            {
                "received": one_gradient is not None,
                "right": [replayed is passed for replayed in ahead],
            }
        )
        ahead.clear()
        return backward(input_tensor, output, gradient, config)

    Replays.begin, InFlight.replay = watched_begin, watched_replay
    schedules.backward_step = watched_backward
    return log


def run_pipeline(pipeline: Pipeline) -> dict:
    """What one rank saw: losses of evaluation and training, gradients, and how they are divided."""
    model_parallel_cuda_manual_seed(1)
    boundary = send_boundary() if pipeline.overlap == "post" else None
    chunks = build_chunks(pipeline, boundary)
    communication = {}
    if pipeline.pp > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        tracks = None
        if pipeline.copies:
            schedule = Schedule(pipeline.vpp, pipeline.group, pipeline.combined)
            tracks = CopyTracks(group, HostEngine(), schedule, seconds=60)
        communication["p2p_communicator"] = PipelineCommunicator(
            group, chunks[0].module.config, STREAMS, boundary, tracks
        )
        communication["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups()
    with torch.no_grad():
        evaluated = losses_of(pipeline, chunks, communication, forward_only=True)
    for chunk in chunks:
        chunk.zero_grad_buffer()
    replays = watch_replays()
    losses = losses_of(pipeline, chunks, communication)
    if pipeline.pp > 1:
        communication["p2p_communicator"].drain()
    named = {
        whole_name(chunk.module, name, pipeline): parameter
        for chunk in chunks
        for name, parameter in chunk.module.named_parameters()
    }
    return {
        "evaluated": evaluated,
        "losses": losses,
        "replays": replays,
        "values": {name: p.main_grad.clone() for name, p in named.items()},
        "sharding": {
            name: (p.partition_dim, p.partition_stride) if is_sharded(p) else None
            for name, p in named.items()
        },
    }


def run_start(start: Start) -> dict:
    """Builds this rank's communicator; the message with which that was refused."""
    mine = {**start.everywhere, **start.of_rank.get(torch.distributed.get_rank(), {})}
    streams = mine.pop("num_streams", STREAMS)
    boundary = send_boundary() if mine.pop("overlap", "post") == "post" else None
    transport = mine.pop("transport", "auto")
    config = transformer_config(Pipeline(pp=start.stages))
    for name, value in mine.items():
        setattr(config, name, value)
    group = parallel_state.get_pipeline_model_parallel_group()
    try:
        PipelineCommunicator(group, config, streams, boundary, transport=transport)
    except ValueError as refusal:
        return {"kind": type(refusal).__name__, "message": str(refusal)}
    return {"kind": "none", "message": ""}


def run_rank(folder: Path, name: str, pipeline: Pipeline, rank: int, job) -> None:
    """One process of a layout; its result in a file."""
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(pipeline.world), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / name}.rendezvous",
        rank=rank,
        world_size=pipeline.world,
        timeout=datetime.timedelta(seconds=60),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=pipeline.tp,
        pipeline_model_parallel_size=pipeline.pp,
        virtual_pipeline_model_parallel_size=pipeline.vpp if pipeline.vpp > 1 else None,
        context_parallel_size=pipeline.cp,
        expert_model_parallel_size=pipeline.ep,
    )
    try:
        result = job()
    except Exception:
        result = {"error": traceback.format_exc()}
    torch.save(result, folder / f"{name}.{rank}.pt")
    torch.distributed.destroy_process_group()


def run(folder: Path, name: str, pipeline: Pipeline, job) -> None:
    """All processes of a layout, forked, until they end."""
    fork = multiprocessing.get_context("fork")
    processes = [
        fork.Process(target=run_rank, args=(folder, name, pipeline, rank, job))
        for rank in range(pipeline.world)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()


@st.composite
def random_pipelines(draw) -> Pipeline:
    """Layouts that Megatron accepts: see the conditions of its interleaved schedule."""
    pp, tp = draw(st.sampled_from([(2, 1), (2, 2), (3, 1), (4, 1)]))
    vpp = draw(st.sampled_from([1, 2, 3]))
    layers = next(n for n in (12, 9, 8) if n % (pp * vpp) == 0)
    group = draw(st.integers(pp, 6)) if vpp > 1 else 0
    counts = st.integers(max(1, group), 9)
    if vpp > 1:
        counts = counts.filter(lambda m: m % group == 0 or m % group >= pp)
    return Pipeline(
        pp=pp,
        vpp=vpp,
        tp=tp,
        group=group,
        layers=layers,
        micro_batches=draw(counts),
        overlap=draw(st.sampled_from(["post", "none"])),
        ahead=draw(st.booleans()),
        tied=draw(st.booleans()),
        sequence_parallel=tp > 1 and draw(st.booleans()),
        recompute=draw(st.booleans()),
    )


def draw_pipelines(seen: list[Pipeline]) -> None:
    @settings(
        max_examples=RANDOM_PIPELINES,
        derandomize=True,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(random_pipelines())
    def collect(pipeline):
        seen.append(pipeline)

    collect()


def main(folder: Path) -> None:
    patches.apply(flags=["--overlap-moe-expert-parallel-comm"])
    drawn: list[Pipeline] = []
    draw_pipelines(drawn)
    (folder / "drawn.json").write_text(json.dumps([asdict(pipeline) for pipeline in drawn]))
    pipelines = [*PIPELINES, *drawn]
    references = [reference for p in pipelines for reference in (p.single, p.one_stage)]
    for pipeline in dict.fromkeys([*references, *pipelines]):
        run(folder, pipeline.name, pipeline, functools.partial(run_pipeline, pipeline))
    for name, start in STARTS.items():
        run(folder, name, Pipeline(pp=start.stages), functools.partial(run_start, start))
    (folder / "done").touch()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
