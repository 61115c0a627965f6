#!/usr/bin/env python3
"""Turn Megatron checkpoints into Hugging Face folders and back; see docs/conversion.md.

python tools/convert_checkpoint.py to-hf --load runs/pretrain/checkpoints --out export
python tools/convert_checkpoint.py to-megatron --hf Llama-3.2-1B --out start --mhc
"""

import argparse
import importlib.util
import logging
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mhc import MHCConfig  # noqa: E402
from megatron_mhc.arguments import fill_in_defaults, mhc_config_from_args  # noqa: E402
from megatron_mhc.command_line import at_least, check_folder, run_tool  # noqa: E402
from megatron_mhc.errors import UserError  # noqa: E402


def parse() -> argparse.Namespace:
    """Read the command line; exits with 2 when it cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    export = commands.add_parser("to-hf", help="a Megatron checkpoint for transformers")
    export.add_argument("--load", type=Path, required=True, help="a training's --save folder")
    export.add_argument("--ckpt-step", type=at_least(0), help="its iteration; default: the latest")
    start = commands.add_parser("to-megatron", help="a Llama for --pretrained-checkpoint")
    start.add_argument("--hf", type=Path, required=True, help="a folder of save_pretrained")
    start.add_argument("--mhc", action="store_true", help="give a plain Llama residual streams")
    start.add_argument("--mhc-num-residual-streams", type=int, help="streams n [4]")
    start.add_argument("--mhc-sinkhorn-iterations", type=int, help="[20]")
    start.add_argument("--mhc-eps", type=float, help="[1e-6]")
    start.add_argument("--mhc-init-gating-factor", type=float, help="[0.01]")
    for command in (export, start):
        command.add_argument("--out", type=Path, required=True, help="a new folder")
        command.add_argument(
            "--verify",
            action="store_true",
            help="compare one forward pass of both, in float32 on the CPU",
        )
    return parser.parse_args()


def mhc_settings(args: argparse.Namespace) -> MHCConfig | None:
    """The settings of --mhc and its kin.

    Raises:
        UserError: names the flag, its value and what would be right.
    """
    fill_in_defaults(args)
    if not args.mhc:
        return None
    mhc = mhc_config_from_args(args)
    if mhc.num_streams < 2:
        raise UserError("--mhc-num-residual-streams 1: is the plain model; leave --mhc out")
    return mhc


def main() -> None:
    args = parse()
    missing = [
        name for name in ("safetensors", "transformers") if not importlib.util.find_spec(name)
    ]
    if missing:
        raise UserError(
            f"{' and '.join(missing)} not installed: pip install safetensors 'transformers>=5.17'"
        )
    check_folder(args.out.parent, f"--out {args.out}")
    # Megatron and torch tell what a training would lack here; a conversion needs none of it.
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    # Only now: these import transformers.
    from megatron_mhc.conversion import convert, verify

    if args.command == "to-hf":
        made = convert.to_hugging_face(args.load, args.out, args.ckpt_step)
    else:
        made = convert.to_megatron(args.hf, args.out, mhc_settings(args))
        print("train it with:", *convert.words(made))
    print(f"{args.out}: {made.tensors} tensors, listed in {convert.REPORT}")
    if args.verify:
        compared = verify.compare(made.megatron, made.hugging_face)
        print(compared)
        if not compared.same:
            raise UserError(
                f"--verify: {args.out} does not compute what it was made from; do not use it"
            )


if __name__ == "__main__":
    run_tool(main)
