"""Copies between the GPUs of one host without a kernel: what the copy transport asks of CUDA.

A GPU's copy engines move memory over NVLink and take no SM. Words in memory, which streams write
and wait for, say what has arrived (cuStreamWriteValue32, cuStreamWaitValue32).
"""

import ctypes
import math
import mmap

import torch
from cuda.bindings import driver
from torch import Tensor

_GEQ = driver.CUstreamWaitValue_flags.CU_STREAM_WAIT_VALUE_GEQ
_PEER = driver.CUipcMem_flags.CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
_mapped: list[mmap.mmap] = []
"""What :meth:`CopyEngine.map_words` was given, until the process ends: streams may come late to
write there, and CUDA refuses other memory at an address that it knows.
"""


def _call(function, *arguments):
    """A function of CUDA's driver, its results without the status.

    Raises:
        RuntimeError: what the driver says.
    """
    status, *results = function(*arguments)
    if status != driver.CUresult.CUDA_SUCCESS:
        raise RuntimeError(f"{function.__name__}: {status.name}")
    return results[0] if results else None


class _Memory:
    """Bytes of the device as the CUDA array interface gives them to torch; keeps ``owner``."""

    def __init__(self, address: int, count: int, owner: object) -> None:
        self.owner = owner
        self.__cuda_array_interface__ = {
            "shape": (count,),
            "typestr": "|u1",
            "data": (address, False),
            "version": 3,
        }


class CopyEngine:
    """The current CUDA device, and the streams on which it copies.

    Every method must be called with that device current; addresses are those of CUDA's driver.

    Attributes:
        allocated: bytes that torch's statistics do not count.
    """

    def __init__(self) -> None:
        self.device = torch.device("cuda", torch.cuda.current_device())
        # Two engines: an activation does not queue behind a gradient.
        self.streams = {kind: torch.cuda.Stream() for kind in ("activation", "gradient")}
        self.allocated = 0

    def allocate(self, count: int) -> int:
        """``count`` bytes of zeros that other processes can open. They live as long as this one."""
        torch.cuda.empty_cache()  # what torch keeps for later nobody else can have
        try:
            address = _call(driver.cuMemAlloc, count)
        except RuntimeError as error:
            raise RuntimeError(f"{count / 2**30:.2f} GiB for messages: {error}") from None
        self.allocated += count
        _call(driver.cuMemsetD8, address, 0, count)
        torch.cuda.synchronize()
        return int(address)

    def share(self, address: int) -> bytes:
        """What :meth:`open` of another process takes."""
        return bytes(_call(driver.cuIpcGetMemHandle, address).reserved)

    def open(self, handle: bytes) -> int:
        """The address here of another process's memory."""
        shared = driver.CUipcMemHandle()
        shared.reserved = handle
        return int(_call(driver.cuIpcOpenMemHandle, shared, _PEER))

    def map_words(self, words: mmap.mmap) -> int:
        """The address at which this device writes into memory of the host; it stays mapped."""
        place = ctypes.addressof(ctypes.c_char.from_buffer(words))
        flags = driver.CU_MEMHOSTREGISTER_PORTABLE | driver.CU_MEMHOSTREGISTER_DEVICEMAP
        _call(driver.cuMemHostRegister, place, len(words), flags)
        _mapped.append(words)
        return int(_call(driver.cuMemHostGetDevicePointer, place, 0))

    def copy(self, source: Tensor, target: int, word: int, value: int, kind: str) -> "Copy":
        """Copy ``source`` behind what the current stream holds, then write ``value`` to ``word``.

        Args:
            source: contiguous, on this device; it must stay until the copy is over.
            target, word: addresses on any GPU of the host.
            kind: whose stream copies.
        """
        stream = self.streams[kind]
        stream.wait_stream(torch.cuda.current_stream())
        _call(
            driver.cuMemcpyDtoDAsync, target, source.data_ptr(), source.nbytes, stream.cuda_stream
        )
        self.write(word, value, stream)
        return Copy(stream.record_event())

    def write(self, word: int, value: int, stream: torch.cuda.Stream | None = None) -> None:
        """Write a word of 32 bits when ``stream`` (None: the current one) comes to it."""
        with torch.cuda.device(self.device):  # a thread of autograd's may not have one
            stream = stream or torch.cuda.current_stream()
            _call(driver.cuStreamWriteValue32, stream.cuda_stream, word, value, 0)

    def wait(self, word: int, value: int) -> None:
        """The current stream goes on when the word is at least ``value``."""
        stream = torch.cuda.current_stream()
        _call(driver.cuStreamWaitValue32, stream.cuda_stream, word, value, _GEQ)

    def current_stream(self) -> torch.cuda.Stream:
        """What :meth:`write` takes to write behind what runs now."""
        return torch.cuda.current_stream()

    def tensor(self, address: int, shape: tuple[int, ...], dtype: torch.dtype, owner) -> Tensor:
        """The memory at ``address`` as a tensor; ``owner`` lives as long as its storage."""
        count = math.prod(shape) * dtype.itemsize
        data = torch.as_tensor(_Memory(address, count, owner), device=self.device)
        return data.view(dtype).view(shape)


class Copy:
    """A copy on its way, as torch.distributed's handles are."""

    def __init__(self, over: torch.cuda.Event) -> None:
        self._over = over

    def is_completed(self) -> bool:
        return self._over.query()

    def wait(self) -> None:
        """The current stream waits."""
        torch.cuda.current_stream().wait_event(self._over)
