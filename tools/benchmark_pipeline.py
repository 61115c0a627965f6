#!/usr/bin/env python3
"""What pipeline boundaries of n streams cost on two GPUs, and what they cost on paper.

    python tools/benchmark_pipeline.py --out runs/pipeline [--trace] [--cases none post] ...
    python tools/benchmark_pipeline.py --estimate --stages 8 --chunks 4 --link 50 --forward-ms 9

A step is the forward and backward passes of a global batch, without the optimizer. Cases:

    plain        without mHC, as Megatron 0.19.2 runs it
    plain-kept   without mHC, outputs not freed: a send is not waited for when it is issued
    none-kept    the same of none
    plain-free   without mHC, sent and received as overlap post does
    none         mHC, --mhc-pipeline-overlap none
    sends        mHC, sent and received as overlap post does, merges on the main stream
    post         mHC, --mhc-pipeline-overlap post
    late         the same, without receiving ahead in warm-up and cool-down
    nccl         the same, --mhc-pipeline-transport nccl; nccl@N: a transfer takes N SMs at most
    shared       overlap post over Megatron's communicators
    none+recompute, post+recompute    with --mhc-recompute

each in two stages; plain, none and none+recompute also on one GPU. The slow link is
NCCL_P2P_DISABLE=1, through host memory. All cases of a link run in one pair of processes. Writes
pipeline.jsonl (a line a case, as they end; the first replaces the results of an earlier run),
pipeline.md and, with --trace, Chrome traces of the staged cases and a picture of them.
"""

import argparse
import contextlib
import gzip
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

from rich.table import Table

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_mhc.command_line import (  # noqa: E402
    above_zero,
    as_given,
    at_least,
    check_folder,
    run_tool,
)
from megatron_mhc.errors import UserError  # noqa: E402
from megatron_mhc.micro_batch_groups import GROUP, check_groups  # noqa: E402
from megatron_mhc.report.console import table_console  # noqa: E402
from megatron_mhc.report.pipeline_estimate import MODES, Cluster  # noqa: E402
from megatron_mhc.report.pipeline_results import COLUMNS, markdown, rows  # noqa: E402
from megatron_mhc.report.timeline import draw_timelines  # noqa: E402
from megatron_mhc.report.trace import Kernel, chrome_trace  # noqa: E402

WORKER = Path(__file__).resolve().with_name("benchmark_pipeline_worker.py")
CASES = (
    *("plain", "none", "post", "nccl", "late", "shared", "sends"),
    *("plain-kept", "none-kept", "plain-free"),
    *("none+recompute", "post+recompute"),
)
LINKS = {"nvlink": {}, "host": {"NCCL_P2P_DISABLE": "1"}}
"""Name of a link to the environment that makes NCCL use it."""
RANKS = 2
ESTIMATED = ("stages", "link", "forward_ms")
MEASURED = (
    *("out", "cases", "links", "layers", "ffn", "vocabulary", "steps", "trace", "no_single"),
    *("no_profile", "recompute_layer_num", "nccl_p2p_channels"),
)
"""Flags that are of --estimate only, and those that are not of it."""


def check_chunks(args) -> None:
    """That Megatron's interleaved schedule takes the micro-batches in these groups.

    Raises:
        UserError: it does not.
    """
    stages, most = (args.stages, args.chunks[0]) if args.estimate else (RANKS, max(args.chunks))
    if most > 1:
        given = f"--micro-batches {args.micro_batches}"
        check_groups(args.group or stages, stages, args.micro_batches, given)
    elif args.group:
        raise UserError(f"{GROUP} {args.group}: only chunks have groups; give --chunks 2 or more")


def check_mode(parser: argparse.ArgumentParser, args) -> None:
    """That every flag given is one of the mode, --estimate or a measurement.

    Raises:
        UserError: one is not.
    """
    names, remedy = ESTIMATED, "has no effect without --estimate; add it, or leave this out"
    if args.estimate:
        names, remedy = MEASURED, "has no effect with --estimate; leave one of them out"
    for name in names:
        value = getattr(args, name)
        if value != parser.get_default(name):
            raise UserError(f"{as_given('--' + name.replace('_', '-'), value)}: {remedy}")
    if args.estimate and args.chunks and len(args.chunks) > 1:
        given = as_given("--chunks", args.chunks)
        raise UserError(f"{given}: --estimate is of one pipeline; give one number")


def estimate(args) -> None:
    """Print the paper model's step for a cluster."""
    cluster = Cluster(
        stages=args.stages,
        chunks=args.chunks[0],
        micro_batches=args.micro_batches,
        channels=args.hidden,
        streams=args.streams,
        tokens=args.length * args.micro_batch,
        link=args.link,
        forward_ms=args.forward_ms,
        group=args.group,
    )
    table = Table(
        title=f"{cluster.stages} stages x {cluster.chunks} chunks, {cluster.micro_batches} "
        f"micro-batches of {cluster.tokens} tokens, C {cluster.channels}, n {cluster.streams}, "
        f"{cluster.link:g} GB/s, chunk forward {cluster.forward_ms:g} ms"
    )
    for heading in ("case", "transfer ms", "compute ms", "bubble ms", "exposed ms", "% of step"):
        table.add_column(heading)
    for mode in MODES:
        exposed, step = cluster.exposed_ms(mode), cluster.step_ms(mode)
        values = (cluster.transfer_ms(mode), cluster.compute_ms, cluster.bubble_ms, exposed)
        share = f"{100 * exposed / step:.2f}"
        table.add_row(mode, *(f"{value:.2f}" for value in values), share)
    table_console().print(table)


def settings_of(args, link: str) -> dict:
    """What a worker is told; the cases in the order in which they matter."""
    single = []
    if link == args.links[0] and not args.no_single:
        recomputed = any("+recompute" in case for case in args.cases)
        alone = ("plain", "none", "none+recompute") if recomputed else ("plain", "none")
        single = [(case, 1, 1) for case in alone]
    staged = [(case, RANKS, chunks) for chunks in args.chunks for case in args.cases]
    return {
        "link": link,
        "p2p_channels": args.nccl_p2p_channels,
        "cases": [*single, *staged],
        "first": link == args.links[0],
        "trace": args.trace,
        "profile": not args.no_profile,
        **{
            name: getattr(args, name)
            for name in ("layers", "hidden", "ffn", "streams", "vocabulary", "length")
        },
        "recompute_layer_num": args.recompute_layer_num,
        "micro_batch": args.micro_batch,
        "micro_batches": args.micro_batches,
        "group": args.group,
        "steps": args.steps,
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start_workers(args, link: str) -> list[subprocess.Popen]:
    """The ranks of one link, importing and waiting for their turn."""
    port = free_port()
    channels = args.nccl_p2p_channels
    limits = {"NCCL_MAX_P2P_NCHANNELS": str(channels)} if channels else {}
    workers = []
    for rank in range(RANKS):
        environment = {
            "CUDA_DEVICE_MAX_CONNECTIONS": "32",  # with 1, streams share a queue
            "NCCL_NVLS_ENABLE": "0",
            **os.environ,
            **LINKS[link],
            **limits,
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(RANKS),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        with open(args.out / f"{link}.{rank}.log", "w") as log:
            command = [sys.executable, str(WORKER), json.dumps(settings_of(args, link))]
            workers.append(
                subprocess.Popen(
                    [*command, str(args.out)],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
    return workers


def run_workers(args, link: str, workers: list[subprocess.Popen]) -> None:
    """Let the ranks of one link run to their end.

    Raises:
        UserError: one of them failed; with the end of its log.
    """
    for worker in workers:
        with contextlib.suppress(BrokenPipeError):  # it has failed already; its log says why
            worker.stdin.write("\n")
            worker.stdin.flush()
    while any(worker.poll() is None for worker in workers):
        failed = [rank for rank, worker in enumerate(workers) if worker.poll()]
        if failed:
            break
        time.sleep(0.2)
    for rank, worker in enumerate(workers):
        if worker.poll():
            tail = (args.out / f"{link}.{rank}.log").read_text()[-4000:]
            raise UserError(f"rank {rank} on link {link} failed:\n{tail}")


def wait_until_loaded(args, workers: dict[str, list[subprocess.Popen]]) -> None:
    """Returns when no import is left that could disturb a step."""
    for link, ranks in workers.items():
        for rank, worker in enumerate(ranks):
            log = args.out / f"{link}.{rank}.log"
            while "loaded" not in log.read_text() and worker.poll() is None:
                time.sleep(0.2)


def finish_traces(folder: Path) -> None:
    """From the workers' kernels to Chrome traces and a picture for each link."""
    steps: dict[str, dict[str, list[Kernel]]] = {}
    for path in sorted(folder.glob("trace-*.json")):
        kernels = [Kernel(*fields) for fields in json.loads(path.read_text())]
        _, link, case = path.stem.split("-", 2)
        steps.setdefault(link, {})[case] = kernels
        with gzip.open(path.with_suffix(".json.gz"), "wt") as file:
            json.dump(chrome_trace(kernels), file)
        path.unlink()
    for link, cases in steps.items():
        draw_timelines(cases, folder / f"pipeline-{link}.png")


def written_at(file: Path) -> int | None:
    """When it was, in nanoseconds; None before there is one."""
    return file.stat().st_mtime_ns if file.exists() else None


def measure(args) -> None:
    # A run that is cut short, by timeout or a scheduler, reports what it has.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for chunks in args.chunks:
        if args.layers % (RANKS * chunks):
            raise UserError(
                f"--chunks {chunks}: --layers {args.layers} is no multiple of {RANKS * chunks}, "
                f"of {RANKS} stages with {chunks} chunks each"
            )
    check_folder(args.out, f"--out {args.out}")
    args.out.mkdir(parents=True, exist_ok=True)
    results_file = args.out / "pipeline.jsonl"
    earlier = written_at(results_file)
    workers = {link: start_workers(args, link) for link in args.links}
    try:
        wait_until_loaded(args, workers)
        for link, ranks in workers.items():
            run_workers(args, link, ranks)
    finally:
        for worker in (worker for ranks in workers.values() for worker in ranks):
            if worker.poll() is None:
                worker.kill()
            worker.wait()
        if written_at(results_file) != earlier:
            report(args, results_file)


def report(args, results_file: Path) -> None:
    """What there is, also of a run that was cut short."""
    settings = settings_of(args, args.links[0])
    results = [json.loads(line) for line in results_file.read_text().splitlines()]
    (args.out / "pipeline.md").write_text(markdown(results, settings))
    finish_traces(args.out)
    table = Table(*COLUMNS)
    for row in rows(results, settings):
        table.add_row(*row)
    table_console().print(table)


def case_name(text: str) -> str:
    """A case of the command line.

    Raises:
        ArgumentTypeError: there is no such case.
    """
    base, _, ctas = text.partition("@")
    limited = ctas.isdecimal() and base == "nccl"
    if base not in CASES or ("@" in text and not limited):
        raise argparse.ArgumentTypeError(f"{text} is none of {', '.join(CASES)} and nccl@N")
    return text


def main() -> None:
    number = at_least(1)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="folder for results and logs")
    parser.add_argument("--cases", nargs="+", type=case_name, default=CASES, help="in this order")
    parser.add_argument("--recompute-layer-num", type=number, help="of +recompute; default: eq. 20")
    parser.add_argument(
        "--nccl-p2p-channels", type=number, help="NCCL_MAX_P2P_NCHANNELS of all cases"
    )
    parser.add_argument("--chunks", nargs="+", type=number, help="[2 1 4; of --estimate 2]")
    parser.add_argument("--links", nargs="+", choices=LINKS, default=list(LINKS))
    parser.add_argument("--layers", type=number, default=8)
    parser.add_argument("--hidden", type=number, default=4096)
    parser.add_argument("--ffn", type=number, default=11008)
    parser.add_argument("--streams", type=number, default=4)
    parser.add_argument("--vocabulary", type=number, default=2048, help="small: stages stay equal")
    parser.add_argument("--length", type=number, default=4096, help="tokens of a sequence")
    parser.add_argument("--micro-batch", type=number, default=2, help="sequences")
    parser.add_argument("--micro-batches", type=number, default=8)
    parser.add_argument(
        GROUP, type=int, default=0, dest="group", help="Megatron's; default: the number of stages"
    )
    parser.add_argument("--steps", type=number, default=6, help="timed steps")
    parser.add_argument("--trace", action="store_true", help="of every staged case")
    parser.add_argument("--no-single", action="store_true", help="leave the models of one GPU out")
    parser.add_argument("--no-profile", action="store_true", help="step times only")
    parser.add_argument("--estimate", action="store_true", help="the model on paper, no GPU")
    parser.add_argument("--stages", type=at_least(2), default=2, help="of --estimate")
    parser.add_argument("--link", type=above_zero, default=50.0, help="GB/s of --estimate")
    parser.add_argument(
        "--forward-ms", type=above_zero, default=10.0, help="chunk's, of --estimate"
    )
    args = parser.parse_args()
    check_mode(parser, args)
    args.chunks = args.chunks or ([2] if args.estimate else [2, 1, 4])
    check_chunks(args)
    if args.estimate:
        estimate(args)
    elif args.out is None:
        raise UserError("--out: a folder for the results is needed, or --estimate")
    else:
        measure(args)


if __name__ == "__main__":
    run_tool(main)
