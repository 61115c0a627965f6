#!/usr/bin/env python3
"""Print and draw the losses and gains of training runs, from their TensorBoard folders."""

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mhc.command_line import check_folder, run_tool  # noqa: E402
from megatron_mhc.errors import UserError  # noqa: E402
from megatron_mhc.report.curves import read_run  # noqa: E402
from megatron_mhc.report.plots import draw_comparison, draw_run  # noqa: E402
from megatron_mhc.report.table import print_table  # noqa: E402


def check_plot(path: Path) -> None:
    """That a picture can be written there.

    Raises:
        UserError: it is a folder, no PNG by its name, or where nothing can be written.
    """
    if path.is_dir():
        raise UserError(f"--plot {path}: is a folder; give a file in it, as {path / 'gains.png'}")
    if path.suffix.lower() != ".png":
        raise UserError(f"--plot {path}: expected a name that ends with .png")
    check_folder(path.parent, f"--plot {path}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="+", type=Path, metavar="FOLDER", help="--tensorboard-dir")
    parser.add_argument("--names", nargs="+", help="names for the runs, instead of the folders'")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw them into this file")
    args = parser.parse_args()
    names = args.names or [str(folder) for folder in args.runs]
    if len(names) != len(args.runs):
        raise UserError(f"--names: {len(names)} names for {len(args.runs)} runs")
    if args.plot:
        check_plot(args.plot)
    runs = [read_run(folder, name) for folder, name in zip(args.runs, names, strict=True)]
    print_table(runs)
    if args.plot:
        if len(runs) == 1:
            draw_run(runs[0], args.plot)
        else:
            draw_comparison(runs, args.plot)


if __name__ == "__main__":
    run_tool(main)
