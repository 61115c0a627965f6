#!/usr/bin/env python3
"""Bytes of activations of a training run, from its flags: plain, mHC, mHC with recompute.

    python tools/estimate_memory.py --num-layers 32 --hidden-size 4096 ...

takes the flags of examples/pretrain_gpt.py, as they are, and needs no GPU. What is counted, and
what is not, is in docs/memory.md.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_mhc import environment  # noqa: E402
from megatron_mhc.command_line import run_tool  # noqa: E402


def main() -> None:
    environment.prepare()
    from megatron_mhc.known_flags import unknown_flags
    from megatron_mhc.memory_report import make_parser, report, settings
    from megatron_mhc.report.console import table_console

    parser = make_parser(__doc__)
    args = parser.parse_args()
    mhc = settings(args)
    table_console().print(report(args, mhc.num_streams, mhc.recompute_layer_num))
    if unknown := unknown_flags(parser, args):
        print(f"Not in the estimate, which does not know what they do: {', '.join(unknown)}")


if __name__ == "__main__":
    run_tool(main)
