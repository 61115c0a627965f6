"""One rank of tools/benchmark_pipeline.py: builds models in stages, times and profiles their steps.

    RANK=0 WORLD_SIZE=2 ... python tools/benchmark_pipeline_worker.py SETTINGS_JSON RESULTS_FOLDER

Imports, prints "loaded", waits for a line on its input, runs every case of the settings and writes
what rank 0 gathered after each. Without a GPU it runs tiny models with gloo, to test itself.
"""

import gc
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_mhc import environment  # noqa: E402

environment.prepare()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import (  # noqa: E402
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.pipeline_parallel.utils import (  # noqa: E402
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from megatron.core.transformer import TransformerConfig  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402

from megatron_mhc import MHCConfig, get_mhc_block_spec, patches  # noqa: E402
from megatron_mhc.pipeline import PipelineCommunicator, PriorityStream, send_boundary  # noqa: E402
from megatron_mhc.pipeline.boundary import flat_output  # noqa: E402
from megatron_mhc.report.trace import busy_us, read_kernels, window_us  # noqa: E402

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
WARM_UP = 2
"""Steps before the first that is timed: compilation, allocation, NCCL's connections."""


class MergedOnMain(PriorityStream):
    """Sends as overlap post does; the merge stays on the main stream. Tells the two apart."""

    def form(self, state, backend):
        return flat_output(state, backend)


def boundary_of(mode: str):
    """Where a mode's sends are issued from; None: Megatron's own way."""
    if mode == "sends":
        return MergedOnMain() if GPU else send_boundary()
    return send_boundary() if mode in ("post", "late", "plain-free") else None


def transformer_config(settings: dict, mode: str, stages: int, chunks: int) -> TransformerConfig:
    overlap_p2p = chunks > 1
    unwaited = boundary_of(mode) is not None
    return TransformerConfig(
        num_layers=settings["layers"],
        hidden_size=settings["hidden"],
        ffn_hidden_size=settings["ffn"],
        num_attention_heads=max(1, settings["hidden"] // 128),
        normalization="RMSNorm",
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=GPU,
        apply_rope_fusion=GPU,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=GPU,
        params_dtype=DTYPE,
        pipeline_dtype=DTYPE,
        use_cpu_initialization=not GPU,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        pipeline_model_parallel_size=stages,
        virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
        # As megatron.training sets them, and as overlap post does.
        deallocate_pipeline_outputs=True,
        overlap_p2p_comm=overlap_p2p,
        batch_p2p_comm=not overlap_p2p and not unwaited,
        overlap_p2p_comm_warmup_flush=overlap_p2p and unwaited and mode != "late",
    )


def build_chunks(settings, mode, config, mhc, boundary) -> list[DistributedDataParallel]:
    """This rank's part of the model; ``mhc`` None is the plain one."""
    group = parallel_state.get_pipeline_model_parallel_group()
    vpp = config.virtual_pipeline_model_parallel_size
    chunks = []
    for stage in range(vpp) if vpp else [None]:
        if GPU:
            spec = get_gpt_layer_with_transformer_engine_spec()
        else:
            spec = get_gpt_layer_local_spec(normalization=config.normalization)
        if mhc is not None:
            spec = get_mhc_block_spec(config, spec, mhc, stage, boundary=boundary)
        chunk = GPTModel(
            config,
            spec,
            settings["vocabulary"],
            settings["length"],
            pre_process=is_pp_first_stage(group) and is_vp_first_stage(stage, vpp),
            post_process=is_pp_last_stage(group) and is_vp_last_stage(stage, vpp),
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=stage,
        ).cuda()
        if GPU:
            chunk = Float16Module(config, chunk)
        wrapped = DistributedDataParallel(
            config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), chunk
        )
        wrapped.vp_stage = stage
        chunks.append(wrapped)
    return chunks


def forward_step(iterator, model):
    """Megatron's forward_step_func: the mean loss of a micro-batch."""
    tokens, positions, labels = next(iterator)
    losses = model(tokens, positions, None, labels=labels)
    return losses, lambda losses: (losses.float().mean(), {"loss": losses.detach().float().mean()})


class Case:
    """One model in one division, ready to step."""

    def __init__(self, settings: dict, mode: str, stages: int, chunks: int) -> None:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        torch.manual_seed(1)
        self.settings = settings
        self.config = transformer_config(settings, mode, stages, chunks)
        mhc = None if mode.startswith("plain") else MHCConfig(num_streams=settings["streams"])
        boundary = boundary_of(mode)
        self.chunks = build_chunks(settings, mode, self.config, mhc, boundary)
        self.slots = {}
        if stages > 1 and mode != "plain":
            group = parallel_state.get_pipeline_model_parallel_group()
            streams = mhc.num_streams if mhc else 1
            communicator = PipelineCommunicator(group, self.config, streams, boundary)
            groups = ProcessGroupCollection.use_mpu_process_groups()
            self.slots = {"p2p_communicator": communicator, "pg_collection": groups}
        shape = (settings["micro_batch"], settings["length"])
        tokens = torch.randint(settings["vocabulary"], shape, device="cuda")
        positions = torch.arange(shape[1], device="cuda").expand(shape).contiguous()
        self.batch = (tokens, positions, tokens.roll(-1, 1).contiguous())

    def step(self) -> list[dict]:
        """Forward and backward passes of a global batch, no optimizer."""
        for chunk in self.chunks:
            chunk.zero_grad_buffer()
        count = self.settings["micro_batches"]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter([self.batch] * count) for _ in self.chunks],
            model=self.chunks,
            num_microbatches=count,
            seq_length=self.settings["length"],
            micro_batch_size=self.settings["micro_batch"],
            **self.slots,
        )

    def close(self) -> None:
        """Give the memory back, every send over."""
        communicator = self.slots.get("p2p_communicator")
        if communicator is not None:
            communicator.drain()
        self.chunks.clear()
        gc.collect()
        torch.cuda.empty_cache()


def gathered(value) -> list:
    """``value`` of every rank."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def time_steps(case: Case) -> tuple[list[float], float | None]:
    """Milliseconds of each step, of the slowest rank, and the mean loss where it is known."""
    times, loss = [], None
    for index in range(WARM_UP + case.settings["steps"]):
        torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        reports = case.step()
        torch.cuda.synchronize()
        if index >= WARM_UP:
            times.append(1e3 * (time.perf_counter() - begin))
        if reports:
            loss = statistics.mean(report["loss"].item() for report in reports)
    return [max(ranks) for ranks in zip(*gathered(times), strict=True)], loss


def profile_step(case: Case) -> list:
    """The kernels of one step of this rank."""
    from torch.profiler import ProfilerActivity, profile

    dist.barrier()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        case.step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        return read_kernels(json.loads(path.read_text()), dist.get_rank())


def idle_times(case: Case, kernels: list, stages: int, chunks: int) -> dict:
    """Where a profiled step's time went, per rank, in ms.

    The bubble is what free transfers would leave; exposed is the rest of the idle time.
    """
    step = window_us(kernels) / 1e3
    passes = chunks * case.settings["micro_batches"]
    compute = [
        busy_us(k for k in kernels if k.rank == rank and k.kind != "transfer") / 1e3
        for rank in range(dist.get_world_size())
    ]
    bubble = [busy * (stages - 1) / passes for busy in compute]
    exposed = [step - busy - idle for busy, idle in zip(compute, bubble, strict=True)]
    merges = sum(k.duration for k in kernels if k.kind == "merge") / 1e3
    return {
        "profiled_ms": step,
        "compute_ms": compute,
        "bubble_ms": bubble,
        "exposed_ms": exposed,
        "merge_ms": merges,
    }


def bandwidth(settings: dict) -> float:
    """GB/s from rank 0 to rank 1, in messages of one boundary."""
    tokens = settings["length"] * settings["micro_batch"]
    shape = (tokens, settings["streams"] * settings["hidden"])
    message = torch.zeros(shape, dtype=DTYPE, device="cuda")
    count = 10
    for _connected in (False, True):
        torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(count):
            if dist.get_rank() == 0:
                dist.isend(message, 1).wait()
            else:
                dist.irecv(message, 0).wait()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return count * message.nbytes / seconds / 1e9


def run_case(settings: dict, link: str, mode: str, stages: int, chunks: int) -> tuple[dict, list]:
    case = Case(settings, mode, stages, chunks)
    torch.cuda.reset_peak_memory_stats()
    times, loss = time_steps(case)
    result = {
        "link": link,
        "mode": mode,
        "stages": stages,
        "chunks": chunks,
        "steps_ms": times,
        "step_ms": statistics.median(times),
        "loss": next((value for value in gathered(loss) if value is not None), None),
        "peak_gib": [value / 2**30 for value in gathered(torch.cuda.max_memory_reserved())],
    }
    kernels = []
    if GPU and settings["profile"]:
        kernels = [kernel for rank in gathered(profile_step(case)) for kernel in rank]
        result |= idle_times(case, kernels, stages, chunks)
    case.close()
    return result, kernels


def main(settings: dict, folder: Path) -> None:
    patches.apply()
    print("loaded", flush=True)
    if not sys.stdin.readline():
        sys.exit("the benchmark ended before this rank's turn")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if GPU else "gloo")
    first = dist.get_rank() == 0
    link = settings["link"]
    speed = bandwidth(settings)
    for mode, stages, chunks in settings["cases"]:
        result, kernels = run_case(settings, link, mode, stages, chunks)
        if first:
            line = json.dumps({**result, "link_gb_s": speed})
            with open(folder / "pipeline.jsonl", "a") as results:
                results.write(line + "\n")
            print(f"{link} {mode} {stages} x {chunks}: {result['step_ms']:.1f} ms", flush=True)
            if f"{mode} {chunks}" in settings["traced"] and kernels:
                name = f"trace-{link}-{mode}-{chunks}.json"
                kept = [[k.name, k.rank, k.lane, k.start, k.duration] for k in kernels]
                (folder / name).write_text(json.dumps(kept))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
