"""The exit of the streams, before the model's final norm."""

import torch
from torch import Tensor

from megatron_mhc import kernels

from . import recompute
from .config import MHCConfig
from .parameters import Float32Parameters, logit
from .state import StreamState


class HyperHead(Float32Parameters):
    """Weighs the streams into one: h = sum_i (sigmoid(r (fn @ vec(X)) scale + base) + eps)[i] X[i].

    DeepSeek-V4's head, in every residual mixing. Parameters fn [n, nC], scale [1] and base [n] are
    float32, also in a bf16 model; at their initial values the head is the mean of the streams.

    Args:
        config, hidden_size, norm_eps, sequence_parallel, gradient_accumulation_fusion, device: as
            :class:`HyperConnection`.
    """

    def __init__(
        self,
        config: MHCConfig,
        hidden_size: int,
        *,
        norm_eps: float = 1e-6,
        sequence_parallel: bool = False,
        gradient_accumulation_fusion: bool = False,
        device=None,
    ) -> None:
        super().__init__()
        n = config.num_streams
        self.config = config
        self.norm_eps = norm_eps
        self.gradient_accumulation_fusion = gradient_accumulation_fusion
        shapes = kernels.head_shapes(n, hidden_size)
        self.add_parameters(
            device,
            sequence_parallel,
            fn=torch.zeros(shapes["fn"]),
            scale=torch.full(shapes["scale"], config.init_gating_factor),
            base=torch.full(shapes["base"], logit(1 / n - config.eps)),
        )

    def forward(self, state: StreamState) -> Tensor:
        """h [..., C] of the streams' dtype; a pending merge is formed in the same kernel."""
        if not (self.config.recompute and torch.is_grad_enabled()):
            return self._collapse(*state.tensors())[0]
        return recompute.run(self._collapse, state.tensors(), state.stand_ins())[0][0]

    def _collapse(self, *tensors: Tensor) -> tuple[Tensor]:
        """h of streams (x,) or of a pending merge (x, f, post, comb)."""
        config = self.config
        collapse = kernels.mhc_head if len(tensors) == 1 else kernels.mhc_post_head
        mapping = (self.fn, self.scale, self.base)
        options = {
            "eps": config.eps,
            "norm_eps": self.norm_eps,
            "accumulate_main_grad": self.gradient_accumulation_fusion,
            "backend": config.backend,
        }
        return (collapse(*tensors, *mapping, **options),)
