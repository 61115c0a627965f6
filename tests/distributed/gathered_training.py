"""Runs a training script on the CPU with an attention that knows context parallelism.

    python gathered_training.py SCRIPT FLAGS...

Megatron's own would be refused.
"""

import runpy
import sys
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[2]))

from megatron_mhc import environment  # noqa: E402

environment.prepare()
# Megatron can be imported only now.
from gathered_attention import GatheredAttention  # noqa: E402
from megatron.core.models import backends  # noqa: E402

from megatron_mhc import startup  # noqa: E402

if __name__ == "__main__":
    backends.DotProductAttention = GatheredAttention
    startup.refuse_undivided_attention = lambda args: None  # it would refuse Megatron's
    sys.argv = sys.argv[1:]
    runpy.run_path(sys.argv[0], run_name="__main__")
