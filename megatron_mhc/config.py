"""What one model's hyper-connections are: the settings that all of its layers share."""

from dataclasses import dataclass

from megatron_mhc.kernels import BACKENDS, RESIDUAL_MIXINGS


@dataclass(frozen=True)
class MHCConfig:
    """Settings of manifold-constrained hyper-connections (arXiv 2512.24880).

    Attributes:
        num_streams: n, residual streams per token; 1 is the plain residual.
        sinkhorn_iterations: column normalisations of Sinkhorn-Knopp (paper: 20).
        init_gating_factor: initial value of every scale (paper: 0.01).
        residual_mixing: how streams mix across a sublayer. "sinkhorn": doubly stochastic, mHC.
            "unconstrained": hyper-connections as in the paper's eq. 5, the unstable baseline.
            "identity": each stream keeps to itself.
        eps: added to the softmax, to Sinkhorn's sums and to pre (DeepSeek-V4's hc_eps).
        backend: "auto" (Triton on a GPU it supports, else torch), "triton" or "torch".
        recompute: discard what mHC adds to the activations and replay it in the backward pass.
        recompute_layer_num: transformer layers (two sublayers each) to a recomputed block; None is
            the paper's optimum for the layers of the stage.

    Raises:
        ValueError: a value outside its range; the message names it and what would do.
    """

    num_streams: int = 4
    sinkhorn_iterations: int = 20
    init_gating_factor: float = 0.01
    residual_mixing: str = "sinkhorn"
    eps: float = 1e-6
    backend: str = "auto"
    recompute: bool = False
    recompute_layer_num: int | None = None

    def __post_init__(self) -> None:
        # fn grows with n^3, and at 64 streams initial weights are still well above the largest eps.
        for name, most in (("num_streams", 64), ("sinkhorn_iterations", 1000)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= most:
                raise ValueError(f"{name}={value!r}: expected a whole number from 1 to {most}")
        if not 0 <= self.eps <= 1e-3:
            raise ValueError(f"eps={self.eps!r}: expected 0 <= eps <= 0.001 (DeepSeek-V4: 1e-6)")
        if not abs(self.init_gating_factor) <= 1:
            raise ValueError(
                f"init_gating_factor={self.init_gating_factor!r}: expected -1 to 1 (paper: 0.01)"
            )
        block = self.recompute_layer_num
        if block is not None and (
            not isinstance(block, int) or isinstance(block, bool) or block < 1
        ):
            raise ValueError(
                f"recompute_layer_num={block!r}: expected a number of layers, 1 or more"
            )
        if block is not None and not self.recompute:
            raise ValueError(
                f"recompute_layer_num={block}: has no effect without recompute=True; add it or "
                "leave it out"
            )
        for name, choices in (("residual_mixing", RESIDUAL_MIXINGS), ("backend", BACKENDS)):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name}={getattr(self, name)!r}: expected one of {', '.join(choices)}"
                )
