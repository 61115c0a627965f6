"""Sublayers that keep what Transformer Engine's do, between the streams' entry and exit."""

import torch

from megatron_mhc import HyperConnection, HyperHead, MHCConfig, StreamState, recompute_sublayer
from megatron_mhc.patches import te_normalization
from megatron_mhc.recompute_ahead import InFlight


class NormLinear(torch.autograd.Function):
    """Saves what Transformer Engine's LayerNormLinear saves: its input and what its norm gave."""

    @staticmethod
    def forward(ctx, u, weight):
        flat = u.view(-1, u.shape[-1])
        y = NormLinear.norm(flat)
        ctx.save_for_backward(flat, weight, y)
        return (y @ weight).view(u.shape)

    @staticmethod
    def norm(u):
        """By the patch of Transformer Engine's function, of that function's signature."""
        apply_normalization = te_normalization.PATCH.build(
            lambda u, out, weight, bias, eps, quantizer, *rest: (torch.tanh(u), None, None)
        )
        return apply_normalization(u, None, None, None, 1e-6, None, u.dtype, "RMSNorm", 0, False)[0]

    @staticmethod
    def backward(ctx, df):
        flat, weight, y = ctx.saved_tensors
        du = (df @ weight.t()) * (1 - torch.tanh(flat).square())
        return du, y.t() @ df


class Stack(torch.nn.Module):
    """Sublayers of one NormLinear each, between the streams' entry and exit.

    Args:
        block: sublayers to a recomputed block.

    Attributes:
        in_flight: of the last forward pass, where it is recomputed.
    """

    def __init__(self, mhc: MHCConfig, channels: int, sublayers: int, block: int) -> None:
        super().__init__()
        self.mhc, self.block = mhc, block
        self.connections = torch.nn.ModuleList(
            HyperConnection(mhc, channels, sublayer) for sublayer in range(sublayers)
        )
        self.weights = torch.nn.ParameterList(
            torch.nn.Parameter(torch.randn(channels, channels) / channels**0.5)
            for _ in range(sublayers)
        )
        self.head = HyperHead(mhc, channels)

    def forward(self, h):
        state = StreamState.expand(h, self.mhc.num_streams)
        for index, (connection, weight) in enumerate(zip(self.connections, self.weights)):
            if index % self.block == 0:
                state = state.kept()
            u, residual = connection(state)
            with recompute_sublayer.sublayer(u, residual.u_stand_in) as discard_input:
                f = NormLinear.apply(u, weight)
                discard_input(f)
            state = residual.add(f)
        if state.discarded is not None:
            self.in_flight = InFlight(state.discarded)
        return self.head(state)
