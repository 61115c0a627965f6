"""Times one mHC application (merge, then the next mapping and aggregation) on a GPU.

    python tools/benchmark_kernels.py --tokens 8192 --channels 4096 --json out.json
    python tools/benchmark_kernels.py --sweep          # block sizes, a line for each

Kernel time is the sum of the kernels' durations (torch.profiler), medians over repetitions with L2
flushed between them; wall is the time between events around forward and backward. GB/s and % are
those of the least traffic over kernel time, against a device-to-device copy measured in the run.
"""

import argparse
import json
import platform
import statistics
import subprocess
from collections import defaultdict

import torch
import triton
from torch.profiler import ProfilerActivity, profile

from megatron_mhc import kernels
from megatron_mhc.kernels import launch

N, OPTIONS = 4, {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
# Least traffic of each operator in units of C elements a token, forward and backward
# (research/kernels.md, section 4): X is n units, f and u one each.
UNITS = {"post": (9, 14), "pre": (5, 9), "post_pre": (10, 15)}
# Kernels whose time belongs to the forward; split_weight_kernel runs there only.
FORWARD = ("split_weight_kernel", "merge_map_kernel", "aggregate_kernel")
SWEEP = {
    "map": [
        {"BLOCK_T": 64, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1, "resident": 1},
        {"BLOCK_T": 64, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3, "resident": 1},
        {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1, "resident": 2},
        {"BLOCK_T": 64, "BLOCK_C": 32, "num_warps": 8, "num_stages": 1, "resident": 2},
        {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1, "resident": 2},
        {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 8, "num_stages": 3, "resident": 2},
    ],
    "streams": [
        {"BLOCK_T": 32, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1, "resident": 1},
        {"BLOCK_T": 16, "BLOCK_C": 64, "num_warps": 4, "num_stages": 1, "resident": 2},
        {"BLOCK_T": 32, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1, "resident": 2},
        {"BLOCK_T": 16, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1, "resident": 1},
        {"BLOCK_T": 16, "BLOCK_C": 64, "num_warps": 8, "num_stages": 1, "resident": 2},
        {"BLOCK_T": 32, "BLOCK_C": 32, "num_warps": 4, "num_stages": 1, "resident": 3},
    ],
}
# A register cap makes room for the blocks that ``resident`` promises.
REGISTERS = {(8, 2): 128, (4, 3): 168}


def make_inputs(tokens: int, channels: int) -> dict[str, torch.Tensor]:
    """Random bf16 streams, logits of standard deviation about 1."""
    count = (2 + N) * N
    make = {"device": "cuda"}
    comb = kernels.sinkhorn(torch.randn(tokens, N, N, **make), backend="torch")
    return {
        "x": torch.randn(tokens, N, channels, **make).bfloat16(),
        "f": torch.randn(tokens, channels, **make).bfloat16(),
        "post": 2 * torch.rand(tokens, N, **make),
        "comb": comb,
        "fn": torch.randn(count, N * channels, **make) / (N * channels) ** 0.5,
        "scale": torch.ones(3, **make),
        "base": torch.randn(count, **make),
    }


def make_step(op: str, inputs: dict[str, torch.Tensor], backend: str):
    """A function that runs ``op`` forward and backward, gradients of everything."""
    names = {
        "post": ("x", "f", "post", "comb"),
        "pre": ("x", "fn", "scale", "base"),
        "post_pre": tuple(inputs),
    }[op]
    function = getattr(kernels, f"mhc_{op}")
    options = {"backend": "torch" if backend == "compile" else backend}
    if op != "post":
        options |= OPTIONS
    leaves = [inputs[name].detach().requires_grad_() for name in names]

    def forward(*tensors):
        outputs = function(*tensors, **options)
        return (outputs,) if op == "post" else outputs

    if backend == "compile":
        forward = torch.compile(forward)
    weights = [torch.randn_like(output) for output in forward(*leaves)]
    return lambda: torch.autograd.grad(forward(*leaves), leaves, weights)


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


def wall_time(step) -> float:
    """Median microseconds between events around a step."""
    return 1000 * triton.testing.do_bench(step, warmup=50, rep=200, return_mode="median")


def copy_rate() -> float:
    """GB/s of a device-to-device copy, bytes read and written."""
    source = torch.empty(1 << 30, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / triton.testing.do_bench(lambda: target.copy_(source)) / 1e6


def machine() -> dict[str, str]:
    """What a figure needs beside it to be read later."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "host": platform.node(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or "unknown",
    }


def measure(op: str, tokens: int, channels: int, backend: str, arguments, rate: float) -> dict:
    """One row of the table."""
    step = make_step(op, make_inputs(tokens, channels), backend)
    times = kernel_times(step, arguments.repetitions)
    total = sum(times.values())
    forward = sum(times.get(name, 0.0) for name in FORWARD)
    unit = 2 * channels * tokens / 1e3  # over microseconds: GB/s
    reached = sum(UNITS[op]) * unit / total
    row = {
        "op": op,
        "tokens": tokens,
        "channels": channels,
        "backend": backend,
        "kernel_us": round(total, 1),
        "wall_us": round(wall_time(step), 1),
        "GB/s": round(reached),
        "% of copy": round(100 * reached / rate, 1),
    }
    if backend == "triton":
        row["forward_us"] = round(forward, 1)
        row["kernels"] = {name: round(time, 1) for name, time in times.items()}
    return row


def sweep(tokens: int, channels: int, repetitions: int) -> None:
    """Times every entry of SWEEP; the k-th entries of all kernels run together."""
    inputs = make_inputs(tokens, channels)
    for entries in zip(*SWEEP.values()):
        for name, entry in zip(SWEEP, entries):
            options = dict(entry)
            resident = options.pop("resident")
            setattr(launch, f"{name.upper()}_RESIDENT", resident)
            cap = REGISTERS.get((options["num_warps"], resident))
            launch.CONFIGS[name] = options | ({"maxnreg": cap} if cap else {})
        try:
            times = kernel_times(make_step("post_pre", inputs, "triton"), repetitions)
        except triton.runtime.errors.OutOfResources as error:
            print("does not fit:", error, entries)
            continue
        print(f"{sum(times.values()):8.1f} us", {k[:24]: round(v, 1) for k, v in times.items()})
        for name, entry in zip(SWEEP, entries):
            print("            ", name, entry, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[8192])
    parser.add_argument("--channels", nargs="+", type=int, default=[2560, 4096, 7168])
    parser.add_argument("--backends", nargs="+", default=["triton"])
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--sweep", action="store_true", help="time block sizes instead")
    parser.add_argument("--json", help="write all figures there")
    arguments = parser.parse_args()
    if arguments.sweep:
        for tokens in arguments.tokens:
            for channels in arguments.channels:
                sweep(tokens, channels, arguments.repetitions)
        return
    rate = copy_rate()
    about = machine() | {"copy GB/s": round(rate)}
    print(about)
    rows = []
    for tokens in arguments.tokens:
        for channels in arguments.channels:
            for op in arguments.ops:
                for backend in arguments.backends:
                    rows.append(measure(op, tokens, channels, backend, arguments, rate))
                    print(rows[-1], flush=True)
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump({"machine": about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
