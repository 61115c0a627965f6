"""What a model is, apart from its weights, and the flags that train it."""

from collections.abc import Callable
from dataclasses import dataclass

from megatron_mhc.config import MHCConfig
from megatron_mhc.errors import UserError


@dataclass(frozen=True)
class Architecture:
    """A Llama: RMSNorm, RoPE, SwiGLU, grouped queries, no biases; with mHC where ``mhc`` is set.

    Attributes:
        vocabulary: rows of the embedding. positions: longest sequence, tokens.
        head_channels: channels of one attention head. groups: key-value heads.
        rope_scaling: Llama 3.1's factor for its longer contexts; None is plain RoPE.
        tied: the embedding is the output layer too.
        half: "bf16" or "fp16" where weights are; None is float32.
    """

    layers: int
    hidden: int
    ffn: int
    heads: int
    groups: int
    head_channels: int
    vocabulary: int
    positions: int
    norm_eps: float
    rope_base: float
    rope_scaling: float | None
    tied: bool
    half: str | None
    mhc: MHCConfig | None

    def flags(self) -> dict[str, object]:
        """Flags of examples/pretrain_gpt.py for this model; True for a switch."""
        flags = {
            "num-layers": self.layers,
            "hidden-size": self.hidden,
            "ffn-hidden-size": self.ffn,
            "num-attention-heads": self.heads,
            "kv-channels": self.head_channels,
            "max-position-embeddings": self.positions,
            "normalization": "RMSNorm",
            "norm-epsilon": self.norm_eps,
            "position-embedding-type": "rope",
            "rotary-base": int(self.rope_base),
            "swiglu": True,
            "disable-bias-linear": True,
            "hidden-dropout": 0.0,
            "attention-dropout": 0.0,
            # Rows that a trainer adds to the vocabulary would start from random values.
            "make-vocab-size-divisible-by": 1,
        }
        if self.groups != self.heads:
            flags |= {"group-query-attention": True, "num-query-groups": self.groups}
        if self.rope_scaling is not None:
            flags |= {"use-rope-scaling": True, "rope-scaling-factor": self.rope_scaling}
        if not self.tied:
            flags["untie-embeddings-and-output-weights"] = True
        if self.half is not None:
            flags[self.half] = True
        if self.mhc is not None:
            flags |= {
                "mhc": True,
                "mhc-num-residual-streams": self.mhc.num_streams,
                "mhc-sinkhorn-iterations": self.mhc.sinkhorn_iterations,
                "mhc-eps": self.mhc.eps,
            }
        return flags


def is_one_of(*fine: object) -> Callable[[object], bool]:
    """A check of a setting's value."""
    return lambda value: value in fine


NOT_SET = is_one_of(None, False)
"""A check that a setting is left out."""


def refuse(source: str, problems: list[str]) -> None:
    """Raises UserError where there are problems: what no Llama has, a line each."""
    if problems:
        lines = "\n".join(problems)
        raise UserError(f"{source}: only Llamas, plain or with mHC, are converted\n{lines}")
