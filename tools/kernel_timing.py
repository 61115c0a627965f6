"""What a step on a GPU takes: of its kernels, between events, and of the host."""

import statistics
import time
from collections import defaultdict

import torch
import triton
from torch.profiler import ProfilerActivity, profile


def wall(step) -> float:
    """Microseconds between events around ``step``, median."""
    return round(1e3 * triton.testing.do_bench(step, 50, 200, return_mode="median"), 1)


def host(step) -> float:
    """Microseconds until ``step`` has launched everything, median, on an idle GPU."""
    times = []
    for _ in range(20):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        step()
        times.append(1e6 * (time.perf_counter() - begin))
    torch.cuda.synchronize()
    return statistics.median(times)


def as_graph(step):
    """``step`` captured as a CUDA graph: a call replays it."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()  # what a first call allocates and compiles is not to be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        step()
    return graph.replay


def kernel_times(step, repetitions: int) -> dict[str, float]:
    """Microseconds a step spends in each kernel, by name: medians, with L2 flushed before."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    marker = "FillFunctor<signed char>"
    for _ in range(3):
        step()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(repetitions):
            flush.fill_(1)
            step()
        torch.cuda.synchronize()
    runs = defaultdict(list)
    for event in trace.events():
        if event.device_type == torch.autograd.DeviceType.CUDA and marker not in event.name:
            runs[event.name].append(event.device_time)
    sums = {}
    for name, times in runs.items():
        launches = len(times) // repetitions
        steps = [sum(times[i : i + launches]) for i in range(0, len(times), launches or 1)]
        sums[name] = statistics.median(steps)
    return sums


def copy_rate() -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / triton.testing.do_bench(lambda: target.copy_(source)) / 1e6
