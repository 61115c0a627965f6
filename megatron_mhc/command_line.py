"""What the tools share: numbers in range, a GPU, a folder for results, and errors of one line."""

import argparse
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path

from .errors import UserError


def at_least(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number from ``least`` on."""

    def number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text}: expected a whole number, {least} or more")
        return int(text)

    return number


def above_zero(text: str) -> float:
    """An argument's type: a finite number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text}: expected a number above 0")
    return value


def as_given(flag: str, value) -> str:
    """A flag with its value, as on a command line: a switch alone, a list's values in a row."""
    if isinstance(value, bool):
        return flag
    return " ".join(map(str, [flag, *(value if isinstance(value, list) else [value])]))


def check_folder(folder: Path, given: str) -> None:
    """That files can be written into ``folder`` once it is made; makes nothing.

    Args:
        given: the flag and its value, for errors.

    Raises:
        UserError: it is or lies in a file, or in a folder that is closed.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not there.is_dir():
        raise UserError(f"{given}: {there} is a file, where a folder is needed")
    if not os.access(there, os.W_OK | os.X_OK):
        raise UserError(f"{given}: {there} cannot be written into; give another folder")


def check_data(prefix: Path) -> None:
    """That the pairs of a prefix given to tools/prepare_data.py are there.

    Raises:
        UserError: names the file that is not.
    """
    for ending in ("train.bin", "train.idx", "valid.bin", "valid.idx"):
        file = Path(f"{prefix}_{ending}")
        if not file.is_file():
            raise UserError(f"--data {prefix}: there is no {file}; tools/prepare_data.py makes it")


def check_gpu() -> None:
    """Raises UserError where there is no NVIDIA GPU."""
    import torch

    if not torch.cuda.is_available():
        raise UserError("an NVIDIA GPU is needed, and PyTorch finds none here; run it where one is")


def run_tool(main: Callable[[], None]) -> None:
    """Runs a tool's main function; what it refuses is one line, and exit status 2."""
    try:
        main()
    except UserError as problem:
        print(f"{Path(sys.argv[0]).name}: error: {problem}", file=sys.stderr)
        sys.exit(2)
