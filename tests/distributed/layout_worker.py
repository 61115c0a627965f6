"""Runs every (layout, case) of layout_cases.RUNS with gloo; a file of results per rank.

    python layout_worker.py OUTPUT_FOLDER

Megatron is imported once; the processes of a layout are forked from there.
"""

import datetime
import functools
import multiprocessing
import os
import sys
import traceback
from pathlib import Path

import torch

from megatron_mhc import environment

environment.prepare()
# Megatron can be imported only now.
from layout_cases import CASES, LAYOUTS, RUNS, Case, Layout  # noqa: E402
from layout_model import (  # noqa: E402
    MICRO_BATCH,
    MICRO_BATCHES,
    SEQUENCE,
    build_model,
    forward_step,
    is_sharded,
    micro_batches,
    name_of_expert,
)
from megatron.core import parallel_state  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402

from megatron_mhc import patches  # noqa: E402

STEPS = 2


def forward_backward(model, layout: Layout, dp_rank: int) -> dict[int, torch.Tensor]:
    """One global batch through Megatron's schedule; losses of this rank's micro-batches."""
    model.zero_grad_buffer()
    reports = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=micro_batches(layout.dp, dp_rank),
        model=[model],
        num_microbatches=MICRO_BATCHES // layout.dp,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
    )
    return functools.reduce(dict.__or__, reports)


def sharding(parameter) -> tuple[int, int] | None:
    """(partition_dim, partition_stride) of a tensor-parallel parameter, None of a replica."""
    if not is_sharded(parameter):
        return None
    return parameter.partition_dim, parameter.partition_stride


def run_case(case: Case, layout: Layout) -> dict:
    """What one rank saw: losses per micro-batch, gradients or stepped parameters, dtypes."""
    model_parallel_cuda_manual_seed(1)
    dp_rank = parallel_state.get_data_parallel_rank()
    model = build_model(case, layout, parallel_state.get_tensor_model_parallel_rank())
    named = {
        name_of_expert(name.removeprefix("module.")): p
        for name, p in model.module.named_parameters()
    }
    result = {
        "dtypes": {name: p.dtype for name, p in named.items()},
        "sharding": {name: sharding(p) for name, p in named.items()},
    }
    if not case.optimizer:
        losses = forward_backward(model, layout, dp_rank)
        gradients = {name: p.main_grad.clone() for name, p in named.items()}
        return {**result, "losses": losses, "values": gradients}

    # Some of fn's gradients are zero but for rounding (equal streams enter the first layer), and
    # Adam's usual eps would make whole steps of that.
    config = OptimizerConfig(
        lr=0.02,
        adam_eps=1e-3,
        weight_decay=0.1,
        clip_grad=1.0,
        bf16=case.bf16,
        params_dtype=torch.bfloat16 if case.bf16 else torch.float32,
        use_distributed_optimizer=case.optimizer == "distributed",
    )
    optimizer = get_megatron_optimizer(config, [model])
    for _ in range(STEPS):
        optimizer.zero_grad()
        losses = forward_backward(model, layout, dp_rank)
        succeeded, _, _ = optimizer.step()
        assert succeeded
    parameters = {name: p.detach().clone() for name, p in named.items()}
    return {**result, "losses": losses, "values": parameters}


def run_rank(folder: Path, name: str, rank: int) -> None:
    """One process of a layout: all of the layout's cases, results in files."""
    layout = LAYOUTS[name]
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(layout.world), LOCAL_RANK=str(rank))
    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder / name}.rendezvous",
        rank=rank,
        world_size=layout.world,
        timeout=datetime.timedelta(seconds=60),
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=layout.tp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=1,
    )
    for case in RUNS[name]:
        try:
            result = run_case(CASES[case], layout)
        except Exception:
            result = {"error": traceback.format_exc()}
        torch.save(result, folder / f"{name}.{case}.{rank}.pt")
    torch.distributed.destroy_process_group()


def main(folder: Path) -> None:
    patches.apply(flags=["--overlap-moe-expert-parallel-comm"])
    fork = multiprocessing.get_context("fork")
    for name, layout in LAYOUTS.items():
        processes = [
            fork.Process(target=run_rank, args=(folder, name, rank)) for rank in range(layout.world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
