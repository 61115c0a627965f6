"""The receiving end of the copy transport: slots that a neighbour copies into.

Each slot has a word in the device's memory, written behind the copy into it: how often it was
filled. A file in memory, which both processes map, holds what their hosts need to know: which slot
each message went to, and how often each slot was given back.
"""

import mmap
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ALIGNMENT = 512
"""Bytes, of slots and of the words behind them."""
POLL = 2e-5
"""Seconds between two looks at a word of the other process."""
FOLDER = "/dev/shm"
WORD = 4


class NeighbourLost(RuntimeError):
    """A neighbour did not do its part in time."""


@dataclass(frozen=True)
class Address:
    """What the sender must know of an inbox; it travels between processes.

    Attributes:
        handle: of the slots' memory. path: of the file. slots: their number. size: bytes of each.
        releases: how many words say how often a slot was given back.
    """

    handle: bytes
    path: str
    slots: int
    size: int
    releases: int

    @property
    def filled(self) -> int:
        """Where the slots' words begin in their memory."""
        return self.slots * self.size

    @property
    def letters(self) -> int:
        """Numbers of slots that the file has room for: more messages are never on their way."""
        return 2 * self.slots

    @property
    def released(self) -> int:
        """Where the words of releases begin in the file."""
        return 8 * self.letters

    @property
    def file_bytes(self) -> int:
        return self.released + WORD * self.slots * self.releases


def wait_until(holds: Callable[[], bool], seconds: float, what: str) -> None:
    """Wait on the host until ``holds()``.

    Raises:
        NeighbourLost: it did not within ``seconds``.
    """
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            raise NeighbourLost(f"pipeline: {what} for {seconds:.0f} s")
        time.sleep(POLL)


class _Lease:
    """A message that somebody still holds; its slot is given back with it."""

    def __init__(self, give_back: Callable[[], None]) -> None:
        self._give_back = give_back

    def __del__(self) -> None:
        self._give_back()


class Inbox:
    """Slots for the messages of one neighbour and kind.

    A slot is given back when the last tensor of its message is gone: by every stream that may have
    read it, behind what that stream holds then.

    Args:
        engine: a CopyEngine.
        slots, size: their number, and the bytes of one message.
        streams: what may read a message beside the stream that waited for it.
        seconds: how long the host waits for the neighbour's host.
    """

    def __init__(self, engine, slots: int, size: int, streams: tuple, seconds: float) -> None:
        size = -(-size // ALIGNMENT) * ALIGNMENT
        self._engine = engine
        self._streams = streams
        self._seconds = seconds
        self._memory = engine.allocate(slots * size + max(ALIGNMENT, WORD * slots))
        handle = engine.share(self._memory)
        file, path = tempfile.mkstemp(prefix="megatron-mhc-", dir=FOLDER)
        self.address = Address(handle, path, slots, size, len(streams) + 1)
        try:
            os.ftruncate(file, self.address.file_bytes)
            self._file = mmap.mmap(file, self.address.file_bytes)
            self._words = engine.map_words(self._file)
        except (RuntimeError, OSError):
            self.close_file()
            raise
        finally:
            os.close(file)
        self._letters = memoryview(self._file)[: self.address.released].cast("Q")
        self._received = 0
        self._filled = [0] * slots

    def receive(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The next message: the host waits until it was sent, the current stream until it is there.

        Raises:
            NeighbourLost: it was not sent in time.
        """
        number = self._received + 1
        place = self._received % self.address.letters
        # A letter is one aligned word, so a host never sees half of it: number << 32 | slot.
        wait_until(
            lambda: self._letters[place] >> 32 == number,
            self._seconds,
            "a stage waited for what its neighbour sends",
        )
        self._received = number
        slot = self._letters[place] & 0xFFFFFFFF
        self._filled[slot] += 1
        count = self._filled[slot]
        self._engine.wait(self._memory + self.address.filled + WORD * slot, count)
        reader = self._engine.current_stream()
        lease = _Lease(lambda: self._give_back(slot, count, (reader, *self._streams)))
        return self._engine.tensor(self._memory + slot * self.address.size, shape, dtype, lease)

    def _give_back(self, slot: int, count: int, streams: tuple) -> None:
        first = self._words + self.address.released + WORD * slot * self.address.releases
        for place, stream in enumerate(streams):
            self._engine.write(first + WORD * place, count, stream)

    def close_file(self) -> None:
        """Take the file's name away: called when the neighbour has opened it."""
        os.unlink(self.address.path)


class Outlet:
    """The sending end of a neighbour's inbox.

    Args:
        engine: a CopyEngine.
        address: the neighbour's.
        kind: "activation" or "gradient".
        seconds: how long the host waits for a slot.
    """

    def __init__(self, engine, address: Address, kind: str, seconds: float) -> None:
        self._engine = engine
        self._address = address
        self._kind = kind
        self._seconds = seconds
        self._memory = engine.open(address.handle)
        with open(address.path, "r+b") as file:
            self._file = mmap.mmap(file.fileno(), address.file_bytes)
        view = memoryview(self._file)
        self._letters = view[: address.released].cast("Q")
        self._released = view[address.released :].cast("I")
        self._sent = 0
        self._filled = [0] * address.slots

    def _free(self) -> int | None:
        """A slot that nobody reads any more."""
        for slot, count in enumerate(self._filled):
            first = slot * self._address.releases
            words = self._released[first : first + self._address.releases]
            if all(word == count for word in words):
                return slot
        return None

    def send(self, tensor: Tensor):
        """Copy ``tensor``, contiguous, behind what the current stream holds.

        Where all slots are in use the host waits for one.

        Returns:
            A handle with ``wait()`` and ``is_completed()``.

        Raises:
            NeighbourLost: no slot was given back in time.
        """
        if not tensor.is_contiguous() or tensor.nbytes > self._address.size:
            raise ValueError(
                f"a message of shape {tuple(tensor.shape)}, strides {tensor.stride()}, "
                f"{tensor.nbytes} bytes: expected a contiguous one of at most {self._address.size}"
            )
        wait_until(
            lambda: self._free() is not None,
            self._seconds,
            f"all {self._address.slots} slots of a neighbour were in use",
        )
        slot = self._free()
        self._filled[slot] += 1
        handle = self._engine.copy(
            tensor,
            self._memory + slot * self._address.size,
            self._memory + self._address.filled + WORD * slot,
            self._filled[slot],
            self._kind,
        )
        place = self._sent % self._address.letters
        self._sent += 1
        self._letters[place] = self._sent << 32 | slot
        return handle
