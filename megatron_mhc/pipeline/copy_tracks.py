"""The copy transport: boundaries travel by the GPUs' copy engines, within one host.

An NCCL receive that waits for its peer holds SMs. Here nothing waits on the GPU before the stage
itself has to: the sender copies into a slot of the receiver's as soon as its tensor is formed, and
the receiver's stream waits for a word when the message is asked for (docs/pipeline.md).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import gather
from .inbox import Inbox, Outlet
from .schedule_model import Schedule, messages_held
from .tracks import KIND, neighbour_place

LEAD = 2
"""Slots more than the GPUs need: messages by which a sender's host may be ahead of them."""


class Receive:
    """A receive that was asked for: its tensor has memory when it was waited for."""

    def __init__(self, tensor: Tensor, fetch: Callable[[], Tensor]) -> None:
        self._tensor = tensor
        self._fetch = fetch

    def wait(self) -> None:
        """The host waits until the message was sent, the current stream until it is there."""
        self._tensor.data = self._fetch()


class CopyTracks:
    """Sends to and receives from the neighbours of a stage, all on one host.

    Construction is a collective of ``pp_group``, and so is the first message of each size.

    Args:
        pp_group: the stages.
        engine: a CopyEngine.
        schedule: that of the pipeline.
        streams: what may read a message beside the stream that waited for it.
        seconds: how long a host waits for its neighbour's.

    Raises:
        RuntimeError, OSError: on every rank, if a rank cannot reach its neighbours' memory.
    """

    said = "copied over NVLink or PCIe by copy engines, which take no SM"

    def __init__(
        self,
        pp_group: ProcessGroup,
        engine,
        schedule: Schedule,
        streams: tuple = (),
        seconds: float = 600,
    ) -> None:
        self.pp_group = pp_group
        self.engine = engine
        self._wraps = schedule.chunks > 1
        self._streams = streams
        self._seconds = seconds
        self._slots = messages_held(pp_group.size(), pp_group.rank(), schedule)
        self._ends: dict[int, dict[str, Inbox | Outlet]] = {}
        self._ends_for(1)

    def _has(self, name: str) -> bool:
        """Whether this stage ever calls operation ``name``."""
        if self._wraps:
            return True
        end = 0 if name.endswith("prev") else self.pp_group.size() - 1
        return self.pp_group.rank() != end

    def _ends_for(self, size: int) -> dict[str, Inbox | Outlet]:
        """Both ends of what this stage exchanges, for messages of ``size`` bytes; made once."""
        if size not in self._ends:
            self._ends[size] = self._connect(size)
        return self._ends[size]

    def _connect(self, size: int) -> dict[str, Inbox | Outlet]:
        ends: dict[str, Inbox | Outlet] = {}
        addresses = {}
        problem = None
        try:
            for name, slots in zip(("recv_prev", "recv_next"), self._slots, strict=True):
                if self._has(name):
                    streams = self._streams
                    ends[name] = Inbox(self.engine, slots + LEAD, size, streams, self._seconds)
                    addresses[name] = ends[name].address
        except (RuntimeError, OSError) as error:
            problem = error
        everywhere = gather((problem, addresses), self.pp_group)
        if not any(error for error, _ in everywhere):
            try:
                for name, inbox in (
                    ("tensor_send_next", "recv_prev"),
                    ("tensor_send_prev", "recv_next"),
                ):
                    if self._has(name):
                        _, theirs = everywhere[neighbour_place(self.pp_group, name)]
                        ends[name] = Outlet(self.engine, theirs[inbox], KIND[name], self._seconds)
            except (RuntimeError, OSError) as error:
                problem = error
        problems = [error for error, _ in gather((problem, None), self.pp_group) if error]
        for end in ends.values():
            if isinstance(end, Inbox):
                end.close_file()
        if problems:
            raise problems[0]
        return ends

    def send(self, name: str, tensor: Tensor):
        """Start to send; ``name`` is tensor_send_next or tensor_send_prev."""
        return self._ends_for(tensor.nbytes)[name].send(tensor)

    def receive(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | int
    ) -> tuple[Tensor, Receive]:
        """Ask for a message; ``name`` is recv_prev or recv_next.

        Returns:
            A leaf without memory of its own, and the handle whose ``wait()`` gives it some.
        """
        inbox = self._ends_for(math.prod(shape) * dtype.itemsize)[name]
        tensor = torch.empty(1, dtype=dtype, device=device).expand(shape).detach()
        return tensor, Receive(tensor, lambda: inbox.receive(shape, dtype))
