#!/usr/bin/env python3
"""Train a small mHC GPT on prepared text, here: ``make pretrain`` and ``make compare``."""

import argparse
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console  # noqa: E402

from megatron_mhc.command_line import at_least, run_tool  # noqa: E402
from megatron_mhc.report.plots import draw_comparison, draw_run  # noqa: E402
from megatron_mhc.report.table import print_table  # noqa: E402
from megatron_mhc.small_run import MIXINGS, SmallRun, summary_line  # noqa: E402

console = Console()


def train(run: SmallRun) -> None:
    run.claim()
    if run.finished():
        console.print(
            f"{run.folder} is finished; for a new training, remove it or give another --run"
        )
        return
    console.print(f"$ {shlex.join(run.command())}", highlight=False, soft_wrap=True, style="dim")
    run.train(console)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="prefix given to prepare_data.py")
    parser.add_argument("--run", type=Path, required=True, help="folder for log and checkpoints")
    parser.add_argument("--steps", type=at_least(1), default=SmallRun.steps, help="[%(default)s]")
    parser.add_argument("--mixing", choices=MIXINGS, default=SmallRun.mixing, help="[%(default)s]")
    parser.add_argument(
        "--compare", action="store_true", help=f"train {', '.join(MIXINGS)} and draw them together"
    )
    args = parser.parse_args()

    mixings = MIXINGS if args.compare else (args.mixing,)
    runs = []
    for mixing in mixings:
        folder = args.run / mixing if args.compare else args.run
        runs.append(SmallRun(folder, args.data, mixing, args.steps))
    for run in runs:
        if args.compare:
            console.rule(run.mixing)
        train(run)

    plot = args.run / "training.png"
    if args.compare:
        curves = [run.report() for run in runs]
        draw_comparison(curves, plot)
        print_table(curves)
        print(f"mhc-compare: plot={plot}")
    else:
        draw_run(runs[0].report(), plot)
        print(summary_line(runs[0], plot))


if __name__ == "__main__":
    run_tool(main)
