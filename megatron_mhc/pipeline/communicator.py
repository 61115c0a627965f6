"""Megatron's P2PCommunicator for stage boundaries of n streams."""

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import agree
from .boundary import PriorityStream, ProgramOrder
from .copy_tracks import CopyTracks
from .outbox import Outbox
from .replays import ReplayedBefore
from .schedule_model import Schedule
from .tracks import Tracks
from .transport import TRANSPORTS, make_tracks


class PipelineCommunicator(P2PCommunicator):
    """Moves [s, b, n*C] between stages, under any of Megatron's pipeline schedules.

    Without a boundary it communicates as Megatron does, n times wider (overlap none). With one, a
    send is issued from the boundary's stream, and neither the compute stream nor the schedule waits
    for it: memory that is being sent is kept in an outbox until it was read, so the schedule may
    free its tensor at once. What the next backward pass has to recompute first is replayed while
    its gradient is on the way.

    Construction is a collective of ``pp_group``, with a boundary of all ranks of the job.

    Args:
        pp_group, config: P2PCommunicator's. With a boundary, ``config.batch_p2p_comm`` must be
            False: a batch of sends and receives can only be waited for as a whole.
        num_streams: n; 1 for a plain model.
        boundary: where sends are issued from (:mod:`.boundary`); the blocks' specs take the same.
        tracks: what a boundary sends over; None makes those of ``transport``.
        transport: "auto", "copy" or "nccl" (:mod:`.transport`).

    Raises:
        ValueError: a setting under which boundaries would be waited for, or cross.
        StageMismatch: a neighbour was given other sizes.
        TransportRefused: this ``transport`` cannot be had.
    """

    def __init__(
        self,
        pp_group: ProcessGroup,
        config,
        num_streams: int,
        boundary: ProgramOrder | PriorityStream | None = None,
        tracks: CopyTracks | Tracks | None = None,
        transport: str = "auto",
    ) -> None:
        super().__init__(pp_group, config)
        self.num_streams = num_streams
        self.boundary = boundary
        self._outbox = Outbox()
        if transport not in TRANSPORTS:
            raise ValueError(f"transport={transport!r}: expected one of {', '.join(TRANSPORTS)}")
        self._check_config()
        agree(
            pp_group,
            streams=num_streams,
            hidden_size=config.hidden_size,
            width=num_streams * config.hidden_size,
            dtype=config.pipeline_dtype,
            batched=config.batch_p2p_comm,
            layers=config.num_layers,
            virtual_stages=config.virtual_pipeline_model_parallel_size,
            transport=transport,
        )
        if boundary is not None:
            group = config.microbatch_group_size_per_vp_stage
            boundary.replays.group = group
            if tracks is None:
                schedule = Schedule(
                    chunks=config.virtual_pipeline_model_parallel_size or 1,
                    group=group or 0,
                    combined=config.overlap_moe_expert_parallel_comm,
                )
                tracks = make_tracks(pp_group, transport, schedule, boundary)
            self._tracks = tracks

    def _check_config(self) -> None:
        config = self.config
        if config.variable_seq_lengths:
            raise ValueError("variable_seq_lengths=True: mHC boundaries need a fixed length; False")
        if config.use_ring_exchange_p2p:
            raise ValueError("use_ring_exchange_p2p=True: not supported with mHC; set it to False")
        if self.boundary is not None and config.batch_p2p_comm:
            raise ValueError(
                "batch_p2p_comm=True: sends without waiting need single operations; set it to "
                "False, or leave the boundary out"
            )
        interleaved = self.virtual_pipeline_model_parallel_size is not None
        if interleaved and config.batch_p2p_comm and self.pp_group.size() == 2:
            # Both neighbours are one rank, and a batch pairs its messages by order alone.
            raise ValueError(
                "batch_p2p_comm=True with 2 stages of several chunks: megatron-core 0.19.2 "
                "exchanges activations with gradients; set it to False"
            )

    def _communicate(
        self, *, tensor_shape, wait_on_reqs: bool = True, **wanted: Tensor | bool | None
    ):
        """P2PCommunicator's, with ``tensor_shape`` [s, b, C] meaning n streams of it.

        With a boundary the handles that come back are those of receives.
        """
        if tensor_shape is not None:
            *tokens, channels = tensor_shape
            tensor_shape = (*tokens, self.num_streams * channels)
        if self.boundary is None:
            return super()._communicate(
                tensor_shape=tensor_shape, wait_on_reqs=wait_on_reqs, **wanted
            )

        # Receives first: the host may wait for a send, while a neighbour's waits for a receive.
        received, handles = {}, {}
        for name in ("recv_prev", "recv_next"):
            if wanted[name]:
                received[name], handles[name] = self._receive(name, tensor_shape)
        for name in ("tensor_send_next", "tensor_send_prev"):
            if wanted[name] is not None:
                self._send(name, wanted[name])
        if "recv_prev" in received:
            self.boundary.expect_gradient(received["recv_prev"])
        if "recv_next" in received:
            replays = self.boundary.replays
            handles["recv_next"] = ReplayedBefore(handles["recv_next"], replays.replay_next)
        if wait_on_reqs:
            for handle in handles.values():
                handle.wait()
            handles = None
        return received.get("recv_prev"), received.get("recv_next"), handles

    def _receive(self, name: str, shape: tuple[int, ...]):
        """Post one receive: the tensor that is going to be filled, and its handle."""
        device = torch.cuda.current_device()
        tensor, handle = self._tracks.receive(name, shape, self.config.pipeline_dtype, device)
        return tensor.requires_grad_(), handle

    def _send(self, name: str, tensor: Tensor) -> None:
        # The schedule frees a tensor by exchanging its data; the alias has its own hold on it.
        alias = tensor.detach()
        with self.boundary.sending(alias):
            handle = self._tracks.send(name, alias)
        self._outbox.add(self.boundary.completion(handle), alias)

    def drain(self) -> None:
        """Wait on the host until every send is over, before process groups are destroyed."""
        self._outbox.drain()
