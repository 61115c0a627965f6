"""One rank of test_context_parallel.py: trains a small model on whole and on divided sequences.

    RANK=0 WORLD_SIZE=2 ... python context_parallel_job.py OUTPUT_FILE

Every run is written to the output file as it ends, so that a job cut short keeps what it has.
"""

import gc
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed")]

from megatron_mhc import environment  # noqa: E402

environment.prepare()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from layout_model import forward_step  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.distributed.finalize_model_grads import finalize_model_grads  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from megatron.core.utils import get_batch_on_this_cp_rank  # noqa: E402
from two_gpus import add_run  # noqa: E402

from megatron_mhc import MHCConfig  # noqa: E402
from tests.models import build_gpt, scramble_mappings  # noqa: E402

VOCABULARY, LENGTH, SEQUENCES, STEPS = 128, 512, 8, 20


@dataclass(frozen=True)
class Run:
    """One way to train the model, on the same tokens.

    Attributes:
        cp: ranks that share a sequence; with 1 both ranks do the same.
        micro_batch: sequences of a micro-batch.
        recompute: MHCConfig's.
    """

    cp: int = 1
    micro_batch: int = 2
    recompute: bool = False


RUNS = {
    "single": Run(),
    "single in halves": Run(micro_batch=1),
    "divided": Run(cp=2),
    "divided recomputed": Run(cp=2, recompute=True),
}


def build_model(run: Run) -> DistributedDataParallel:
    """Transformer Engine layers in bf16, mHC far from its initial values."""
    model = build_gpt(
        MHCConfig(recompute=run.recompute),
        transformer_engine=True,
        bf16=True,
        params_dtype=torch.bfloat16,
        num_layers=4,
        hidden_size=256,
        ffn_hidden_size=512,
        context_parallel_size=run.cp,
        cp_comm_type="p2p",
        finalize_model_grads_func=finalize_model_grads,
    ).cuda()
    scramble_mappings(model)
    inner = Float16Module(model.config, model)
    ddp_config = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    return DistributedDataParallel(model.config, ddp_config, inner)


def batches(step: int, run: Run) -> list[dict]:
    """This rank's part of a step's micro-batches."""
    generator = torch.Generator().manual_seed(step)
    shape = (SEQUENCES, LENGTH + 1)
    # Every token is one of three, given the one before it: there is something to learn.
    tokens = torch.randint(1, 4, shape, generator=generator).cumsum(-1) % VOCABULARY
    group = parallel_state.get_context_parallel_group()
    parts = []
    for index, sequences in enumerate(tokens.cuda().split(run.micro_batch)):
        whole = {
            "tokens": sequences[:, :-1].contiguous(),
            "labels": sequences[:, 1:].contiguous(),
            "mask": torch.ones(run.micro_batch, LENGTH, device="cuda"),
            "positions": torch.arange(LENGTH, device="cuda").repeat(run.micro_batch, 1),
        }
        part = get_batch_on_this_cp_rank(whole, is_hybrid_cp=False, cp_group=group)
        parts.append({"index": index, **part})
    return parts


def train(run: Run) -> list[list[float]]:
    """The loss of every micro-batch of every step, over whole sequences."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(context_parallel_size=run.cp)
    model = build_model(run)
    optimizer = get_megatron_optimizer(
        OptimizerConfig(lr=1e-3, clip_grad=1.0, bf16=True, params_dtype=torch.bfloat16), [model]
    )
    losses = []
    for step in range(STEPS):
        model.zero_grad_buffer()
        optimizer.zero_grad()
        parts = batches(step, run)
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iter(parts),
            model=[model],
            num_microbatches=len(parts),
            seq_length=LENGTH,
            micro_batch_size=run.micro_batch,
        )
        optimizer.step()
        losses.append([loss for report in reports for loss in report.values()])
    return [[loss.item() for loss in step] for step in losses]


def main(output: Path) -> None:
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl")
    for name, run in RUNS.items():
        begin = time.perf_counter()
        losses = train(run)
        gc.collect()
        print(f"{name}: {STEPS} steps in {time.perf_counter() - begin:.1f} s", flush=True)
        if dist.get_rank() == 0:
            add_run(output, name, losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
