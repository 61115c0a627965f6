"""Checks on what callers hand to the kernels; each error names the argument and what would do."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .reference import RESIDUAL_MIXINGS


def mapping_shapes(residual_mixing: str, n: int, channels: int) -> dict[str, tuple[int, ...]]:
    """Parameter shapes of one application's mappings.

    Returns:
        fn, scale and base shapes for n streams of ``channels`` channels.

    Raises:
        ValueError: unknown ``residual_mixing``.
    """
    if residual_mixing == "sinkhorn":
        return {"fn": ((2 + n) * n, n * channels), "scale": (3,), "base": ((2 + n) * n,)}
    if residual_mixing == "identity":
        return {"fn": (2 * n, n * channels), "scale": (2,), "base": (2 * n,)}
    if residual_mixing == "unconstrained":
        return {"fn": (2 + n, channels), "scale": (3,), "base": ((2 + n) * n,)}
    raise ValueError(
        f"residual_mixing={residual_mixing!r}: expected one of {', '.join(RESIDUAL_MIXINGS)}"
    )


def head_shapes(n: int, channels: int) -> dict[str, tuple[int, ...]]:
    """fn, scale and base shapes of the exit head for n streams of ``channels`` channels."""
    return {"fn": (n, n * channels), "scale": (1,), "base": (n,)}


def check_streams(x: Tensor) -> None:
    """x is a floating tensor [..., n, C]."""
    if x.dim() < 2 or not x.is_floating_point():
        raise ValueError(f"x is {tuple(x.shape)} {x.dtype}: expected floating streams [..., n, C]")


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} is {tuple(tensor.shape)}: expected {tuple(shape)}")


def check_parameters(expected: dict[str, tuple[int, ...]], **parameters: Tensor) -> None:
    """Shapes as expected, and never less than float32: Sinkhorn is exponential in the logits."""
    for name, parameter in parameters.items():
        check_shape(name, parameter, expected[name])
        if parameter.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name} is {parameter.dtype}: mapping parameters stay float32, in bf16 models too"
            )


def check_mapping(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    """A mapping of every token, as exact as the operator that gave it."""
    check_shape(name, tensor, shape)
    if tensor.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"{name} is {tensor.dtype}: mappings stay float32, in bf16 models too")


def check_merge(x: Tensor, f: Tensor, post: Tensor, comb: Tensor) -> None:
    """f [..., C], post [..., n] and comb [..., n, n] belong to x [..., n, C]."""
    check_streams(x)
    *tokens, n, channels = x.shape
    check_shape("f", f, (*tokens, channels))
    check_mapping("post", post, (*tokens, n))
    check_mapping("comb", comb, (*tokens, n, n))


def check_replay(
    x: Tensor, merges: Sequence[tuple[Tensor, Tensor, Tensor] | None], pres: Sequence[Tensor]
) -> None:
    """A merge and a pre [..., n] for each sublayer; only the first merge may be None."""
    check_streams(x)
    if not pres or len(merges) != len(pres):
        raise ValueError(
            f"{len(merges)} merges and {len(pres)} pres: expected one of each for every sublayer"
        )
    for k, (merge, pre) in enumerate(zip(merges, pres)):
        check_mapping(f"pres[{k}]", pre, x.shape[:-1])
        if merge is not None:
            check_merge(x, *merge)
        elif k:
            raise ValueError(f"merges[{k}] is None: only the first sublayer may read x as it is")


def check_sinkhorn(logits: Tensor, iterations: int, eps: float) -> None:
    if logits.dim() < 2 or logits.shape[-1] != logits.shape[-2]:
        raise ValueError(f"logits are {tuple(logits.shape)}: expected [..., n, n]")
    if logits.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"logits are {logits.dtype}: expected float32")
    check_eps(iterations=iterations, eps=eps)


def check_eps(*, iterations: int = 1, eps: float = 0.0, norm_eps: float = 0.0) -> None:
    if iterations < 1:
        raise ValueError(f"iterations={iterations}: at least 1 is needed")
    for name, value in (("eps", eps), ("norm_eps", norm_eps)):
        if not 0 <= value < 1:
            raise ValueError(f"{name}={value}: expected 0 <= {name} < 1")
