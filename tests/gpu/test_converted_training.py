"""A Transformer Engine training in bf16 goes out to Hugging Face and on from there."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_checkpoint import train

pytest.importorskip("safetensors")
pytest.importorskip("transformers.models.deepseek_v4")
pytest.importorskip("transformer_engine.pytorch")
pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

TOOL = Path(__file__).resolve().parents[2] / "tools" / "convert_checkpoint.py"
ONE_STEP = ("--exit-interval", "1", "--save-interval", "1")


def convert(*words) -> None:
    command = [sys.executable, TOOL, *map(str, words), "--verify"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]


def test_it_computes_the_same_and_a_training_goes_on(tmp_path):
    train("--save", tmp_path / "trained", *ONE_STEP)
    convert("to-hf", "--load", tmp_path / "trained", "--out", tmp_path / "hf")
    convert("to-megatron", "--hf", tmp_path / "hf", "--out", tmp_path / "start")
    train("--pretrained-checkpoint", tmp_path / "start", "--save", tmp_path / "on", *ONE_STEP)
    convert("to-hf", "--load", tmp_path / "on", "--out", tmp_path / "again")
    reports = [
        json.loads((tmp_path / name / "conversion_report.json").read_text())["tensors"]
        for name in ("hf", "again")
    ]
    assert len(reports[0]) > 30
    assert reports[0] == reports[1]
