"""tools/convert_checkpoint.py: what it prints, and what it refuses."""

import logging
import runpy
import sys
import warnings
from pathlib import Path

import pytest
from converted import write_llama

from megatron_mhc.conversion import verify

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def call(monkeypatch, capsys):
    def called(*words) -> tuple[int, str, str]:
        name = "convert_checkpoint.py"
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        code = 0
        try:
            with warnings.catch_warnings():
                runpy.run_path(str(ROOT / "tools" / name), run_name="__main__")
        except SystemExit as ended:
            code = ended.code
        finally:
            logging.disable(logging.NOTSET)
        return (code, *capsys.readouterr())

    return called


def test_both_ways(call, tmp_path):
    llama, settings = write_llama(tmp_path / "llama"), "--mhc --mhc-sinkhorn-iterations 7"
    words = ["to-megatron", "--hf", llama, "--out", tmp_path / "start", "--verify"]
    code, out, _ = call(*words, *settings.split())
    assert code == 0
    assert f"--pretrained-checkpoint {tmp_path / 'start'} --num-layers 2" in out
    assert "--mhc --mhc-num-residual-streams 4 --mhc-sinkhorn-iterations 7" in out
    assert "tensors, listed in conversion_report" in out
    assert "relative" in out
    words = ["to-hf", "--load", tmp_path / "start", "--out", tmp_path / "back", "--verify"]
    code, out, _ = call(*words)
    assert code == 0
    assert "tensors, listed in conversion_report" in out
    assert "relative" in out


def test_a_result_that_computes_something_else_is_an_error(call, tmp_path, monkeypatch):
    differs = verify.Comparison(64, 1.0, 0.5, 0.1)
    monkeypatch.setattr(verify, "compare", lambda *_: differs)
    words = ["--hf", write_llama(tmp_path / "llama"), "--out", tmp_path / "out", "--verify"]
    code, _, said = call("to-megatron", *words)
    assert code == 2
    assert "does not compute what it was made from; do not use it" in said


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            "--mhc-eps 0.1",
            "--mhc-eps 0.1: has no effect without --mhc; add --mhc or leave it out",
        ),
        ("--mhc --mhc-eps 0.5", "--mhc-eps 0.5: expected 0 <= eps"),
        ("--mhc --mhc-num-residual-streams 1", "--mhc-num-residual-streams 1: is the plain"),
        ("", "there is no nowhere/config.json; give a folder of save_pretrained"),
    ],
)
def test_bad_input_is_one_line(call, words, message, tmp_path):
    code, _, said = call("to-megatron", "--hf", "nowhere", "--out", tmp_path / "x", *words.split())
    assert code == 2
    assert f"error: {message}" in said.replace("--hf nowhere: ", "")
    assert not (tmp_path / "x").exists()
