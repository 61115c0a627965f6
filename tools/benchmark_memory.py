#!/usr/bin/env python3
"""Peak activation memory and step time of plain, mHC and mHC + recompute layers on one GPU.

    python tools/benchmark_memory.py --out OUT_FOLDER [--cases standard wide ...] [--blocks 0 1 2]

One case is a TransformerBlock of Transformer Engine layers (rotary embeddings, bf16, no dropout,
no optimizer), forward and backward. Peak is torch.cuda.max_memory_allocated over a step, less what
was allocated before it: parameters and their gradients, which exist before the step, do not count.
The estimate beside it is megatron_mhc.activation_memory's. Busy is the time in which the GPU runs
anything during a step (torch.profiler): less than the step where it waits for the host. Graph is
the step captured as a CUDA graph and replayed, which the host cannot slow down (what
--cuda-graph-impl full_iteration does in a training). Writes memory.json and memory.md into the
output folder after every run.
"""

import argparse
import gc
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from kernel_timing import as_graph

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_mhc import MHCConfig, activation_memory, environment  # noqa: E402
from megatron_mhc.activation_memory import Stage  # noqa: E402
from megatron_mhc.command_line import at_least, check_folder, check_gpu, run_tool  # noqa: E402
from megatron_mhc.errors import UserError  # noqa: E402
from megatron_mhc.kernels import BACKENDS  # noqa: E402
from megatron_mhc.recompute_blocks import best_block_layers  # noqa: E402
from megatron_mhc.report.trace import busy_us, profile_step  # noqa: E402


@dataclass(frozen=True)
class Case:
    """One model: ``groups`` key-value heads, ``streams`` residual streams."""

    hidden: int
    ffn: int
    heads: int
    groups: int
    layers: int = 16
    tokens: int = 8192
    streams: int = 4
    gated: bool = True
    fp8: str | None = None

    @property
    def stage(self) -> Stage:
        channels = self.hidden // self.heads
        return Stage(
            layers=self.layers,
            tokens=self.tokens,
            hidden=self.hidden,
            ffn=self.ffn,
            query=self.hidden,
            key_value=self.groups * channels,
            heads=self.heads,
            gated=self.gated,
            fp8=self.fp8 is not None,
        )


CASES = {
    "standard": Case(hidden=4096, ffn=14336, heads=32, groups=8),
    "multi-head-gelu": Case(hidden=4096, ffn=16384, heads=32, groups=32, layers=12, gated=False),
    "small": Case(hidden=2560, ffn=6912, heads=20, groups=4, layers=24),
    "two-streams": Case(hidden=2048, ffn=8192, heads=16, groups=16, tokens=16384, streams=2),
    "fp8": Case(hidden=4096, ffn=14336, heads=32, groups=8, layers=8, fp8="tensorwise"),
}
LENGTH = 4096
"""Tokens of a sequence; the batch is what remains."""


def build(case: Case, mhc: MHCConfig | None):
    """The block, in bf16, every gradient allocated."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
    from megatron.core.transformer import TransformerConfig
    from megatron.core.transformer.transformer_block import TransformerBlock

    from megatron_mhc import get_mhc_block_spec
    from megatron_mhc.block import MHCTransformerBlock

    config = TransformerConfig(
        num_layers=case.layers,
        hidden_size=case.hidden,
        ffn_hidden_size=case.ffn,
        num_attention_heads=case.heads,
        num_query_groups=case.groups,
        normalization="RMSNorm",
        gated_linear_unit=case.gated,
        activation_func=torch.nn.functional.silu if case.gated else torch.nn.functional.gelu,
        bias_activation_fusion=case.gated,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        **({} if case.fp8 is None else {"fp8": "hybrid", "fp8_recipe": case.fp8}),
    )
    spec = get_gpt_layer_with_transformer_engine_spec()
    if mhc is None:
        block = TransformerBlock(config, spec)
    else:
        block = MHCTransformerBlock(config, get_mhc_block_spec(config, spec, mhc))
    block = block.cuda().bfloat16().train()
    for parameter in block.parameters():
        parameter.grad = torch.zeros_like(parameter)
    return block


def milliseconds(step, steps: int) -> float:
    """Median of ``steps`` steps, between events."""
    times = []
    for _ in range(steps):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times)


def measure(case: Case, mhc: MHCConfig | None, steps: int) -> dict[str, float]:
    """Peak bytes of a step over what was there before it, and milliseconds: of the step, of its
    replay as a CUDA graph, and in how many of a step the GPU is busy.
    """
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding

    block = build(case, mhc)
    batch = case.tokens // LENGTH
    angles = RotaryEmbedding(case.hidden // case.heads, rotary_percent=1.0)(LENGTH)
    h = torch.randn(LENGTH, batch, case.hidden, device="cuda", dtype=torch.bfloat16)
    h.requires_grad_()
    h.grad = torch.zeros_like(h)
    gradient = torch.randn_like(h)

    def step() -> None:
        output = block(h, attention_mask=None, rotary_pos_emb=angles)
        output.backward(gradient)

    for _ in range(3):
        step()
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ms = milliseconds(step, steps)
    peak = torch.cuda.max_memory_allocated() - before
    busy = busy_us(profile_step(step)) / 1e3
    replay = as_graph(step)
    replay()
    return {"peak": peak, "ms": ms, "busy": busy, "graph": milliseconds(replay, steps)}


def estimate(case: Case, block: int | None, plain: bool) -> float:
    if plain:
        return activation_memory.plain(case.stage).peak
    if block is None:
        return activation_memory.mhc(case.stage, case.streams).peak
    return activation_memory.recomputed(case.stage, case.streams, block).peak


def table(rows: list[dict]) -> str:
    lines = [
        "| case | run | peak MiB | over plain | estimate MiB | estimate / peak "
        "| ms / step | over plain | over mHC | busy ms | over plain | over mHC "
        "| graph ms | over plain | over mHC |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        beside = {other["run"]: other for other in rows if other["case"] == row["case"]}

        def over(run: str, key: str, row=row, beside=beside) -> str:
            return f"{row[key] / beside[run][key]:.3f}" if run in beside else "-"

        lines.append(
            f"| {row['case']} | {row['run']} | {row['peak'] / 2**20:.0f} | {over('plain', 'peak')} "
            f"| {row['estimate'] / 2**20:.0f} | {row['estimate'] / row['peak']:.3f} "
            f"| {row['ms']:.2f} | {over('plain', 'ms')} | {over('mHC', 'ms')} "
            f"| {row['busy']:.2f} | {over('plain', 'busy')} | {over('mHC', 'busy')} "
            f"| {row['graph']:.2f} | {over('plain', 'graph')} | {over('mHC', 'graph')} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder for results")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument(
        "--blocks",
        nargs="+",
        type=at_least(0),
        default=[0],
        help="layers to a block; 0: eq. 20 [0]",
    )
    parser.add_argument("--steps", type=at_least(1), default=10, help="steps to measure [10]")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="--mhc-backend [auto]")
    args = parser.parse_args()
    for name in args.cases:
        if max(args.blocks) > CASES[name].layers:
            raise UserError(
                f"--blocks {max(args.blocks)}: the case {name} has {CASES[name].layers} layers; "
                f"use 1 to {CASES[name].layers}, or 0"
            )
    check_folder(args.out, f"--out {args.out}")
    check_gpu()
    args.out.mkdir(parents=True, exist_ok=True)

    environment.prepare()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    from megatron_mhc import patches

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    model_parallel_cuda_manual_seed(1, use_cudagraphable_rng=True)
    patches.apply(flags=["--mhc-recompute"])

    rows = []
    for name in args.cases:
        case = CASES[name]
        best = best_block_layers(case.layers, case.streams)
        runs: list[tuple[str, bool, int | None]] = [("plain", True, None), ("mHC", False, None)]
        runs += [(f"mHC + recompute, N = {n or best}", False, n or best) for n in args.blocks]
        for run, plain, block in runs:
            mhc = None
            if not plain:
                mhc = MHCConfig(
                    num_streams=case.streams,
                    backend=args.backend,
                    recompute=block is not None,
                    recompute_layer_num=block,
                )
            measured = measure(case, mhc, args.steps)
            gc.collect()
            torch.cuda.empty_cache()
            expected = estimate(case, block, plain)
            rows.append({"case": name, "run": run, "estimate": expected} | measured)
            (args.out / "memory.json").write_text(json.dumps(rows, indent=1))
            (args.out / "memory.md").write_text(table(rows) + "\n")
            print(table(rows).splitlines()[-1], flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    run_tool(main)
