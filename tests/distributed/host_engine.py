"""A CopyEngine without a GPU: memory that processes share, copied and waited for by the host."""

import ctypes
import math
import mmap
import os
import tempfile
import time

import torch

LONGEST_WAIT = 60


class Over:
    """The handle of a copy, which is over at once."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


def address_of(memory) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


class HostEngine:
    """The names of CopyEngine; memory is a file that its path is the handle of."""

    def __init__(self) -> None:
        self._paths: dict[int, str] = {}
        self._kept: list = []

    def allocate(self, count: int) -> int:
        file, path = tempfile.mkstemp(prefix="host-engine-", dir="/dev/shm")
        os.ftruncate(file, count)
        memory = mmap.mmap(file, count)
        os.close(file)
        self._kept.append(memory)
        address = address_of(memory)
        self._paths[address] = path
        return address

    def share(self, address: int) -> bytes:
        return self._paths[address].encode()

    def open(self, handle: bytes) -> int:
        with open(handle, "r+b") as file:
            memory = mmap.mmap(file.fileno(), 0)
        os.unlink(handle)
        self._kept.append(memory)
        return address_of(memory)

    def map_words(self, words: mmap.mmap) -> int:
        return address_of(words)

    def copy(self, source, target: int, word: int, value: int, kind: str) -> Over:
        ctypes.memmove(target, source.data_ptr(), source.nbytes)
        self.write(word, value)
        return Over()

    def write(self, word: int, value: int, stream=None) -> None:
        ctypes.c_uint32.from_address(word).value = value

    def wait(self, word: int, value: int) -> None:
        end = time.monotonic() + LONGEST_WAIT
        while ctypes.c_uint32.from_address(word).value < value:
            assert time.monotonic() < end, "what was announced never came"

    def current_stream(self) -> None:
        return None

    def tensor(self, address: int, shape, dtype, owner) -> torch.Tensor:
        memory = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
        memory.owner = owner
        return torch.frombuffer(memory, dtype=dtype).view(shape)
