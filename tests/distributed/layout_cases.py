"""What the layout worker runs and the layout test compares; plain data, nothing to import."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """How a job's processes are divided.

    Attributes:
        tp, dp: tensor-parallel and data-parallel size.
        ep: expert-parallel size, of the tensor- and data-parallel ranks.
    """

    tp: int
    dp: int
    ep: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.dp


@dataclass(frozen=True)
class Case:
    """One model and how it is trained.

    Attributes:
        mixing: MHCConfig.residual_mixing.
        classic: LayerNorm, linear biases, GELU, learned positions, tied embeddings and a loss per
            token; else RMSNorm, no bias, SwiGLU, RoPE, untied, and a loss per micro-batch.
        bf16: wrapped in Megatron's Float16Module.
        sequence_parallel: tokens divided over the tensor-parallel ranks between the matrices.
        recompute: streams and sublayer inputs replayed in the backward pass.
        experts: mixtures of experts for MLPs.
        combined: combined 1F1B.
        optimizer: "" (gradients only), "plain" or "distributed" Adam, for two steps.
    """

    mixing: str = "sinkhorn"
    classic: bool = False
    bf16: bool = False
    sequence_parallel: bool = False
    recompute: bool = False
    experts: bool = False
    combined: bool = False
    optimizer: str = ""


LAYOUTS = {
    "single": Layout(1, 1),
    "tp2": Layout(2, 1),
    "dp2": Layout(1, 2),
    "tp2dp2": Layout(2, 2),
    "dp2ep2": Layout(1, 2, ep=2),
    "tp2dp2ep4": Layout(2, 2, ep=4),
}

CASES = {
    "sinkhorn": Case(),
    "classic": Case(classic=True),
    "unconstrained": Case(mixing="unconstrained"),
    "identity": Case(mixing="identity"),
    "bf16": Case(bf16=True),
    "sequence_parallel": Case(sequence_parallel=True),
    "classic_sequence_parallel": Case(classic=True, sequence_parallel=True),
    "recompute": Case(sequence_parallel=True, recompute=True),
    "experts": Case(experts=True),
    "experts_recompute": Case(experts=True, recompute=True),
    "experts_sequence_parallel": Case(experts=True, sequence_parallel=True),
    "experts_combined": Case(experts=True, combined=True),
    "adam": Case(optimizer="plain"),
    "distributed_adam": Case(optimizer="distributed"),
    "bf16_adam": Case(optimizer="plain", bf16=True),
    "bf16_distributed_adam": Case(optimizer="distributed", bf16=True),
}

RUNS = {
    "single": ("sinkhorn", "classic", "unconstrained", "identity", "bf16", "experts"),
    "tp2": (
        "sinkhorn",
        "classic",
        "unconstrained",
        "identity",
        "sequence_parallel",
        "classic_sequence_parallel",
        "recompute",
    ),
    "dp2": (
        "sinkhorn",
        "classic",
        "bf16",
        "adam",
        "distributed_adam",
        "bf16_adam",
        "bf16_distributed_adam",
    ),
    "tp2dp2": ("sinkhorn", "classic", "sequence_parallel"),
    "dp2ep2": ("experts", "experts_recompute", "experts_combined"),
    "tp2dp2ep4": ("experts_sequence_parallel",),
}
"""Layout to the cases that run in it."""
