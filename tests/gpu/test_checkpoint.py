"""A bf16 training with the distributed optimizer and Transformer Engine goes on from a checkpoint.

On a CPU Megatron's distributed optimizer can be saved, not loaded (it needs TE's or Apex's Adam).
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "distributed"))

from training_runs import SCRIPT, saved_tensors

pytest.importorskip("transformer_engine.pytorch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

FLAGS = shlex.split("""--mhc --bf16 --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather --dist-ckpt-optim-fully-reshardable --no-gradient-accumulation-fusion
    --transformer-impl transformer_engine --num-layers 2 --hidden-size 256 --num-attention-heads 4
    --ffn-hidden-size 512 --swiglu --normalization RMSNorm --disable-bias-linear
    --untie-embeddings-and-output-weights --position-embedding-type rope --seq-length 128
    --max-position-embeddings 128 --micro-batch-size 2 --global-batch-size 4 --train-iters 6
    --save-interval 3 --lr 1e-3 --hidden-dropout 0 --attention-dropout 0 --mock-data --split 90,5,5
    --tokenizer-type NullTokenizer --vocab-size 257 --no-create-attention-mask-in-dataloader
    --log-interval 1 --eval-interval 1000 --eval-iters 1""")


def train(*flags):
    done = subprocess.run(
        [sys.executable, SCRIPT, *FLAGS, *map(str, flags)],
        env={**os.environ, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_it_ends_with_the_same_weights_and_optimizer(tmp_path):
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    train("--save", whole)
    train("--load", whole, "--ckpt-step", 3, "--save", resumed)
    expected, found = (saved_tensors(folder, 6) for folder in (whole, resumed))
    assert sum("hyper" in name for name in expected) == 4 * 3 * 3, "weight, master, two moments"
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
