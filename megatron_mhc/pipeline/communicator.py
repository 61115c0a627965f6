"""Megatron's P2PCommunicator for stage boundaries of n streams."""

from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch import Tensor
from torch.distributed import ProcessGroup

from .agreement import agree
from .boundary import PriorityStream, ProgramOrder
from .outbox import Outbox

NOTHING = {
    "tensor_send_next": None,
    "tensor_send_prev": None,
    "recv_prev": False,
    "recv_next": False,
}
"""The arguments of a communication that does nothing."""
ORDER = {
    0: ("tensor_send_next", "recv_prev", "tensor_send_prev", "recv_next"),
    1: ("recv_prev", "tensor_send_next", "recv_next", "tensor_send_prev"),
}
"""Rank's parity to the order of operations: where one stage sends, its neighbour receives."""


class PipelineCommunicator(P2PCommunicator):
    """Moves [s, b, n*C] between stages, under any of Megatron's pipeline schedules.

    Without a boundary it communicates as Megatron does, n times wider (overlap none). With one, a
    send is issued from the boundary's stream, and neither the compute stream nor the schedule waits
    for it: memory that is being sent is kept in an outbox until it was read, so the schedule may
    free its tensor at once.

    Construction is a collective of ``pp_group``.

    Args:
        pp_group, config: P2PCommunicator's. With a boundary, ``config.batch_p2p_comm`` must be
            False: a batch of sends and receives can only be waited for as a whole.
        num_streams: n; 1 for a plain model.
        boundary: where sends are issued from (:mod:`.boundary`); the blocks' specs take the same.

    Raises:
        ValueError: a setting under which boundaries would be waited for, or cross.
        StageMismatch: a neighbour was given other sizes.
    """

    def __init__(
        self,
        pp_group: ProcessGroup,
        config,
        num_streams: int,
        boundary: ProgramOrder | PriorityStream | None = None,
    ) -> None:
        super().__init__(pp_group, config)
        self.num_streams = num_streams
        self.boundary = boundary
        self._outbox = Outbox()
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
        )

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

        received, handles = {}, {}
        for name in ORDER[self.pp_group.rank() % 2]:
            if name.startswith("recv") and wanted[name]:
                prev, next_, handle = self._single(name, True, tensor_shape)
                received[name] = prev if name == "recv_prev" else next_
                handles.update(handle)
            elif name.startswith("tensor") and wanted[name] is not None:
                self._send(name, wanted[name])
        if wait_on_reqs:
            for handle in handles.values():
                handle.wait()
            handles = None
        if "recv_prev" in received:
            self.boundary.expect_gradient(received["recv_prev"])
        return received.get("recv_prev"), received.get("recv_next"), handles

    def _single(self, name: str, value: Tensor | bool, tensor_shape):
        """One operation, not waited for: received tensors and the handle by its Megatron name."""
        return super()._communicate(
            **{**NOTHING, name: value}, tensor_shape=tensor_shape, wait_on_reqs=False
        )

    def _send(self, name: str, tensor: Tensor) -> None:
        # The schedule frees a tensor by exchanging its data; the alias has its own hold on it.
        alias = tensor.detach()
        with self.boundary.sending(alias):
            _, _, handles = self._single(name, alias, None)
        (handle,) = handles.values()
        self._outbox.add(self.boundary.completion(handle), alias)

    def drain(self) -> None:
        """Wait on the host until every send is over, before process groups are destroyed."""
        self._outbox.drain()
