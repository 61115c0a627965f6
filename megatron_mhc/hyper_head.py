"""The exit of the streams, before the model's final norm."""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_mhc import kernels

from .config import MHCConfig
from .parameters import Float32Parameters, logit
from .recompute import Mapped
from .recompute_mapping import run_mapping
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

    def forward(
        self, state: StreamState, note: Callable[[Mapped | None, Tensor], None] | None = None
    ) -> Tensor:
        """h [..., C] of the streams' dtype; a pending merge is formed in the same kernel.

        Args:
            note: is told the stand-ins for what ``config.recompute`` discarded, and h.
        """
        h, mapped = self._form(state)
        if note is not None:
            note(mapped, h)
        return h

    def _form(self, state: StreamState) -> tuple[Tensor, Mapped | None]:
        tensors = state.tensors()
        if not (self.config.recompute and torch.is_grad_enabled()):
            return self._collapse(*tensors)[1], None
        x, n = tensors[0], self.config.num_streams
        parameters = (self.fn, self.scale, self.base)
        backend = kernels.choose_backend(
            self.config.backend, (*tensors, *parameters), n=n, channels=x.shape[-1]
        )
        (_, h), mapped = run_mapping(self._collapse, tensors, state.stand_ins(), backend)
        return h, mapped

    def _collapse(self, x: Tensor, *merge: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x, h and pre, of streams or of a pending merge (x, f, post, comb)."""
        mapping = (self.fn, self.scale, self.base)
        options = {
            "eps": self.config.eps,
            "norm_eps": self.norm_eps,
            "return_pre": True,
            "accumulate_main_grad": self.gradient_accumulation_fusion,
            "backend": self.config.backend,
        }
        if merge:
            return kernels.mhc_post_head(x, *merge, *mapping, **options)
        return x, *kernels.mhc_head(x, *mapping, **options)
