"""Bytes of tensors that are alive on the CPU, now and at most: what a GPU's allocator would say."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts the storages that operators make inside the block, each for as long as it lives.

    Attributes:
        now, peak: bytes. Storages that were there before the block do not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def ignore(self, *tensors: torch.Tensor) -> None:
        """Storages that were there before."""
        for tensor in tensors:
            self._note(tensor, counted=False)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.ignore(*(a for a in tree_leaves((args, kwargs)) if isinstance(a, torch.Tensor)))
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor, counted=True)
        return result

    def _note(self, tensor: torch.Tensor, counted: bool) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self._alive:
            return

        def died(_):
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, died)
        self.now += size
        self.peak = max(self.peak, self.now)
