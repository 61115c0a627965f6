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
        group: micro-batches that run one chunk in a row
            (--microbatch-group-size-per-virtual-pipeline-stage); 0 is the number of stages.
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
    group: int = 0

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

    def _hops_ms(self, transfer: float, pass_ms: float) -> float:
        """Time that one micro-batch's transfers keep all ranks waiting while the pipeline fills,
        with passes of ``pass_ms``, or drains.

        Through the stages once nothing else is there to be done. Until it is back at a stage for
        the next chunk, that runs the group's other micro-batches.
        """
        others = max(self.group - self.stages, 0)
        back = max(0.0, self.stages * transfer - others * pass_ms)
        return (self.stages - 1) * transfer + (self.chunks - 1) * back

    def exposed_ms(self, mode: str) -> float:
        """Time of a step in which a rank waits for a boundary, beyond the bubble.

        A chunk's output is needed at once while the pipeline fills, and a gradient when it drains.
        In between a forward transfer has a backward chunk to hide behind, a gradient a forward
        chunk. Megatron waits for every forward send where it is issued; without interleaving it
        posts receives when their tensors are needed. The merge of "none" is on the main stream.
        """
        transfer = self.transfer_ms(mode)
        passes = self.micro_batches * self.chunks
        fill = self._hops_ms(transfer, self.forward_ms)
        drain = self._hops_ms(transfer, 2 * self.forward_ms)
        if self.chunks == 1:
            exposed = fill + drain + (self.micro_batches - 1) * transfer
        elif mode == "post":
            late = max(0.0, transfer - 2 * self.forward_ms) + max(0.0, transfer - self.forward_ms)
            exposed = fill + drain + passes * late
        else:
            exposed = passes * transfer + drain
            exposed += passes * max(0.0, transfer - self.forward_ms)
        return exposed + (passes * self.merge_ms if mode == "none" else 0.0)

    def step_ms(self, mode: str) -> float:
        """Forward and backward passes of a step."""
        return self.compute_ms + self.bubble_ms + self.exposed_ms(mode)
