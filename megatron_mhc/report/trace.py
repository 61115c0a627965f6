"""Kernels of a profiled step, by rank and by the stream that they ran on."""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

MAIN, PRIORITY, NCCL, COPIES, OTHER = "main", "priority", "NCCL", "copy engine", "other"
TRANSFERS = {NCCL: "nccl", COPIES: "Memcpy PtoP"}
"""Lanes of transfers, and how the name of everything on them begins."""
GPU_CATEGORIES = ("kernel", "gpu_memcpy", "gpu_memset")
_MERGE = re.compile(r"merge|streams_backward")


@dataclass(frozen=True)
class Kernel:
    """One kernel or copy: name, rank, lane (one of this file's, with a number where there are
    several), start and duration in microseconds of the host's clock."""

    name: str
    rank: int
    lane: str
    start: float
    duration: float

    @property
    def end(self) -> float:
        return self.start + self.duration

    @property
    def kind(self) -> str:
        """ "transfer", "merge" (of a stage's end) or "compute"."""
        if self.lane.startswith(tuple(TRANSFERS)):
            return "transfer"
        return "merge" if self.lane.startswith(PRIORITY) else "compute"


def _lane_names(streams: dict[object, list[dict]]) -> dict[object, str]:
    """A name for every stream: CUPTI numbers them, so what runs there tells which it is."""
    names = {}
    for stream, events in streams.items():
        for lane, begins in TRANSFERS.items():
            if all(event["name"].startswith(begins) for event in events):
                names[stream] = lane
    rest = [stream for stream in streams if stream not in names]
    busiest = max(rest, key=lambda s: sum(event["dur"] for event in streams[s]), default=None)
    for stream in rest:
        merges = any(_MERGE.search(event["name"]) for event in streams[stream])
        names[stream] = MAIN if stream == busiest else PRIORITY if merges else OTHER
    counts: dict[str, int] = defaultdict(int)
    for stream in sorted(names, key=str):
        counts[names[stream]] += 1
        if counts[names[stream]] > 1:
            names[stream] += f" {counts[names[stream]]}"
    return names


def read_kernels(chrome: dict, rank: int) -> list[Kernel]:
    """The GPU's part of a trace that ``torch.profiler`` exported, in order of time."""
    streams: dict[object, list[dict]] = defaultdict(list)
    for event in chrome["traceEvents"]:
        if event.get("ph") == "X" and event.get("cat") in GPU_CATEGORIES:
            streams[event["tid"]].append(event)
    names = _lane_names(streams)
    kernels = [
        Kernel(event["name"], rank, names[stream], float(event["ts"]), float(event["dur"]))
        for stream, events in streams.items()
        for event in events
    ]
    return sorted(kernels, key=lambda kernel: kernel.start)


def profile_step(step: Callable[[], object], rank: int = 0) -> list[Kernel]:
    """What ``step`` runs on this process's GPU, as :func:`read_kernels` gives it."""
    import torch  # a trace can be read without it
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        step()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiled.export_chrome_trace(str(path))
        return read_kernels(json.loads(path.read_text()), rank)


def busy_us(kernels: Iterable[Kernel]) -> float:
    """Time in which at least one of ``kernels`` runs."""
    total, end = 0.0, float("-inf")
    for kernel in sorted(kernels, key=lambda kernel: kernel.start):
        total += max(0.0, kernel.end - max(end, kernel.start))
        end = max(end, kernel.end)
    return total


def window_us(kernels: Iterable[Kernel]) -> float:
    """From the first start to the last end, over all ranks."""
    kernels = list(kernels)
    return max(kernel.end for kernel in kernels) - min(kernel.start for kernel in kernels)


def chrome_trace(kernels: list[Kernel]) -> dict:
    """A trace for chrome://tracing or Perfetto: a process per rank, a named thread per stream."""
    events = []
    lanes = sorted({(kernel.rank, kernel.lane) for kernel in kernels})
    threads = {lane: index for index, lane in enumerate(lanes)}
    for (rank, lane), thread in threads.items():
        place = {"ph": "M", "pid": rank, "tid": thread}
        events.append({**place, "name": "process_name", "args": {"name": f"rank {rank}"}})
        events.append({**place, "name": "thread_name", "args": {"name": lane}})
    begin = min((kernel.start for kernel in kernels), default=0.0)
    for kernel in kernels:
        events.append(
            {
                "ph": "X",
                "cat": kernel.kind,
                "name": kernel.name,
                "pid": kernel.rank,
                "tid": threads[kernel.rank, kernel.lane],
                "ts": round(kernel.start - begin, 3),
                "dur": round(kernel.duration, 3),
            }
        )
    return {"traceEvents": events}
