"""Gains and mean mappings of a running model, as the paper defines them (section 3.1 and 5.4).

The gain of a mapping is the largest absolute row sum of H_res (forward: what it can do to the
signal) or column sum (backward: to the gradient), averaged over the tokens of one sequence. The
composite is the product of H_res over all sublayers, per token, before the average: about 3000 in
unconstrained hyper-connections at 27B parameters, 1.6 in mHC.
"""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from megatron.core import mpu
from megatron.training import get_args, get_tensorboard_writer, get_wandb_writer
from torch import Tensor

from megatron_mhc import kernels

from .hyper_connection import HyperConnection
from .layer import MHCTransformerLayer
from .state import Residual


@dataclass(frozen=True)
class MappingRecord:
    """One sublayer's mappings on the first sequence of a micro-batch, float32.

    Attributes:
        name: "layer_003/attention" or "layer_003/mlp".
        pre: [s, n]; post: [s, n]; comb: [s, n, n], index (in, out).
    """

    name: str
    pre: Tensor
    post: Tensor
    comb: Tensor


def hyper_connections(model: torch.nn.Module) -> Iterator[tuple[str, HyperConnection]]:
    """The model's connections by name, in the order in which a token meets them."""
    for layer in model.modules():
        if isinstance(layer, MHCTransformerLayer):
            name = f"layer_{layer.layer_number:03d}"
            yield f"{name}/attention", layer.self_attention_hyper_connection
            yield f"{name}/mlp", layer.mlp_hyper_connection


@torch.no_grad()
def _record(records, name, connection, inputs, output) -> None:
    residual: Residual = output[1]
    config = connection.config
    x = residual.x[:, 0]
    pre, post, comb = kernels.mhc_mappings(
        x,
        connection.fn,
        connection.scale,
        connection.base,
        residual_mixing=config.residual_mixing,
        iterations=config.sinkhorn_iterations,
        eps=config.eps,
        norm_eps=connection.norm_eps,
        backend="torch",  # there is no kernel of mappings alone
    )
    records.append(MappingRecord(name, pre, post, comb))


@contextlib.contextmanager
def recorded(model: torch.nn.Module) -> Iterator[list[MappingRecord]]:
    """Collects the mappings of the forward pass inside the block; hooks are gone after it."""
    records: list[MappingRecord] = []
    handles = [
        connection.register_forward_hook(functools.partial(_record, records, name))
        for name, connection in hyper_connections(model)
    ]
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


def forward_gain(comb: Tensor) -> Tensor:
    """The largest absolute row sum of H_res, max_o |sum_i comb[i, o]|: [..., n, n] to [...]."""
    return comb.sum(-2).abs().amax(-1)


def backward_gain(comb: Tensor) -> Tensor:
    """The largest absolute column sum of H_res, max_i |sum_o comb[i, o]|: [..., n, n] to [...]."""
    return comb.sum(-1).abs().amax(-1)


def summarize(records: list[MappingRecord]) -> dict[str, Tensor]:
    """Scalars to log, by name, averaged over the recorded sequence.

    Per sublayer: forward and backward gain, Sinkhorn deviation (largest distance of a row or column
    sum from 1), mean pre, mean post, mean diagonal of comb. Of the model: composite gains.
    """
    scalars: dict[str, Tensor] = {}
    composite = None
    for record in records:
        comb = record.comb.float()
        sums = torch.cat([comb.sum(-1), comb.sum(-2)], dim=-1)
        values = {
            "forward_gain": forward_gain(comb),
            "backward_gain": backward_gain(comb),
            "sinkhorn_deviation": (sums - 1).abs().amax(-1),
            "pre": record.pre.mean(-1),
            "post": record.post.mean(-1),
            "comb_diagonal": comb.diagonal(dim1=-2, dim2=-1).mean(-1),
        }
        for quantity, per_token in values.items():
            scalars[f"mhc-{quantity}/{record.name}"] = per_token.mean()
        composite = comb if composite is None else composite @ comb
    scalars["mhc/composite_forward_gain"] = forward_gain(composite).mean()
    scalars["mhc/composite_backward_gain"] = backward_gain(composite).mean()
    return scalars


def _mean_over_token_shards(scalars: dict[str, Tensor]) -> dict[str, float]:
    """Averages over the ranks that hold parts of the sequence (sequence and context parallel)."""
    values = torch.stack(list(scalars.values()))
    group = mpu.get_tensor_and_context_parallel_group()
    if group.size() > 1:
        torch.distributed.all_reduce(values, group=group)
        values /= group.size()
    return dict(zip(scalars, values.tolist(), strict=True))


class GainLog:
    """Logs every ``--mhc-log-gain-interval`` steps, and step 1, to Megatron's writers.

    Between these steps it costs one comparison. All ranks of a model-parallel group must use one.
    """

    def __init__(self) -> None:
        self._last_step = 0

    def _due(self, model: torch.nn.Module) -> int | None:
        """The step to log in this micro-batch, the first of its step; else None."""
        args = get_args()
        if not args.mhc or not args.mhc_log_gain_interval or not model.training:
            return None
        step = args.curr_iteration + 1
        if step == self._last_step or (step > 1 and step % args.mhc_log_gain_interval):
            return None
        self._last_step = step
        return step

    @contextlib.contextmanager
    def around_forward(self, model: torch.nn.Module) -> Iterator[None]:
        """Wraps a model's forward pass."""
        step = self._due(model)
        if step is None:
            yield
            return
        with recorded(model) as records:
            yield
        if not records:  # --mhc-num-residual-streams 1 is a plain model
            return
        scalars = _mean_over_token_shards(summarize(records))
        if writer := get_tensorboard_writer():
            for name, value in scalars.items():
                writer.add_scalar(name, value, step)
        if wandb := get_wandb_writer():
            wandb.log(scalars, step)
