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
from megatron_mhc.pipeline.copy_tracks import CopyTracks  # noqa: E402
from megatron_mhc.pipeline.schedule_model import Schedule  # noqa: E402
from megatron_mhc.pipeline.tracks import Tracks  # noqa: E402
from megatron_mhc.pipeline.transport import make_tracks  # noqa: E402
from megatron_mhc.report.trace import busy_us, profile_step, window_us  # noqa: E402

GPU = torch.cuda.is_available()
DTYPE = torch.bfloat16 if GPU else torch.float32
WARM_UP = 2
"""Steps before the first that is timed: compilation, allocation, NCCL's connections."""


class MergedOnMain(PriorityStream):
    """Sends as overlap post does; the merge stays on the main stream. Tells the two apart."""

    def form(self, state, backend):
        return flat_output(state, backend)


class MegatronsGroups(Tracks):
    """Megatron's communicators: of two stages one for what each sends, else one for a pair."""

    def _make_groups(self):
        odd = dist.group.WORLD if self.pp_group.size() == 2 else self.pp_group
        kinds = ("activation", "gradient")
        return {
            (kind, odd_sends): (self.pp_group, odd)[odd_sends]
            for kind in kinds
            for odd_sends in (0, 1)
        }


class Mode:
    """What the name of a case says: BASE, BASE+recompute or nccl@CTAS.

    Attributes:
        base: one of the tool's cases. recompute: --mhc-recompute.
        ctas: SMs that a transfer may take, None is NCCL's choice.
    """

    def __init__(self, name: str) -> None:
        name, _, ctas = name.partition("@")
        self.base, _, recompute = name.partition("+")
        self.recompute = bool(recompute)
        self.ctas = int(ctas) if ctas else None

    @property
    def plain(self) -> bool:
        return self.base.startswith("plain")

    @property
    def waits(self) -> bool:
        """Whether sends are waited for, as Megatron does."""
        return self.base in ("plain", "plain-kept", "none", "none-kept")

    @property
    def carrier(self) -> str:
        """Cases of one carrier run over the same tracks."""
        if self.waits or self.base == "shared":
            return "shared"
        return f"nccl@{self.ctas}" if self.base == "nccl" else "auto"

    def boundary(self):
        """Where sends are issued from; None: Megatron's own way."""
        if self.waits:
            return None
        return MergedOnMain() if GPU and self.base == "sends" else send_boundary()


def transformer_config(settings: dict, mode: Mode, stages: int, chunks: int) -> TransformerConfig:
    overlap_p2p = chunks > 1
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
        microbatch_group_size_per_vp_stage=settings["group"] or None,
        # As megatron.training sets them, and as overlap post does.
        deallocate_pipeline_outputs=not mode.base.endswith("-kept"),
        overlap_p2p_comm=overlap_p2p,
        batch_p2p_comm=not overlap_p2p and mode.waits,
        overlap_p2p_comm_warmup_flush=overlap_p2p and not mode.waits and mode.base != "late",
    )


def build_chunks(settings, config, mhc, boundary) -> list[DistributedDataParallel]:
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


class Division:
    """Megatron's process groups for a number of stages, and what runs over them."""

    def __init__(self, settings: dict, stages: int, chunks: int) -> None:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(
            pipeline_model_parallel_size=stages,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            create_gloo_process_groups=False,
        )
        self.stages, self.chunks = stages, chunks
        self.group = parallel_state.get_pipeline_model_parallel_group()
        self._message = (
            settings["length"] * settings["micro_batch"],
            settings["streams"] * settings["hidden"],
        )
        self._schedule = Schedule(chunks, settings["group"])
        self._priority = send_boundary()
        self._tracks: dict[str, tuple[CopyTracks | Tracks, float]] = {}

    def tracks(self, mode: Mode) -> tuple[CopyTracks | Tracks, float]:
        """What a mode's transfers run over, and its GB/s from stage 0 to 1; made once."""
        if mode.carrier not in self._tracks:
            wraps = self.chunks > 1
            if mode.carrier == "shared":
                tracks = MegatronsGroups(self.group, wraps)
            elif mode.carrier == "auto":
                tracks = make_tracks(self.group, "auto", self._schedule, self._priority)
            else:
                tracks = Tracks(self.group, wraps, ctas=mode.ctas)
            self._tracks[mode.carrier] = tracks, bandwidth(tracks, self._message)
        return self._tracks[mode.carrier]


class Case:
    """One model in one division, ready to step."""

    def __init__(self, settings: dict, name: str, division: Division) -> None:
        mode = Mode(name)
        model_parallel_cuda_manual_seed(1, force_reset_rng=True)
        torch.manual_seed(1)
        self.settings = settings
        self.config = transformer_config(settings, mode, division.stages, division.chunks)
        mhc = None
        if not mode.plain:
            blocks = settings["recompute_layer_num"] if mode.recompute else None
            streams = settings["streams"]
            mhc = MHCConfig(
                num_streams=streams, recompute=mode.recompute, recompute_layer_num=blocks
            )
        boundary = mode.boundary()
        self.chunks = build_chunks(settings, self.config, mhc, boundary)
        self.slots = {}
        self.link_gb_s = self.tracks = None
        if division.stages > 1:
            self.tracks, self.link_gb_s = division.tracks(mode)
            if mode.base not in ("plain", "plain-kept"):
                streams = mhc.num_streams if mhc else 1
                communicator = PipelineCommunicator(
                    division.group, self.config, streams, boundary, boundary and self.tracks
                )
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

    def peak_bytes(self) -> int:
        """Memory that was held at most: torch's, and the slots that messages are copied into."""
        engine = getattr(self.tracks, "engine", None)
        return torch.cuda.max_memory_reserved() + (engine.allocated if engine else 0)

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


def bandwidth(tracks: Tracks, shape: tuple[int, int]) -> float:
    """GB/s from stage 0 to stage 1, in messages of one boundary."""
    message = torch.zeros(shape, dtype=DTYPE, device="cuda")
    count = 5
    for _connected in (False, True):
        torch.cuda.synchronize()
        dist.barrier()
        begin = time.perf_counter()
        for _ in range(count):
            if dist.get_rank() == 0:
                tracks.send("tensor_send_next", message).wait()
            else:
                tracks.receive("recv_prev", shape, DTYPE, message.device)[1].wait()
        torch.cuda.synchronize()
        seconds = time.perf_counter() - begin
    return count * message.nbytes / seconds / 1e9


def run_case(settings: dict, name: str, division: Division) -> tuple[dict, list]:
    begin = time.perf_counter()
    case = Case(settings, name, division)
    torch.cuda.reset_peak_memory_stats()
    times, loss = time_steps(case)
    result = {
        "link": settings["link"],
        "p2p_channels": settings["p2p_channels"],
        "mode": name,
        "stages": division.stages,
        "chunks": division.chunks,
        "link_gb_s": case.link_gb_s,
        "steps_ms": times,
        "step_ms": statistics.median(times),
        "loss": next((value for value in gathered(loss) if value is not None), None),
        "peak_gib": [value / 2**30 for value in gathered(case.peak_bytes())],
    }
    kernels = []
    if GPU and settings["profile"]:
        dist.barrier()
        mine = profile_step(case.step, dist.get_rank())
        kernels = [kernel for rank in gathered(mine) for kernel in rank]
        result |= idle_times(case, kernels, division.stages, division.chunks)
    case.close()
    return {**result, "seconds": time.perf_counter() - begin}, kernels


def main(settings: dict, folder: Path) -> None:
    recomputes = any(Mode(name).recompute for name, *_ in settings["cases"])
    patches.apply(flags=["--mhc-recompute"] if recomputes else [])
    print("loaded", flush=True)
    if not sys.stdin.readline():
        sys.exit("the benchmark ended before this rank's turn")
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if GPU else "gloo")
    division = None
    begins = settings["first"]
    for name, stages, chunks in settings["cases"]:
        if division is None or (division.stages, division.chunks) != (stages, chunks):
            division = Division(settings, stages, chunks)
        result, kernels = run_case(settings, name, division)
        if dist.get_rank() == 0:
            write(folder, result, kernels if settings["trace"] and stages > 1 else [], begins)
        begins = False
    dist.destroy_process_group()


def write(folder: Path, result: dict, kernels: list, begins: bool) -> None:
    """One case's line and, with ``kernels``, its trace.

    The line that ``begins`` a run replaces the results of an earlier one.
    """
    results = folder / "pipeline.jsonl"
    line = json.dumps(result) + "\n"
    if begins:
        aside = results.with_suffix(".aside")
        aside.write_text(line)
        os.replace(aside, results)
    else:
        with open(results, "a") as lines:
            lines.write(line)
    case = "{link}-{mode}-{chunks}".format(**result)
    print(f"{case}: {result['step_ms']:.1f} ms, ran {result['seconds']:.1f} s", flush=True)
    if kernels:
        kept = [[k.name, k.rank, k.lane, k.start, k.duration] for k in kernels]
        (folder / f"trace-{case}.json").write_text(json.dumps(kept))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]), Path(sys.argv[2]))
