#!/usr/bin/env python3
"""Bytes of activations of a training run, from its flags: plain, mHC, mHC with recompute.

    python tools/estimate_memory.py --num-layers 32 --hidden-size 4096 ...

takes the flags of examples/pretrain_gpt.py, as they are, and needs no GPU. What is counted, and
what is not, is in docs/memory.md.
"""

import argparse
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from megatron_mhc import environment  # noqa: E402
from megatron_mhc.errors import UserError  # noqa: E402


def main() -> None:
    environment.prepare()
    from megatron.training.arguments import add_megatron_arguments

    from megatron_mhc.arguments import add_mhc_args
    from megatron_mhc.config import MHCConfig
    from megatron_mhc.memory_report import report
    from megatron_mhc.report.console import table_console

    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    args = add_mhc_args(add_megatron_arguments(parser)).parse_args()
    streams = args.mhc_num_residual_streams or MHCConfig.num_streams
    table_console().print(report(args, streams, args.mhc_recompute_layer_num))


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        print(f"estimate_memory.py: error: {problem}", file=sys.stderr)
        sys.exit(2)
