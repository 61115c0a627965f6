#!/usr/bin/env python3
"""Pretrain a GPT with Megatron's own trainer, plain or with manifold-constrained hyper-connections.

Takes every flag of Megatron and the --mhc group. Without a GPU it runs on the CPU and says so.

    torchrun --nproc-per-node 8 examples/pretrain_gpt.py --mhc --num-layers 24 ...
"""

import os
import sys
import time
from pathlib import Path

START = time.time()
# From a bare checkout too, as Megatron's users run.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_mhc import environment  # noqa: E402
from megatron_mhc.errors import UserError  # noqa: E402


def main() -> None:
    environment.prepare()
    environment.set_single_process()
    # Megatron can be imported only now: environment.prepare() made that possible.
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.training import set_startup_timestamps

    from megatron_mhc.pretraining import datasets_provider, make_forward_step
    from megatron_mhc.startup import parse_arguments

    set_startup_timestamps(program_start=START, main_entry=time.time())
    config, slots = parse_arguments()
    datasets_provider.is_distributed = True
    model_type = ModelType.encoder_or_decoder
    pretrain(config, datasets_provider, model_type, make_forward_step(), **slots)
    if "p2p_communicator" in slots:
        slots["p2p_communicator"].drain()
    # Left to the interpreter's exit, gloo's threads now and then aborted a rank that had finished.
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except UserError as problem:
        # Once a node: what is missing may be missing on one of them.
        if problem.every_rank or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"pretrain_gpt.py: error: {problem}", file=sys.stderr)
        sys.exit(2)
