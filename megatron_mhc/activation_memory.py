"""How many bytes of activations a pipeline stage holds: plain, with mHC, with mHC recompute.

Counted is what autograd keeps of dense Transformer Engine layers between the forward and the
backward pass, and what the backward pass adds at its worst moment (in the last MLP, when the
gradients of the first linear layer's output exist beside everything kept). Not counted: parameters,
their gradients, the optimizer, the embedding and its dropout, the output layer and the loss.
"""

import math
from dataclasses import dataclass

from .recompute_blocks import SUBLAYERS


@dataclass(frozen=True)
class Stage:
    """What one pipeline stage computes for one micro-batch.

    Attributes:
        layers: transformer layers of the stage.
        tokens: of a micro-batch on a rank, sequence length times micro-batch size over
            context-parallel ranks.
        hidden: C.
        ffn: width of the MLP.
        query: attention heads times channels of a head.
        key_value: key-value heads times channels of a head.
        heads: attention heads.
        gated: the MLP multiplies two projections (SwiGLU).
        fp8: linear layers keep their inputs in 8 bits.
        dropout: every sublayer's output is dropped from, by a mask that is kept.
        tensor_parallel: ranks that share a layer.
        sequence_parallel: they also share the tokens outside attention and MLP.
        in_flight: passes through it whose backward pass is still to come, at most.
    """

    layers: int
    tokens: int
    hidden: int
    ffn: int
    query: int
    key_value: int
    heads: int
    gated: bool = True
    fp8: bool = False
    dropout: bool = False
    tensor_parallel: int = 1
    sequence_parallel: bool = False
    in_flight: int = 1

    @property
    def _linear_input(self) -> int:
        return 1 if self.fp8 else 2

    @property
    def channel_bytes(self) -> float:
        """Of C bf16 channels of every token of this rank: the unit of the residual path."""
        shared_by = self.tensor_parallel if self.sequence_parallel else 1
        return 2 * self.hidden * self.tokens / shared_by

    @property
    def _fc1(self) -> int:
        return (2 if self.gated else 1) * self.ffn

    def sublayer_bytes(self) -> float:
        """What attention and MLP of one layer keep of their own, without their norms."""
        attention = 2 * (2 * self.query + 2 * self.key_value) + 4 * self.heads
        if self.fp8:
            attention += self.query  # the output projection's input, beside attention's output
        mlp = 2 * self._fc1 + self._linear_input * self.ffn
        return self.tokens * (attention + mlp) / self.tensor_parallel

    def normalized_bytes(self) -> float:
        """A norm's output as the linear layer after it keeps it."""
        return self.channel_bytes * self._linear_input / 2

    def mask_bytes(self) -> float:
        """A dropout's mask: a byte where an output has two. Attention's own dropout has none, it
        keeps a random state."""
        return self.channel_bytes / 2 if self.dropout else 0

    def backward_bytes(self) -> float:
        """Gradients in the last MLP: of its output, its activation and its first linear layer,
        less the activation itself, which is gone by then."""
        inner = 2 * (self._fc1 + self.ffn) - self._linear_input * self.ffn
        return self.channel_bytes + self.tokens * inner / self.tensor_parallel


@dataclass(frozen=True)
class Estimate:
    """Bytes of activations of a stage.

    Attributes:
        kept: of all micro-batches in flight. transient: what the backward pass adds at most.
    """

    kept: float
    transient: float

    @property
    def peak(self) -> float:
        return self.kept + self.transient


def coefficient_bytes(streams: int, recompute: bool = False) -> int:
    """Of one mapping and one token, float32: post, comb, the (2 + n) n products m, and r; with
    recompute pre too, which the replay takes."""
    count = streams + streams**2 + (2 + streams) * streams + 1
    return 4 * (count + streams if recompute else count)


def plain(stage: Stage) -> Estimate:
    """Without mHC: each sublayer keeps its input and the normalised input."""
    sublayers = SUBLAYERS * stage.layers
    residual = sublayers * (stage.channel_bytes + stage.normalized_bytes()) + stage.channel_bytes
    return _estimate(stage, residual, 0)


def mhc(stage: Stage, streams: int) -> Estimate:
    """With mHC: X, u, the normalised u and f of each sublayer, and the streams at the end."""
    sublayers, unit = SUBLAYERS * stage.layers, stage.channel_bytes
    small = coefficient_bytes(streams) * unit / (2 * stage.hidden)
    each = (streams + 2) * unit + stage.normalized_bytes() + small
    return _estimate(stage, sublayers * each + (streams + 1) * unit, streams * unit)


def recomputed(stage: Stage, streams: int, block: int) -> Estimate:
    """With mHC recompute in blocks of ``block`` layers: an X for each, and every sublayer's f and
    coefficients.

    In low precision the normalised u is kept too: its bytes are half, and quantized.
    """
    sublayers, unit = SUBLAYERS * stage.layers, stage.channel_bytes
    small = coefficient_bytes(streams, recompute=True) * unit / (2 * stage.hidden)
    normalized = stage.normalized_bytes() if stage.fp8 else 0
    blocks = math.ceil(stage.layers / block)
    kept = blocks * streams * unit + sublayers * (unit + normalized + small) + unit
    replayed = SUBLAYERS * block * (streams + 1) * unit
    if blocks == 1:
        replayed -= streams * unit  # the first mapping's streams are the ones that are kept
    return _estimate(stage, kept, replayed + streams * unit)


def _estimate(stage: Stage, residual: float, residual_transient: float) -> Estimate:
    masks = SUBLAYERS * stage.layers * stage.mask_bytes()
    kept = stage.layers * stage.sublayer_bytes() + residual + masks
    return Estimate(kept * stage.in_flight, residual_transient + stage.backward_bytes())


def best_block(stage: Stage, streams: int) -> int:
    """The block size, in layers, with the lowest peak for this stage and its micro-batches in
    flight; eq. 20, which counts one micro-batch, is :func:`~.recompute_blocks.best_block_layers`.
    """
    return min(range(1, stage.layers + 1), key=lambda block: recomputed(stage, streams, block).peak)


def passes_in_flight(
    rank: int, stages: int, virtual: int, micro_batches: int, group: int | None = None
) -> int:
    """Forward passes through one of a rank's stages whose backward pass is still to come, at most.

    Args:
        rank, stages: pipeline rank and number of ranks. virtual: stages to a rank.
        micro_batches: of a step. group: those that go through one of a rank's stages before its
            next one's turn comes (--microbatch-group-size-per-virtual-pipeline-stage), by default
            ``stages``.
    """
    if virtual == 1:
        return min(stages - rank, micro_batches)
    ahead = (stages - rank - 1) * 2 + (virtual - 1) * (group or stages) + 1
    return min(ahead, micro_batches * virtual)
