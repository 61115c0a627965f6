"""Memory by which the blocks of a launch draw tiles and exchange shares.

Every launch leaves it as the next one of its shape takes it (post_pre_hopper_groups.put): to clear
it would be a launch more, and one hundredth of a forward pass.
"""

from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from threading import Lock

import torch
from torch import Tensor

KEPT = 8  # states: the launches of a training step have two shapes, three with a head

_states: OrderedDict[tuple, Tensor] = OrderedDict()
"""By device, stream and shape: launches on several streams run at once."""
_lock = Lock()


def state_of(shape: tuple[int, ...], words: int, device: torch.device) -> Tensor:
    """Memory for a launch on the current stream: ``words`` int32, 0 or as the last launch left them
    there. shape: what distinguishes launches that cannot follow each other in the same memory.

    A CUDA graph may run on any stream: its launches have memory of their own, which it clears.
    """
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return torch.zeros(words, dtype=torch.int32, device=device)
        stream = torch._C._cuda_getCurrentRawStream(device.index)
    key = (device, stream, shape)
    with _lock:
        state = _states.get(key)
        if state is None:
            state = _states[key] = _new(words, device)
            if len(_states) > KEPT:
                _states.popitem(last=False)
        _states.move_to_end(key)
        return state


def _new(words: int, device: torch.device) -> Tensor:
    """By another thread: this one may allocate from a pool for a time, as when torch.compile
    prepares CUDA graphs, and what is kept must not lie there.
    """
    stream = torch.cuda.current_stream(device) if device.type == "cuda" else None

    def allocate() -> Tensor:
        with torch.cuda.stream(stream):
            return torch.zeros(words, dtype=torch.int32, device=device)

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(allocate).result()
