"""Times mHC operators on a GPU, beside PyTorch and the public kernels that are installed.

    python tools/benchmark_kernels.py --tokens 8192 --channels 2560 4096 7168 --out build/kernels
    python tools/benchmark_kernels.py --ops post_pre --backends triton te tilekernels liger

Kernel time is the sum of the kernels' durations (torch.profiler), gradient additions of autograd
included, medians over repetitions with L2 flushed before each; wall is the time between events
around forward and backward. Chained wall is that of a chain of applications over their number, as
layers are: a backward pass of a single application wakes autograd's thread for it alone. Chained
host is what the host needs to launch one; where that is more than the kernels, the GPU waits. Graph
is the wall of one application captured as a CUDA graph, without the host. "least" is the floor at
copy speed: the operator's least traffic (research of the project: X is n units of C elements a
token, f and u one) over the bandwidth of a device-to-device copy measured in the same run. Writes
kernels.json, kernels.md and kernels.png.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path

import kernel_peers
import matplotlib

matplotlib.use("Agg")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import matplotlib.pyplot as plt  # noqa: E402
import torch  # noqa: E402
import triton  # noqa: E402
from kernel_timing import as_graph, copy_rate, host, kernel_times, wall  # noqa: E402

from megatron_mhc import kernels  # noqa: E402
from megatron_mhc.command_line import at_least, check_folder, check_gpu, run_tool  # noqa: E402

N, OPTIONS = 4, {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
# Least traffic in units, forward and backward. post_pre, the merge of one sublayer and the mapping
# of the next in one call, is one whole application; so is what peers run under its name. replay is
# what recompute adds to the backward pass for a block of 1 or 4 sublayers; it has no gradient.
UNITS = {"post": (9, 14), "pre": (5, 9), "post_pre": (10, 15), "head": (5, 9), "expand": (5, 5)}
UNITS |= {"replay": (10, 0), "replay_4": (28, 0)}
REPLAYED = {"replay": 1, "replay_4": 4}
OURS = ("triton", "torch", "compile")
CHAINED = ("chained_wall_us", "chained_host_us")


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


def operator(op: str, inputs: dict[str, torch.Tensor], backend: str):
    """One of our operators as (function of its tensors, the tensors)."""
    mapping = ("fn", "scale", "base")
    names = {
        "post": ("x", "f", "post", "comb"),
        "pre": ("x", *mapping),
        "post_pre": tuple(inputs),
        "head": ("x", *mapping),
        "expand": ("f",),
        "replay": ("x", "f", "post", "comb"),
        "replay_4": ("x", "f", "post", "comb"),
    }[op]
    tensors = [inputs[name] for name in names]
    options = {"backend": "torch" if backend == "compile" else backend}
    if op == "head":
        x, fn, scale, base = tensors
        tensors = [x, fn[:N].contiguous(), scale[:1], base[:N]]
        options |= {"eps": 1e-6, "norm_eps": 1e-6}
    elif op == "expand":
        options["n"] = N
    elif op in ("pre", "post_pre"):
        options |= OPTIONS
    if op in REPLAYED:
        forward = replay(REPLAYED[op], tensors, options)
    else:
        function = getattr(kernels, f"mhc_{op}")

        def forward(*arguments):
            outputs = function(*arguments, **options)
            return outputs if isinstance(outputs, tuple) else (outputs,)

    return torch.compile(forward) if backend == "compile" else forward, tensors


def replay(sublayers: int, tensors: list[torch.Tensor], options: dict):
    """Replays ``sublayers`` sublayers, each from tensors of its own."""
    x, *merge = tensors
    merges = [tuple(tensor.clone() for tensor in merge) for _ in range(sublayers)]
    pres = [post.clone() for _, post, _ in merges]
    return lambda *_: kernels.mhc_replay(x, merges, pres, **options)


def make_steps(op: str, inputs: dict[str, torch.Tensor], backend: str):
    """Functions that run the forward, and forward and backward with gradients of everything."""
    make = operator if backend in OURS else kernel_peers.operator
    forward, tensors = make(op, inputs, backend)
    if op in REPLAYED:
        return (lambda: forward(*tensors),) * 2
    leaves = [tensor.detach().requires_grad_() for tensor in tensors]
    weights = [torch.randn_like(output) for output in forward(*leaves)]
    return lambda: forward(*leaves), lambda: torch.autograd.grad(forward(*leaves), leaves, weights)


def make_chain(inputs: dict[str, torch.Tensor], backend: str, length: int):
    """Forward and backward of ``length`` applications, each with parameters of its own, where a
    sublayer returns what it is given.
    """
    first = [inputs[name].detach().requires_grad_() for name in ("x", "f", "post", "comb")]
    mappings = [
        [inputs[name].clone().requires_grad_() for name in ("fn", "scale", "base")]
        for _ in range(length)
    ]
    leaves = [*first, *(parameter for mapping in mappings for parameter in mapping)]
    weights = [torch.randn_like(tensor) for tensor in first]

    def step():
        x, f, post, comb = first
        for mapping in mappings:
            outputs = kernels.mhc_post_pre(x, f, post, comb, *mapping, **OPTIONS, backend=backend)
            x, f, post, comb = outputs
        return torch.autograd.grad((x, f, post, comb), leaves, weights)

    return step


def chain_times(chain, length: int) -> dict[str, float]:
    """CHAINED of a chain of ``length`` applications: microseconds of one."""
    return {
        name: round(time / length, 1) for name, time in zip(CHAINED, (wall(chain), host(chain)))
    }


def machine() -> dict[str, str]:
    """What a figure needs beside it to be read later."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "gpu": torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "commit": commit or "unknown",
    } | kernel_peers.versions()


def measure(
    op: str, tokens: int, channels: int, backend: str, repetitions: int, rate: float, length: int
):
    """One row of the table; the floor is of the whole operator, forward and backward."""
    inputs = make_inputs(tokens, channels)
    forward, step = make_steps(op, inputs, backend)
    chained = dict.fromkeys(CHAINED)
    if op == "post_pre" and backend in ("triton", "torch"):
        chained = chain_times(make_chain(inputs, backend, length), length)
    times = kernel_times(step, repetitions)
    total = sum(times.values())
    forward_us = total
    if step is not forward:
        forward_us = sum(kernel_times(forward, repetitions).values())
    unit = 2 * channels * tokens / rate / 1e3  # microseconds at copy speed
    least = [units * unit for units in UNITS[op]]
    return {
        "op": op,
        "tokens": tokens,
        "channels": channels,
        "backend": backend,
        "kernel_us": round(total, 1),
        "forward_us": round(forward_us, 1),
        "backward_us": round(total - forward_us, 1),
        "wall_us": wall(step),
        **chained,
        "graph_us": wall(as_graph(step)) if backend == "triton" else None,
        "GB/s of least": round(sum(least) * rate / total),
        "% of copy": round(100 * sum(least) / total, 1),
        "% forward": round(100 * least[0] / forward_us, 1),
        "% backward": round(100 * least[1] / (total - forward_us), 1) if least[1] else None,
        "kernels": {name: round(time, 1) for name, time in times.items()},
    }


def write(rows: list[dict], about: dict, folder: Path) -> None:
    """kernels.json, kernels.md and kernels.png of what there is so far."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kernels.json").write_text(json.dumps({"machine": about, "rows": rows}, indent=1))
    columns = [name for name in rows[0] if name != "kernels"]
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    lines += ["| " + " | ".join(str(row[name]) for name in columns) + " |" for row in rows]
    (folder / "kernels.md").write_text("\n".join(lines) + "\n")
    chosen = [row for row in rows if row["op"] == "post_pre"]
    if not chosen:
        return
    sizes = list(dict.fromkeys((row["tokens"], row["channels"]) for row in chosen))
    backends = list(dict.fromkeys(row["backend"] for row in chosen))
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(sizes), 4))
    width = 0.8 / len(backends)
    for k, backend in enumerate(backends):
        mine = {
            (row["tokens"], row["channels"]): row for row in chosen if row["backend"] == backend
        }
        at = [i + k * width for i, size in enumerate(sizes) if size in mine]
        values = [mine[size]["kernel_us"] for size in sizes if size in mine]
        axes.bar_label(axes.bar(at, values, width, label=backend), fmt="%.0f", fontsize=6)
    axes.set_xticks(range(len(sizes)), [f"{t} x {c}" for t, c in sizes])
    axes.set_ylabel("kernel time of one application, us")
    axes.set_yscale("log")
    axes.legend()
    figure.savefig(folder / "kernels.png", dpi=120, bbox_inches="tight")
    plt.close(figure)


def size(text: str) -> tuple[int, int]:
    """Tokens and channels of the command line, as 8192x4096.

    Raises:
        ArgumentTypeError: they are no two numbers above 0.
    """
    numbers = text.split("x")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise argparse.ArgumentTypeError(f"{text}: expected tokens x channels, as 8192x4096")
    return int(numbers[0]), int(numbers[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ops", nargs="+", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--tokens", nargs="+", type=at_least(1), default=[8192])
    parser.add_argument("--channels", nargs="+", type=at_least(1), default=[2560, 4096, 7168])
    parser.add_argument(
        "--sizes", nargs="+", type=size, help="tokens x channels, as 8192x4096, instead"
    )
    backends = (*OURS, *kernel_peers.PEERS)
    parser.add_argument("--backends", nargs="+", default=["triton"], choices=backends)
    parser.add_argument("--repetitions", type=at_least(1), default=20)
    parser.add_argument(
        "--chain",
        type=at_least(1),
        default=8,
        help="applications in a chain; a model has two a layer, and each keeps its streams",
    )
    parser.add_argument("--out", type=Path, default=Path("build/kernels"), help="folder to write")
    arguments = parser.parse_args()
    check_folder(arguments.out, f"--out {arguments.out}")
    check_gpu()
    sizes = arguments.sizes or [(t, c) for t in arguments.tokens for c in arguments.channels]
    rate = copy_rate()
    about = machine() | {"copy GB/s": round(rate), "chain": arguments.chain}
    print(about)
    rows = []
    for backend in arguments.backends:
        problem = kernel_peers.problem(backend) if backend not in OURS else None
        if problem:
            print(f"{backend}: not measured, {problem}")
            continue
        for tokens, channels in sizes:
            for op in arguments.ops if backend in OURS else ["post_pre"]:
                row = measure(
                    op, tokens, channels, backend, arguments.repetitions, rate, arguments.chain
                )
                rows.append(row)
                print(row, flush=True)
                write(rows, about, arguments.out)


if __name__ == "__main__":
    run_tool(main)
