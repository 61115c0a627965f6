"""The wheel has the dataset helpers built and no Makefile, and Megatron exits without one."""

import importlib.util
from pathlib import Path

from .record import Patch


def _datasets_folder() -> Path:
    spec = importlib.util.find_spec("megatron.core.datasets")
    return Path(spec.submodule_search_locations[0])


def _why_not() -> str | None:
    return (
        "a source install, with its Makefile"
        if (_datasets_folder() / "Makefile").exists()
        else None
    )


def _build(original):
    def compile_helpers() -> None:
        try:
            importlib.import_module("megatron.core.datasets.helpers_cpp")
        except ImportError as error:
            raise RuntimeError(
                f"{_datasets_folder()} has neither helpers_cpp built nor a Makefile to build it: "
                "reinstall megatron-core from its wheel"
            ) from error

    return compile_helpers


PATCH = Patch(
    name="compile_helpers",
    target="megatron.core.datasets.utils:compile_helpers",
    reason="runs make in a folder that wheels ship without a Makefile, then exits, also on GPUs",
    tested={"0.19.2": "84029a50ae8cfac1"},
    build=_build,
    why_not=_why_not,
)
