"""Looks at what is installed before Megatron is imported; errors here name what to install."""

import importlib.util
import os
import socket
from importlib import metadata
from pathlib import Path

from packaging.specifiers import SpecifierSet

from .errors import UserError

SUPPORTED_MEGATRON = SpecifierSet(">=0.19,<0.20")


class EnvironmentProblem(UserError):
    """Something that is, or is not, installed keeps Megatron from working here."""


def check_megatron() -> None:
    """The installed megatron-core is one that this package supports.

    Raises:
        EnvironmentProblem: it is missing, or its version is outside ``SUPPORTED_MEGATRON``.
    """
    remedy = f"pip install 'megatron-core{SUPPORTED_MEGATRON}'"
    try:
        version = metadata.version("megatron-core")
    except metadata.PackageNotFoundError:
        raise EnvironmentProblem(f"megatron-core is not installed: {remedy}") from None
    if version not in SUPPORTED_MEGATRON:
        raise EnvironmentProblem(
            f"megatron-core {version} is installed, {SUPPORTED_MEGATRON} is supported: {remedy}"
        )


def check_transformer_engine() -> None:
    """Transformer Engine is absent, or whole; half of it breaks Megatron's import.

    Raises:
        EnvironmentProblem: its Python files are there without its compiled libraries.
    """
    spec = importlib.util.find_spec("transformer_engine")
    if spec is None or not spec.submodule_search_locations:
        return
    folder = Path(spec.submodule_search_locations[0])
    places = (folder, folder.parent, folder / "wheel_lib")
    missing = [
        library
        for library in ("libtransformer_engine*.so", "transformer_engine_torch*.so")
        if not any(next(place.glob(library), None) for place in places)
    ]
    if missing:
        raise EnvironmentProblem(
            f"Transformer Engine in {folder} is half installed: no {' and no '.join(missing)}. "
            "Either pip install 'transformer-engine[pytorch]' anew, "
            "or pip uninstall transformer-engine and train with --transformer-impl local"
        )


def set_single_process() -> None:
    """Without a launcher this process is the whole job: set what torchrun would have set.

    For entry scripts only: processes that they start inherit it.

    Raises:
        EnvironmentProblem: this is one of several Slurm tasks, which no launcher joined.
    """
    if "RANK" in os.environ:
        return
    # Of srun's tasks alone: a batch script is one process, whatever SLURM_NTASKS says of its job.
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1":
        raise EnvironmentProblem(
            f"SLURM_STEP_NUM_TASKS {tasks}, but no RANK: each task would train alone. "
            "Start one task a node with torchrun, as examples/pretrain_slurm.sh does"
        )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    here = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**here, "MASTER_PORT": str(port)})


def prepare() -> None:
    """Make Megatron importable here: checks, and on a machine without a GPU the CPU stand-ins.

    Raises:
        EnvironmentProblem: names what is wrong and what to install.
    """
    check_megatron()
    check_transformer_engine()
    import torch

    if not torch.cuda.is_available():
        from . import cpu

        cpu.stand_in_for_cuda()
