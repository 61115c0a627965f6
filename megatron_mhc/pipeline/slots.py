"""What goes into the pipeline arguments of ``megatron.training.pretrain``.

pretrain() takes a communicator and process groups, and makes the process groups itself after it was
called. So both are looked up when they are first used, and nothing of Megatron's start is repeated.
"""

from dataclasses import fields

from megatron.core import parallel_state
from megatron.core.process_groups_config import ProcessGroupCollection

from .boundary import send_boundary
from .communicator import PipelineCommunicator

_GROUPS = {field.name for field in fields(ProcessGroupCollection)}


class DeferredGroups(ProcessGroupCollection):
    """Megatron's own process groups; before it has made them, none."""

    def __getattr__(self, name: str):
        if name in _GROUPS and parallel_state.model_parallel_is_initialized():
            self.__dict__.update(vars(ProcessGroupCollection.use_mpu_process_groups()))
            return self.__dict__[name]
        return super().__getattr__(name)


class DeferredCommunicator(PipelineCommunicator):
    """A PipelineCommunicator that comes into being when the pipeline's group exists.

    Args:
        config, num_streams, boundary, transport: PipelineCommunicator's.
    """

    def __init__(self, config, num_streams: int, boundary=None, transport: str = "auto") -> None:
        self.num_streams = num_streams
        self._transport = transport
        self.boundary = boundary
        self._config = config

    def connect(self) -> None:
        """Find the neighbours; a collective of the pipeline's group the first time.

        Raises:
            ValueError, StageMismatch, TransportRefused: PipelineCommunicator's.
        """
        if "pp_group" not in self.__dict__:
            group = parallel_state.get_pipeline_model_parallel_group()
            settings = {"boundary": self.boundary, "transport": self._transport}
            super().__init__(group, self._config, self.num_streams, **settings)

    def __getattr__(self, name: str):
        if name not in ("pp_group", "config", "next_rank", "prev_rank"):
            raise AttributeError(name)
        self.connect()
        return self.__dict__[name]


def make_communicator(
    config, num_streams: int, overlap: str, transport: str = "auto"
) -> DeferredCommunicator | None:
    """The communicator of a training; None where the model is one stage.

    Args:
        config: the model's TransformerConfig. Under "post" its batch_p2p_comm becomes False and, of
            an interleaved schedule that overlaps, overlap_p2p_comm_warmup_flush True.
        overlap, transport: --mhc-pipeline-overlap and --mhc-pipeline-transport.
    """
    if config.pipeline_model_parallel_size == 1:
        return None
    if overlap == "none":
        return DeferredCommunicator(config, num_streams)
    # Of a batch of sends and receives one can only wait for the whole.
    config.batch_p2p_comm = False
    # Else every receive of warm-up and cool-down is posted when it is needed, and seen in full.
    config.overlap_p2p_comm_warmup_flush = config.overlap_p2p_comm
    return DeferredCommunicator(config, num_streams, send_boundary(), transport)
