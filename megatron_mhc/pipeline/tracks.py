"""A pipeline's own communicators: no transfer queues behind one of another kind or direction.

torch runs the single sends and receives between two ranks of a process group in the order of their
calls, on one stream. In Megatron's groups an activation so waits for a gradient that was asked for
before it and has not come. Here activations and gradients have groups of their own, and two each:
of two stages, each is the other's next and previous.
"""

import time

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, Work

from .agreement import gather

KIND = {
    "tensor_send_next": "activation",
    "recv_prev": "activation",
    "tensor_send_prev": "gradient",
    "recv_next": "gradient",
}
"""Megatron's name of an operation to what it moves."""


MESSAGE, MESSAGES = 64 * 2**20, 4
"""Bytes and number of the messages that :meth:`Tracks.speed` sends."""


def neighbour_place(pp_group: ProcessGroup, name: str) -> int:
    """Which stage operation ``name`` is with."""
    step = 1 if name.endswith("next") else -1
    return (pp_group.rank() + step) % pp_group.size()


class Tracks:
    """Sends to and receives from the neighbours of a stage.

    Construction is a collective of all ranks of the job, each with its own pipeline's group.

    Args:
        pp_group: the stages.
        wraps: whether the last stage sends to the first, as it does with chunks.
        ctas: SMs that one NCCL transfer may take; None: as Megatron's configuration of NCCL says
            for "pp", or as NCCL chooses.
    """

    def __init__(self, pp_group: ProcessGroup, wraps: bool, ctas: int | None = None) -> None:
        self.pp_group = pp_group
        self.ctas = ctas
        self._wraps = wraps
        self._groups = self._make_groups()
        self._connect()

    def _make_groups(self) -> dict[tuple[str, int], ProcessGroup]:
        """By kind and parity of the sending stage, the group of this rank's pipeline."""
        mine = torch.distributed.get_process_group_ranks(self.pp_group)
        pipelines = gather(tuple(mine))
        groups = {}
        # A process group is made by all ranks of the job, also by those that are not in it.
        for ranks in sorted(set(pipelines)):
            for kind in ("activation", "gradient"):
                for parity in (0, 1):
                    group = torch.distributed.new_group(
                        ranks, group_desc=f"MHC_{kind.upper()}_{parity}", **self._settings()
                    )
                    if ranks == tuple(mine):
                        groups[kind, parity] = group
        return groups

    def _settings(self) -> dict:
        """A process group's backend, timeout and options: the pipeline's, but for priority."""
        backend = torch.distributed.get_backend(self.pp_group)
        if backend != "nccl":
            return {"backend": backend}
        device = torch.device(torch.cuda.current_device())
        pipeline = self.pp_group._get_backend(device).options
        # A transfer must not wait until a matrix product that came first has left the SMs.
        options = torch.distributed.ProcessGroupNCCL.Options(is_high_priority_stream=True)
        options._timeout = pipeline._timeout
        options.config = pipeline.config  # --nccl-communicator-config-path
        if self.ctas is not None:
            options.config.min_ctas = 1
            options.config.max_ctas = self.ctas
        return {"backend": backend, "timeout": pipeline._timeout, "pg_options": options}

    def _connect(self) -> None:
        """Send one element over every track.

        NCCL connects two ranks at their first transfer, and both wait for that on the host. In the
        schedule's order two stages would wait for each other, each for a gradient.
        """
        stages, rank = self.pp_group.size(), self.pp_group.rank()
        last = stages if self._wraps else stages - 1
        element = torch.zeros(1, device=torch.cuda.current_device())
        for stage in (*range(0, last, 2), *range(1, last, 2)):  # pairs of neighbours, in parallel
            if rank == stage:
                self.send("tensor_send_next", element).wait()
                self._receive_element("recv_next")
            if rank == (stage + 1) % stages:
                self._receive_element("recv_prev")
                self.send("tensor_send_prev", element).wait()

    def _receive_element(self, name: str) -> None:
        _element, handle = self.receive(name, (1,), torch.float32, torch.cuda.current_device())
        handle.wait()

    def send(self, name: str, tensor: Tensor) -> Work:
        """Start to send; ``name`` is tensor_send_next or tensor_send_prev."""
        group = self._groups[KIND[name], self.pp_group.rank() % 2]
        return torch.distributed.isend(tensor, self._neighbour(name), group=group)

    def receive(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | int
    ) -> tuple[Tensor, Work]:
        """Start to receive; ``name`` is recv_prev or recv_next.

        Returns:
            The tensor that is going to be filled, a leaf, and its handle.
        """
        tensor = torch.empty(shape, dtype=dtype, device=device)
        group = self._groups[KIND[name], neighbour_place(self.pp_group, name) % 2]
        return tensor, torch.distributed.irecv(tensor, self._neighbour(name), group=group)

    def speed(self) -> float:
        """GB/s from each stage to the next, all at once and measured now: the slowest.

        A collective of ``pp_group``.
        """
        message = torch.empty(MESSAGE, dtype=torch.uint8, device=torch.cuda.current_device())
        seconds = torch.zeros(1, device=message.device)
        for _warm in (False, True):
            torch.distributed.barrier(self.pp_group)
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for _ in range(MESSAGES):
                received = None
                if self._wraps or self.pp_group.rank() > 0:
                    shape, device = tuple(message.shape), message.device
                    _, received = self.receive("recv_prev", shape, message.dtype, device)
                if self._wraps or self.pp_group.rank() < self.pp_group.size() - 1:
                    self.send("tensor_send_next", message).wait()
                if received is not None:
                    received.wait()
            torch.cuda.synchronize()
            seconds[0] = time.perf_counter() - begin
        torch.distributed.all_reduce(seconds, torch.distributed.ReduceOp.MAX, self.pp_group)
        return MESSAGES * MESSAGE / seconds.item() / 1e9

    def close(self) -> None:
        """Give the communicators back; nothing is sent over them any more."""
        for group in self._groups.values():
            torch.distributed.destroy_process_group(group)

    def _neighbour(self, name: str) -> int:
        place = neighbour_place(self.pp_group, name)
        return torch.distributed.get_global_rank(self.pp_group, place)
