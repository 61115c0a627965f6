"""Pipeline parallelism of n-stream models: stage boundaries [s, b, n*C] (paper section 4.3.3).

    boundary = send_boundary()
    communicator = PipelineCommunicator(pp_group, config, num_streams=4, boundary=boundary)

Megatron's schedules are used as they are: the communicator goes into their ``p2p_communicator``
argument, the boundary into the block's spec. docs/pipeline.md says what runs on which stream.
"""

from .boundary import PriorityStream, ProgramOrder, send_boundary
from .communicator import PipelineCommunicator

__all__ = ["PipelineCommunicator", "PriorityStream", "ProgramOrder", "send_boundary"]
