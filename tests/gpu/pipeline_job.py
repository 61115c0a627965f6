"""One rank of test_pipeline.py: trains a small model in several divisions on two GPUs.

    RANK=0 WORLD_SIZE=2 ... python pipeline_job.py OUTPUT_FILE SCALE [RUN ...]

All runs, or those named. Every run is written to the output file as it ends, so that a job cut
short keeps what it has.
"""

import contextlib
import gc
import os
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "distributed")]

from megatron_mhc import environment  # noqa: E402

environment.prepare()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from megatron.core import parallel_state  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.pipeline_parallel.utils import ScheduleNode, get_comm_stream  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed  # noqa: E402
from pipeline_cases import Pipeline  # noqa: E402
from pipeline_model import STREAMS, VOCABULARY, build_chunks  # noqa: E402
from two_gpus import add_run  # noqa: E402

from megatron_mhc import patches  # noqa: E402
from megatron_mhc.pipeline import (  # noqa: E402
    PipelineCommunicator,
    PriorityStream,
    ProgramOrder,
    copy_tracks,  # noqa: E402
)
from megatron_mhc.pipeline.boundary import flat_output  # noqa: E402
from megatron_mhc.pipeline.copy_tracks import CopyTracks  # noqa: E402
from megatron_mhc.pipeline.inbox import Inbox  # noqa: E402

GPU = torch.cuda.is_available()
LENGTH, MICRO_BATCH, MICRO_BATCHES = (256, 2, 4) if GPU else (16, 1, 4)
HIDDEN = 256 if GPU else 32
DTYPE, NAN = torch.bfloat16, float("nan")
LONGEST_DELAY = 2_000_000
"""Clock cycles: about a millisecond, several times what the model's kernels take."""
LAG = 20 * LONGEST_DELAY
HELD = 10
"""Tensors that overwrite free memory together: more than a stage has sends and merges at a time."""


class Disturbed(PriorityStream):
    """Waits for a random time on every stream, and overwrites the memory that is free there."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self._random = random.Random(seed)
        self.copies: tuple[torch.cuda.Stream, ...] = ()
        """Streams of the copy transport."""

    def _delay(self) -> None:
        """On the current stream, half of the times."""
        if self._random.random() < 0.5:
            torch.cuda._sleep(self._random.randrange(LONGEST_DELAY))

    def _disturb_all(self) -> None:
        streams = (torch.cuda.current_stream(), self.stream, self._completions, *self.copies)
        for stream in streams:
            with torch.cuda.stream(stream):
                for width in (1, STREAMS):
                    shape = (LENGTH, MICRO_BATCH, width * HIDDEN)
                    # Kept until all are there: one at a time would get the same memory each time.
                    _ = [torch.full(shape, NAN, dtype=DTYPE, device="cuda") for _ in range(HELD)]
                self._delay()

    def form(self, state, backend):
        self._disturb_all()
        output = super().form(state, backend)
        del state
        with torch.cuda.stream(self.stream):
            self._delay()
        self._disturb_all()
        return output

    @contextlib.contextmanager
    def sending(self, tensor):
        with super().sending(tensor):
            self._delay()
            yield
        self._disturb_all()

    def expect_gradient(self, received):
        super().expect_gradient(received)
        self._disturb_all()

    def completion(self, handle):
        with torch.cuda.stream(self._completions):
            self._delay()
        return super().completion(handle)


class Lagging(Disturbed):
    """The main stream is always late: who does not wait for it is always wrong."""

    def form(self, state, backend):
        torch.cuda._sleep(LAG)
        return super().form(state, backend)


class UnorderedMerge(Disturbed):
    """Wrong on purpose: the merge does not wait for its inputs."""

    def form(self, state, backend):
        torch.cuda._sleep(LAG)
        with torch.cuda.stream(self.stream):
            output = flat_output(state, backend)
        self._formed = output.detach()
        return output


class UnorderedGradient(Lagging):
    """Wrong on purpose: a gradient is sent before it is there."""

    @contextlib.contextmanager
    def sending(self, tensor):
        if self._gradient is not None and self._gradient[0].data_ptr() == tensor.data_ptr():
            self._gradient = (tensor, torch.cuda.Event())
            self._gradient[1].record(self.stream)
        with super().sending(tensor):
            yield


class ForgottenSend(Disturbed):
    """Wrong on purpose: memory is given back while it is being sent."""

    @contextlib.contextmanager
    def sending(self, tensor):
        with super().sending(tensor):
            torch.cuda._sleep(LAG)
            # Later than what overwrites the memory behind the sleep above.
            for stream in self.copies:
                with torch.cuda.stream(stream):
                    torch.cuda._sleep(3 * LAG)
            self._sent = tensor
            yield

    def completion(self, handle):
        super().completion(handle)
        # What the outbox keeps is this alias; without its data the memory is free.
        self._sent.data = torch.empty(1, dtype=self._sent.dtype, device="cuda")
        self._disturb_all()
        done = torch.cuda.Event()
        done.record()
        return super().completion(handle)


class OverwrittenInbox(Inbox):
    """Overwrites a slot before it is given back."""

    def _give_back(self, slot, count, streams):
        last = torch.cuda.Stream(self._engine.device)
        for stream in streams:
            last.wait_stream(stream)
        with torch.cuda.stream(last):
            address = self._memory + slot * self.address.size
            shape = (self.address.size // DTYPE.itemsize,)
            self._engine.tensor(address, shape, DTYPE, None).fill_(NAN)
        super()._give_back(slot, count, (last,) * len(streams))


def boundary_of(kind: str):
    kind = kind.removeprefix("nccl ")
    if kind == "none":
        return None
    if not GPU:
        return ProgramOrder()
    return {
        "post": PriorityStream,
        "disturbed": lambda: Disturbed(dist.get_rank()),
        "unordered merge": lambda: UnorderedMerge(dist.get_rank()),
        "unordered gradient": lambda: UnorderedGradient(dist.get_rank()),
        "forgotten send": lambda: ForgottenSend(dist.get_rank()),
    }[kind]()


def transport_of(kind: str) -> str:
    """Copies wherever they are not what a run goes without: none may fall back to NCCL unseen."""
    if kind == "none" or not GPU:
        return "auto"
    return "nccl" if kind.startswith("nccl") else "copy"


def batches(step: int) -> list[dict]:
    """The global batch of a step, every step another."""
    generator = torch.Generator().manual_seed(step)
    shape = (MICRO_BATCHES, MICRO_BATCH, LENGTH + 1)
    # Every token follows from the one before it, most of the time: there is something to learn.
    steps = torch.randint(1, 4, shape, generator=generator).cumsum(-1) % VOCABULARY
    tokens = steps.cuda()
    positions = torch.arange(LENGTH, device="cuda").expand(MICRO_BATCH, -1).contiguous()
    return [
        {
            "index": index,
            "tokens": tokens[index, :, :-1].contiguous(),
            "labels": tokens[index, :, 1:].contiguous(),
            "positions": positions,
        }
        for index in range(MICRO_BATCHES)
    ]


def forward_step(iterator, model, return_schedule_plan: bool = False):
    batch = next(iterator)
    run = model.build_schedule_plan if return_schedule_plan else model
    losses = run(batch["tokens"], batch["positions"], None, labels=batch["labels"])

    def loss(losses):
        mean = losses.float().mean()
        return mean, {batch["index"]: mean.detach().clone()}  # the schedule divides the mean

    return losses, loss


@contextlib.contextmanager
def disturbed_nodes(disturbance: Disturbed, ordered: bool):
    """Every part of combined 1F1B begins late, and finds memory overwritten that should be its.

    Wrong on purpose where they are not ``ordered``: no part waits for the one before.
    """
    acquire = ScheduleNode.stream_acquire_context

    @contextlib.contextmanager
    def late(node, name=None):
        disturbance.copies = (get_comm_stream(),)
        with acquire(node, name) if ordered else torch.cuda.stream(node.stream):
            disturbance._delay()
            yield
        disturbance._disturb_all()

    ScheduleNode.stream_acquire_context = late
    try:
        yield
    finally:
        ScheduleNode.stream_acquire_context = acquire


def train(pipeline: Pipeline, kind: str, steps: int) -> list[list[float]]:
    """The loss of every micro-batch of every step, on every rank."""
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        pipeline_model_parallel_size=pipeline.pp,
        virtual_pipeline_model_parallel_size=pipeline.vpp if pipeline.vpp > 1 else None,
        expert_model_parallel_size=pipeline.ep,
    )
    model_parallel_cuda_manual_seed(1, force_reset_rng=True)
    boundary = boundary_of(kind)
    copy_tracks.Inbox = OverwrittenInbox if isinstance(boundary, Disturbed) else Inbox
    chunks = build_chunks(replace(pipeline, overlap="none" if kind == "none" else "post"), boundary)
    slots = {}
    if pipeline.pp > 1:
        group = parallel_state.get_pipeline_model_parallel_group()
        config = chunks[0].config
        communicator = PipelineCommunicator(
            group,
            config,
            STREAMS,
            boundary,
            transport=transport_of(kind),
        )
        slots["p2p_communicator"] = communicator
        if isinstance(boundary, Disturbed) and isinstance(communicator._tracks, CopyTracks):
            boundary.copies = tuple(communicator._tracks.engine.streams.values())
        slots["pg_collection"] = ProcessGroupCollection.use_mpu_process_groups()
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            lr=1e-3,
            clip_grad=1.0,
            bf16=pipeline.bf16,
            params_dtype=torch.bfloat16 if pipeline.bf16 else torch.float32,
        ),
        chunks,
    )
    losses = []
    for step in range(steps):
        for chunk in chunks:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        batch = batches(step)
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=[iter(batch) for _ in chunks],
            model=chunks,
            num_microbatches=MICRO_BATCHES,
            seq_length=LENGTH,
            micro_batch_size=MICRO_BATCH,
            **slots,
        )
        optimizer.step()
        by_index = {index: loss for report in reports for index, loss in report.items()}
        losses.append([by_index[index] for index in sorted(by_index)])
    if slots:
        slots["p2p_communicator"].drain()
    torch.cuda.synchronize()
    ranks: list = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, [[loss.item() for loss in step] for step in losses])
    del chunks, optimizer, slots
    gc.collect()
    return ranks[-1]


def main(output: Path, scale: float, names: list[str]) -> None:
    patches.apply(flags=["--overlap-moe-expert-parallel-comm"])
    torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if GPU else "gloo")
    whole = Pipeline(pp=1, layers=4, hidden=HIDDEN, bf16=GPU, micro_batches=MICRO_BATCHES)
    stages, chunks = replace(whole, pp=2), replace(whole, pp=2, vpp=2)
    experts = replace(whole, ep=2, experts=True)
    short, long, few = (max(2, int(scale * steps)) for steps in (100, 200, 8))
    runs = {  # what matters most comes first
        "single": (whole, "none", short),
        "chunks": (chunks, "post", long),
        "chunks disturbed": (chunks, "disturbed", long),
        "single recomputed": (replace(whole, recompute=True), "none", short),
        "stages": (stages, "post", long),
        "stages disturbed": (stages, "disturbed", long),
        "chunks replayed": (replace(chunks, replay=True), "disturbed", short),
        "unordered merge": (chunks, "unordered merge", few),
        "unordered gradient": (chunks, "unordered gradient", few),
        "forgotten send": (chunks, "forgotten send", few),
        "chunks nccl disturbed": (chunks, "nccl disturbed", short),
        "chunks none": (chunks, "none", short),
        "experts": (experts, "none", short),
        "experts combined": (replace(experts, combined=True), "none", short),
        "experts combined disturbed": (replace(experts, combined=True), "none", short),
        "unordered parts": (replace(experts, combined=True), "none", few),
    }
    for name in names or runs:
        begin = time.perf_counter()
        with contextlib.ExitStack() as stack:
            if name in ("experts combined disturbed", "unordered parts"):
                disturbance, ordered = Disturbed(dist.get_rank()), name != "unordered parts"
                stack.enter_context(disturbed_nodes(disturbance, ordered))
            losses = train(*runs[name])
        print(f"{name}: {len(losses)} steps in {time.perf_counter() - begin:.1f} s", flush=True)
        if dist.get_rank() == 0:
            add_run(output, name, losses)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), sys.argv[3:])
