"""A training whose forward and backward passes are one CUDA graph has an eager one's bits."""

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

STEPS = 8
FLAGS = shlex.split(f"""--mhc --bf16 --use-distributed-optimizer
    --dist-ckpt-optim-fully-reshardable --transformer-impl transformer_engine
    --no-gradient-accumulation-fusion --te-rng-tracker --no-check-for-nan-in-loss-and-grad
    --num-layers 3 --hidden-size 256 --num-attention-heads 4 --ffn-hidden-size 512 --swiglu
    --normalization RMSNorm --disable-bias-linear --untie-embeddings-and-output-weights
    --position-embedding-type rope --seq-length 128 --max-position-embeddings 128
    --micro-batch-size 2 --global-batch-size 4 --train-iters {STEPS} --save-interval {STEPS}
    --lr 1e-3 --hidden-dropout 0 --attention-dropout 0 --mock-data --split 90,5,5
    --tokenizer-type NullTokenizer --vocab-size 257 --no-create-attention-mask-in-dataloader
    --log-interval 1 --logging-level 20 --eval-interval 4 --eval-iters 5""")
GRAPH = ("--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", "2")


def start(*flags):
    return subprocess.Popen(
        [sys.executable, SCRIPT, *FLAGS, *map(str, flags)],
        env={**os.environ, "NVTE_ALLOW_NONDETERMINISTIC_ALGO": "0"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--mhc-recompute",),
        ("--fp8-format", "hybrid", "--fp8-recipe", "tensorwise"),
        ("--hidden-dropout", "0.1", "--attention-dropout", "0.1"),
        ("--overlap-grad-reduce", "--overlap-param-gather"),
        ("--recompute-granularity", "full", "--recompute-method", "uniform")
        + ("--recompute-num-layers", "1"),
    ],
    ids=["bf16", "recompute", "fp8", "dropout", "overlap", "full recompute"],
)
def test_it_has_the_bits_of_an_eager_one(tmp_path, flags):
    runs = {"eager": start(*flags, "--save", tmp_path / "eager")}
    runs["graph"] = start(*flags, *GRAPH, "--save", tmp_path / "graph")
    logs = {name: run.communicate(timeout=240)[0] for name, run in runs.items()}
    for name, run in runs.items():
        assert run.returncode == 0, logs[name][-6000:]
    assert "CUDA graph: after 2 steps, forward and backward pass of a step are one" in logs["graph"]
    # One graph of two micro-batches, forward and backward, and one of an evaluation's.
    for stage in "training", "validation":
        assert f"CUDA graph capture done for {stage}" in logs["graph"]
    expected, found = (saved_tensors(tmp_path / name, STEPS) for name in runs)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    losses = {
        name: [line.split("|")[1:] for line in log.splitlines() if "lm loss value" in line]
        for name, log in logs.items()
    }
    assert len(losses["eager"]) >= 2
    assert losses["graph"] == losses["eager"], "validation"
