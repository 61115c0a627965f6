"""What a pipeline's boundaries cost on paper: transfer times against what can hide them."""

from dataclasses import dataclass

MODES = ("plain", "none", "post")
"""A model without mHC, and the two values of --mhc-pipeline-overlap."""
BYTES = 2
"""Of one bf16 element."""


@dataclass(frozen=True)
class Cluster:
    """A pipeline and its link.

    Attributes:
        stages, chunks: PP and chunks per stage (1: 1F1B without interleaving).
        micro_batches: per step.
        channels, streams: C and n. tokens: of one micro-batch on one rank.
        link: GB/s of one direction between two stages.
        forward_ms: forward time of one chunk on one micro-batch; backward takes twice that.
        memory: GB/s of the GPU's memory, for the merges.
    """

    stages: int
    chunks: int
    micro_batches: int
    channels: int
    streams: int
    tokens: int
    link: float
    forward_ms: float
    memory: float = 4000.0

    def transfer_ms(self, mode: str) -> float:
        """One boundary over the link."""
        width = self.channels * (1 if mode == "plain" else self.streams)
        return self.tokens * width * BYTES / self.link / 1e6

    @property
    def merge_ms(self) -> float:
        """One last merge: streams read, f read, streams written."""
        units = 2 * self.streams + 1
        return units * self.tokens * self.channels * BYTES / self.memory / 1e6

    @property
    def compute_ms(self) -> float:
        """A step's compute on one rank, idle time left out."""
        return 3 * self.forward_ms * self.micro_batches * self.chunks

    @property
    def bubble_ms(self) -> float:
        """Idle time of a step with free transfers."""
        return 3 * self.forward_ms * (self.stages - 1)

    def exposed_ms(self, mode: str) -> float:
        """Time of a step in which a rank waits for a boundary, beyond the bubble.

        A chunk's output is needed at once while the pipeline fills: one transfer for every hop but
        the last of the stages x chunks, and as many gradients when it drains. In between a forward
        transfer has a backward chunk to hide behind, a gradient a forward chunk. Megatron waits for
        every forward send where it is issued; without interleaving it posts receives when their
        tensors are needed. The merge of "none" is on the main stream.
        """
        transfer = self.transfer_ms(mode)
        hops = self.stages * self.chunks - 1
        passes = self.micro_batches * self.chunks
        if self.chunks == 1:
            exposed = (2 * hops + self.micro_batches - 1) * transfer
        elif mode == "post":
            late = max(0.0, transfer - 2 * self.forward_ms) + max(0.0, transfer - self.forward_ms)
            exposed = 2 * hops * transfer + passes * late
        else:
            exposed = (passes + hops) * transfer
            exposed += passes * max(0.0, transfer - self.forward_ms)
        return exposed + (passes * self.merge_ms if mode == "none" else 0.0)

    def step_ms(self, mode: str) -> float:
        """Forward and backward passes of a step."""
        return self.compute_ms + self.bubble_ms + self.exposed_ms(mode)
