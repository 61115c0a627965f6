#!/usr/bin/env python3
"""Train plain and mHC models side by side on a GPU: loss, step time and peak memory.

    python tools/benchmark_training.py --data data/stdlib --out OUT_FOLDER [--cases plain-bf16 ...]

Each case is one run of examples/pretrain_gpt.py on the same tokens from the same seed, one after
the other; only their imports, which take longest, run at the same time, before the first of them.
Writes training.json, training.md (a table) and training.png into the output folder.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_mhc.command_line import (  # noqa: E402
    at_least,
    check_data,
    check_folder,
    check_gpu,
    run_tool,
)
from megatron_mhc.errors import UserError  # noqa: E402
from megatron_mhc.kernels import BACKENDS  # noqa: E402
from megatron_mhc.report.curves import read_run  # noqa: E402
from megatron_mhc.report.megatron_log import (  # noqa: E402
    parse_peak_memory,
    parse_step,
    parse_validation,
)
from megatron_mhc.report.plots import draw_comparison  # noqa: E402

PRECISIONS = {
    "bf16": [],
    "fp8-tensorwise": ["--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"],
    "fp8-blockwise": ["--fp8-format", "e4m3", "--fp8-recipe", "blockwise"],
}
GRAPH = "-graph"
"""Ends the name of a case whose forward and backward passes are one CUDA graph."""
CASES = [
    f"{model}-{precision}{graph}"
    for precision in PRECISIONS
    for graph in ("", GRAPH)
    for model in ("plain", "mhc")
]
PRELOAD = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
from megatron_mhc import environment
environment.prepare()
import megatron_mhc.pretraining, megatron_mhc.startup
print("preloaded", file=sys.__stdout__, flush=True)
if not sys.stdin.readline():
    sys.exit("the benchmark ended before this run")
del sys.argv[:2]
runpy.run_path(sys.argv[0], run_name="__main__")
"""
"""Imports what a run needs, waits for a line, runs."""
WARM_UP = 50
"""Steps left out of the step time: compilation, allocation, Megatron's first-step checks."""


def command(args, case: str, folder: Path) -> list[str]:
    model, precision = case.split("-", 1)
    flags = {
        "num-layers": args.layers,
        "hidden-size": args.hidden,
        "ffn-hidden-size": args.ffn,
        "num-attention-heads": args.hidden // 64,
        "seq-length": 1024,
        "max-position-embeddings": 1024,
        "micro-batch-size": 4,
        "global-batch-size": 4,
        "train-iters": args.steps,
        "lr": 6e-4,
        "min-lr": 6e-5,
        "lr-decay-style": "cosine",
        "lr-warmup-iters": 30,
        "weight-decay": 0.1,
        "hidden-dropout": 0,
        "attention-dropout": 0,
        "normalization": "RMSNorm",
        "position-embedding-type": "rope",
        "transformer-impl": "transformer_engine",
        "tokenizer-type": "NullTokenizer",
        "vocab-size": 257,
        "train-data-path": f"{args.data}_train",
        "valid-data-path": f"{args.data}_valid",
        "data-cache-path": folder.parent / "cache",
        "eval-interval": args.steps,
        "eval-iters": 10,
        "log-interval": 1,
        "log-memory-interval": args.steps // 2,
        "tensorboard-dir": folder,
        "tensorboard-log-interval": 1,
    }
    words = [str(ROOT / "examples" / "pretrain_gpt.py"), "--bf16", "--swiglu"]
    words += ["--disable-bias-linear", "--untie-embeddings-and-output-weights"]
    words += ["--no-create-attention-mask-in-dataloader", "--use-distributed-optimizer"]
    words += ["--no-gradient-accumulation-fusion"]
    words += PRECISIONS[precision.removesuffix(GRAPH)]
    if model == "mhc":
        words += ["--mhc", "--mhc-backend", args.backend]
    if case.endswith(GRAPH):
        words += ["--cuda-graph-impl", "full_iteration", "--te-rng-tracker"]
        words += ["--no-check-for-nan-in-loss-and-grad"]
    elif model == "mhc":
        words += ["--mhc-log-gain-interval", str(args.steps // 6)]
    for name, value in flags.items():
        words += [f"--{name}", str(value)]
    return words


def preload(args, case: str) -> subprocess.Popen:
    """A run that has begun to import and waits for its turn."""
    folder = args.out / case
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "log.txt", "w") as log:
        return subprocess.Popen(
            [sys.executable, "-c", PRELOAD, str(ROOT), *command(args, case, folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )


def wait_until_loaded(args, runs: dict[str, subprocess.Popen]) -> None:
    """Returns when no import is left that could disturb a step time."""
    for case, process in runs.items():
        log = args.out / case / "log.txt"
        while "preloaded" not in log.read_text() and process.poll() is None:
            time.sleep(0.5)


def train(args, case: str, process: subprocess.Popen) -> dict:
    folder = args.out / case
    log = folder / "log.txt"
    print(f"$ python3 {' '.join(command(args, case, folder))}", flush=True)
    process.communicate("\n")
    status = process.returncode
    lines = log.read_text().splitlines()
    if status:
        tail = "\n".join(lines[-30:])
        raise UserError(f"{case} failed with status {status}, log in {log}; its end:\n{tail}")
    steps = [step for line in lines if (step := parse_step(line))]
    validation = [loss for line in lines if (loss := parse_validation(line)) is not None]
    memory = [peak for line in lines if (peak := parse_peak_memory(line)) is not None]
    return {
        "case": case,
        "steps": len(steps),
        "loss": [step.loss for step in steps],
        "validation_loss": validation[-1],
        "step_ms": statistics.median(step.ms for step in steps[WARM_UP:]),
        "peak_mib": max(memory),
        "max_gain": read_run(folder, case).max_gain(),
    }


def table(results: list[dict]) -> str:
    rows = [
        "| run | loss, first | loss, last 20 | validation loss "
        "| ms / step | over plain | peak MiB | over plain | max gain |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    plain = {r["case"].split("-", 1)[1]: r for r in results if r["case"].startswith("plain")}
    for result in results:
        base = plain.get(result["case"].split("-", 1)[1])
        over = [
            f"{result[key] / base[key]:.2f}x" if base else "-" for key in ("step_ms", "peak_mib")
        ]
        gain = "-" if result["max_gain"] is None else f"{result['max_gain']:.3f}"
        rows.append(
            f"| {result['case']} | {result['loss'][0]:.3f} | "
            f"{statistics.mean(result['loss'][-20:]):.3f} | {result['validation_loss']:.3f} | "
            f"{result['step_ms']:.1f} | {over[0]} | {result['peak_mib']:.0f} | {over[1]} | {gain} |"
        )
    return "\n".join(rows)


def check(args) -> None:
    """That the runs can start.

    Raises:
        UserError: names the flag, its value and what would be right.
    """
    if args.steps <= WARM_UP:
        raise UserError(f"--steps {args.steps}: more than {WARM_UP} are needed for a step time")
    if args.hidden % 64:
        raise UserError(f"--hidden {args.hidden}: expected a multiple of 64, a head's channels")
    check_data(args.data)
    check_folder(args.out, f"--out {args.out}")
    check_gpu()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True, help="prefix given to prepare_data.py")
    parser.add_argument("--out", type=Path, required=True, help="folder for logs and results")
    default = [case for case in CASES if not case.endswith(GRAPH)]
    parser.add_argument("--cases", nargs="+", choices=CASES, default=default)
    parser.add_argument(
        "--backend", choices=BACKENDS, default="auto", help="--mhc-backend of the mHC runs [auto]"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--layers", type=at_least(1), default=12)
    parser.add_argument("--hidden", type=at_least(64), default=1536)
    parser.add_argument("--ffn", type=at_least(1), default=4096)
    args = parser.parse_args()
    check(args)
    results = []
    runs = {case: preload(args, case) for case in args.cases}
    wait_until_loaded(args, runs)
    for case, process in runs.items():
        results.append(train(args, case, process))
        # After every case: a run cut short keeps what it has.
        (args.out / "training.json").write_text(json.dumps(results, indent=1))
        (args.out / "training.md").write_text(table(results) + "\n")
    draw_comparison(
        [read_run(args.out / case, case) for case in args.cases], args.out / "training.png"
    )
    print(table(results))


if __name__ == "__main__":
    run_tool(main)
