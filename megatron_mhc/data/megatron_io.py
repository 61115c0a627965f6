"""megatron.core's indexed dataset, imported late and quietly, and its files joined."""

import functools
import gc
import logging
import warnings
from collections.abc import Iterable
from types import ModuleType
from typing import Any


@functools.cache
def indexed_dataset() -> ModuleType:
    """The module ``megatron.core.datasets.indexed_dataset``.

    The import takes seconds, so only a run that writes pays for it, and it warns of a missing
    CUDA and Transformer Engine, neither of which has to do with writing files.
    """
    torch_log = logging.getLogger("torch.utils.cpp_extension")
    level = torch_log.level
    torch_log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from megatron.core.datasets import indexed_dataset
    finally:
        torch_log.setLevel(level)
    return indexed_dataset


def add_pairs(builder: Any, prefixes: Iterable[str]) -> None:
    """Append the pairs under ``prefixes`` to an ``IndexedDatasetBuilder``, in order."""
    # add_index collects garbage each time, and torch's many objects make that 0.2 s a call.
    gc.freeze()
    try:
        with warnings.catch_warnings():
            # It logs on rank 0 only and warns that a process alone has no rank.
            warnings.filterwarnings("ignore", message="Could not determine rank")
            for prefix in prefixes:
                builder.add_index(prefix)
    finally:
        gc.unfreeze()
