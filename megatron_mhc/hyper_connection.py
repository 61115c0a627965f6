"""The connection of one sublayer to the residual streams."""

import torch
from torch import Tensor

from megatron_mhc import kernels

from .config import MHCConfig
from .parameters import Float32Parameters, logit, rotate
from .recompute_mapping import run_mapping
from .state import Residual, StreamState

OFF_DIAGONAL_LOGIT = -4.0
"""Initial Sinkhorn logit off the diagonal (0 on it): comb starts at 0.95 on the diagonal, n = 4."""


class HyperConnection(Float32Parameters):
    """Reads one sublayer's input from the streams and says how its output is merged back.

        u, residual = connection(state)
        state = residual.add(sublayer(u))

    The equations are those of :mod:`megatron_mhc.kernels.reference`. Parameters ``fn``, ``scale``
    and ``base`` are float32, also in a bf16 model; their shapes are ``kernels.mapping_shapes``.
    At its initial values the connection computes the plain residual: post is 1, pre sums to 1.

    Args:
        config: settings shared by the model's connections; at least 2 streams.
        hidden_size: C.
        sublayer: index of the sublayer in the model, from 0; chooses the stream read most at first.
        norm_eps: the model's RMSNorm epsilon, inside the root of the mappings' RMS.
        sequence_parallel: mark the parameters for Megatron's sequence parallelism.
        gradient_accumulation_fusion: Megatron's setting: the Triton kernels add the parameters'
            gradients to their ``main_grad`` (``kernels.mhc_pre``'s ``accumulate_main_grad``).
        device: where the parameters live.

    Raises:
        ValueError: a single stream, which is the plain residual.
    """

    def __init__(
        self,
        config: MHCConfig,
        hidden_size: int,
        sublayer: int = 0,
        *,
        norm_eps: float = 1e-6,
        sequence_parallel: bool = False,
        gradient_accumulation_fusion: bool = False,
        device=None,
    ) -> None:
        super().__init__()
        n = config.num_streams
        if n < 2:
            raise ValueError(f"num_streams={n}: one stream is the plain residual, without mHC")
        self.config = config
        self.norm_eps = norm_eps
        self.gradient_accumulation_fusion = gradient_accumulation_fusion
        shapes = kernels.mapping_shapes(config.residual_mixing, n, hidden_size)
        self.add_parameters(
            device,
            sequence_parallel,
            fn=torch.zeros(shapes["fn"]),
            scale=torch.full(shapes["scale"], config.init_gating_factor),
            base=_initial_base(config, sublayer),
        )

    def forward(self, state: StreamState) -> tuple[Tensor, Residual]:
        """The sublayer's input u [..., C], and what merges its output.

        Args:
            state: streams [..., n, C]; a pending merge is formed together with the mappings. With
                ``config.recompute`` the streams and u, and what autograd saves of them, are
                discarded.
        """
        tensors = state.tensors()
        if not (self.config.recompute and torch.is_grad_enabled()):
            x, u, post, comb, _ = self._map(*tensors)
            return u, Residual(x, post, comb)
        (x, u, post, comb), mapped = run_mapping(
            self._map, tensors, state.stand_ins(), self._backend(*tensors)
        )
        return u, Residual(x, post, comb, mapped)

    def _backend(self, x: Tensor, *merge: Tensor) -> str:
        """What serves :meth:`_map`: "triton" or "torch"."""
        n, channels = x.shape[-2:]
        mixing = self.config.residual_mixing
        tensors = (x, *merge, self.fn, self.scale, self.base)
        return kernels.choose_backend(
            self.config.backend, tensors, n=n, channels=channels, residual_mixing=mixing
        )

    def _map(self, x: Tensor, *merge: Tensor) -> tuple[Tensor, ...]:
        """x, u, post, comb and pre, of streams or of a pending merge (x, f, post, comb)."""
        config = self.config
        mapping = (self.fn, self.scale, self.base)
        options = {
            "residual_mixing": config.residual_mixing,
            "iterations": config.sinkhorn_iterations,
            "eps": config.eps,
            "norm_eps": self.norm_eps,
            "return_pre": True,
            "accumulate_main_grad": self.gradient_accumulation_fusion,
            "backend": config.backend,
        }
        if merge:
            return kernels.mhc_post_pre(x, *merge, *mapping, **options)
        return x, *kernels.mhc_pre(x, *mapping, **options)


def _initial_base(config: MHCConfig, sublayer: int) -> Tensor:
    """base at which pre sums to 1, post is 1, and comb is the identity or near it."""
    n = config.num_streams
    if config.residual_mixing == "unconstrained":
        # Hyper-connections as published: one-hot pre, post of ones, identity.
        one_hot = torch.eye(n)[sublayer % n]
        return torch.cat([one_hot, torch.ones(n), torch.eye(n).flatten()])
    # pre is a sigmoid plus eps.
    pre = torch.tensor([logit(weight - config.eps) for weight in rotate(sublayer, n)])
    post = torch.zeros(n)  # 2 sigmoid(0) = 1
    if config.residual_mixing == "identity":
        return torch.cat([pre, post])
    comb = OFF_DIAGONAL_LOGIT * (1 - torch.eye(n))
    return torch.cat([pre, post, comb.flatten()])
