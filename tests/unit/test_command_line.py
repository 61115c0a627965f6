"""What tools refuse before they begin, in one line: no GPU, no place for results, no such data."""

import argparse
import os
import runpy
import sys
from pathlib import Path

import pytest
import torch

from megatron_mhc.command_line import above_zero, at_least, check_folder
from megatron_mhc.errors import UserError

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    """Runs a tool in an empty folder without a GPU, where it is refused; returns what it said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.syspath_prepend(TOOLS)
    monkeypatch.chdir(tmp_path)
    Path("file").touch()

    def called(name: str, *flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *flags])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(TOOLS / name), run_name="__main__")
        assert ended.value.code == 2
        assert os.listdir() == ["file"]
        return capsys.readouterr().err

    return called


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("benchmark_kernels.py", ()),
        ("benchmark_compilation.py", ()),
        ("sweep_kernels.py", ()),
        ("benchmark_memory.py", ("--out", "new")),
    ],
)
def test_without_a_gpu(call, name, flags):
    said = "an NVIDIA GPU is needed, and PyTorch finds none here; run it where one is"
    assert call(name, *flags) == f"{name}: error: {said}\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("benchmark_kernels.py --out file", "--out file: file is a file, where a folder is"),
        ("benchmark_memory.py --out file", "--out file: file is a file, where a folder is"),
        ("benchmark_pipeline.py --out file", "--out file: file is a file, where a folder is"),
        (
            "benchmark_kernels.py --sizes 8192",
            "argument --sizes: 8192: expected tokens x channels, as 8192x",
        ),
        (
            "benchmark_kernels.py --sizes 0x64",
            "argument --sizes: 0x64: expected tokens x channels, as 8192x",
        ),
        (
            "benchmark_kernels.py --repetitions 0",
            "argument --repetitions: 0: expected a whole number, 1 or",
        ),
        (
            "benchmark_compilation.py --tokens 0",
            "argument --tokens: 0: expected a whole number, 1 or more",
        ),
        (
            "sweep_kernels.py --channels -1",
            "argument --channels: -1: expected a whole number, 1 or more",
        ),
        (
            "benchmark_memory.py --out new --steps 0",
            "argument --steps: 0: expected a whole number, 1 or",
        ),
        (
            "benchmark_memory.py --out new --cases fp8 --blocks 9",
            "--blocks 9: the case fp8 has 8 layers; use 1 to 8, or 0",
        ),
        (
            "benchmark_training.py --data nope --out new",
            "--data nope: there is no nope_train.bin; tools/prepare_data.py makes it",
        ),
        ("pretrain_small.py --data d --run new --steps 0", "argument --steps: 0: expected a whole"),
        ("benchmark_training.py --data d --out new --steps 50", "--steps 50: more than 50 are"),
        ("benchmark_training.py --data d --out new --hidden 100", "--hidden 100: expected a mult"),
        ("diagnose.py nowhere", "nowhere: there is no such folder; give a run's --tensorboard-dir"),
        ("diagnose.py file", "file: is a file; give a run's --tensorboard-dir"),
        ("diagnose.py . --plot .", "--plot .: is a folder; give a file in it, as gains.png"),
        ("diagnose.py . --plot x.foo", "--plot x.foo: expected a name that ends with .png"),
        ("diagnose.py . --plot file/x.png", "--plot file/x.png: "),
    ],
)
def test_what_cannot_be_is_refused(call, command, message):
    assert f"error: {message}" in call(*command.split())


def test_numbers_in_range():
    assert [at_least(0)("0"), at_least(2)("2"), above_zero("0.5")] == [0, 2, 0.5]
    for convert, text in (
        (at_least(2), "1"),
        (at_least(1), "-1"),
        (at_least(1), "few"),
        (above_zero, "inf"),
        (above_zero, "few"),
    ):
        with pytest.raises(argparse.ArgumentTypeError, match=f"^{text}: expected a "):
            convert(text)


def test_a_folder_that_can_be_made_is_not_made(tmp_path):
    check_folder(tmp_path / "new" / "one", "--out new/one")
    assert not list(tmp_path.iterdir())


def test_a_closed_folder_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=f"--out x: {tmp_path} cannot be written into; give anoth"):
        check_folder(tmp_path / "new", "--out x")
