"""mHC operators on residual streams x [..., n, C]; the equations are in :mod:`.reference`.

Every function but :func:`mhc_replay` is differentiable in every tensor argument; all take
``backend="auto" | "triton" | "torch"`` (:mod:`.dispatch`). This package needs torch, and triton
where the Triton kernels serve.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reference
from .dispatch import BACKENDS, check_backend, choose_backend
from .reference import RESIDUAL_MIXINGS
from .served import serves
from .validation import (
    check_eps,
    check_merge,
    check_parameters,
    check_replay,
    check_sinkhorn,
    check_streams,
    head_shapes,
    mapping_shapes,
)

__all__ = [
    "BACKENDS",
    "RESIDUAL_MIXINGS",
    "choose_backend",
    "head_shapes",
    "mapping_shapes",
    "mhc_expand",
    "mhc_head",
    "mhc_mappings",
    "mhc_post",
    "mhc_post_head",
    "mhc_post_pre",
    "mhc_pre",
    "mhc_replay",
    "sinkhorn",
]


def _triton():
    """The operators, imported when first needed: torch alone suffices without a GPU."""
    from . import ops

    return ops


def sinkhorn(
    logits: Tensor, iterations: int = 20, eps: float = 1e-6, *, backend: str = "auto"
) -> Tensor:
    """Doubly stochastic matrices of logits [..., n, n] float32, float32 back (paper eq. 9).

    Columns sum to 1 up to eps; rows as far as ``iterations`` normalisations converge.

    Raises:
        ValueError: a wrong shape, dtype, iterations < 1 or eps outside [0, 1).
    """
    check_sinkhorn(logits, iterations, eps)
    if choose_backend(backend, (logits,), n=logits.shape[-1]) == "triton":
        return _triton().sinkhorn(logits, iterations, eps)
    return reference.sinkhorn(logits, iterations, eps)


def _check_mapping(x, fn, scale, base, residual_mixing, iterations, eps, norm_eps) -> None:
    check_streams(x)
    expected = mapping_shapes(residual_mixing, *x.shape[-2:])
    check_parameters(expected, fn=fn, scale=scale, base=base)
    check_eps(iterations=iterations, eps=eps, norm_eps=norm_eps)


def _check_merge_and_mapping(x, f, post, comb, *mapping) -> None:
    check_merge(x, f, post, comb)
    _check_mapping(x, *mapping)


def _check_head(x, fn, scale, base, eps, norm_eps) -> None:
    check_streams(x)
    check_parameters(head_shapes(*x.shape[-2:]), fn=fn, scale=scale, base=base)
    check_eps(eps=eps, norm_eps=norm_eps)


def _check_merge_and_head(x, f, post, comb, *head) -> None:
    check_merge(x, f, post, comb)
    _check_head(x, *head)


def mhc_mappings(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    residual_mixing: str = "sinkhorn",
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """pre [..., n], post [..., n] and comb [..., n, n], all float32, of streams x [..., n, C].

    Parameters are float32; their shapes depend on ``residual_mixing`` (:func:`mapping_shapes`).
    Paper eq. 7 and 8; ``unconstrained`` is eq. 5.

    Raises:
        ValueError: a wrong shape, dtype, mixing, iterations < 1 or an eps outside [0, 1).
    """
    _check_mapping(x, fn, scale, base, residual_mixing, iterations, eps, norm_eps)
    if backend == "triton":
        raise RuntimeError("backend='triton': mappings alone have no kernel; use mhc_pre")
    check_backend(backend)
    return reference.mhc_mappings(
        x,
        fn,
        scale,
        base,
        residual_mixing=residual_mixing,
        iterations=iterations,
        eps=eps,
        norm_eps=norm_eps,
    )


def mhc_pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    residual_mixing: str = "sinkhorn",
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    return_pre: bool = False,
    accumulate_main_grad: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """What a sublayer reads: u = sum_i pre[i] X[i] (eq. 3), with post and comb for its merge.

    Args:
        x: [..., n, C] streams. fn, scale, base: float32 (:func:`mapping_shapes`).
        return_pre: also give pre, which :func:`mhc_replay` takes.
        accumulate_main_grad: by Triton, and where fn, scale and base all have a float32
            ``main_grad``: the backward pass adds their gradients to it as Megatron's linear layers
            do under ``gradient_accumulation_fusion`` (:mod:`.main_grad`), and autograd gets
            memory that nobody has written in their place. To be used under Megatron's
            DistributedDataParallel only, whose hooks know that, and also added to when only x's
            gradient is asked for. Everywhere else gradients are returned as without it.

    Returns:
        u [..., C] of x's dtype, post [..., n] float32, comb [..., n, n] float32, index (in, out);
        with ``return_pre`` then pre [..., n] float32, without a gradient.

    Raises:
        ValueError: as :func:`mhc_mappings`.
    """
    tensors = (x, fn, scale, base)
    options = (residual_mixing, iterations, eps, norm_eps)
    if serves(_check_mapping, backend, tensors, *options, residual_mixing=residual_mixing):
        *outputs, pre = _triton().pre(
            x, fn, scale, base, iterations, eps, norm_eps, accumulate_main_grad
        )
        return (*outputs, pre) if return_pre else tuple(outputs)
    return reference.mhc_pre(
        x,
        fn,
        scale,
        base,
        return_pre=return_pre,
        residual_mixing=residual_mixing,
        iterations=iterations,
        eps=eps,
        norm_eps=norm_eps,
    )


def mhc_post(x: Tensor, f: Tensor, post: Tensor, comb: Tensor, *, backend: str = "auto") -> Tensor:
    """The merge X'[o] = post[o] f + sum_i comb[i, o] X[i] (eq. 3), [..., n, C] of x's dtype.

    Args:
        x: [..., n, C]. f: [..., C]. post: [..., n] and comb: [..., n, n], both float32.

    Raises:
        ValueError: shapes that do not belong together, or mappings of 16 bits.
    """
    if serves(check_merge, backend, (x, f, post, comb)):
        return _triton().post(x, f, post, comb)
    return reference.mhc_post(x, f, post, comb)


def mhc_post_pre(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    residual_mixing: str = "sinkhorn",
    iterations: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    return_pre: bool = False,
    accumulate_main_grad: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, ...]:
    """:func:`mhc_post` of one sublayer and :func:`mhc_pre` of the next.

    Args:
        accumulate_main_grad: as :func:`mhc_pre`.

    Returns:
        x_next [..., n, C], u [..., C] (both x's dtype), post_next and comb_next (float32); with
        ``return_pre`` then the next sublayer's pre, as :func:`mhc_pre`.

    Raises:
        ValueError: as the two functions.
    """
    tensors = (x, f, post, comb, fn, scale, base)
    options = (residual_mixing, iterations, eps, norm_eps)
    check = _check_merge_and_mapping
    if serves(check, backend, tensors, *options, residual_mixing=residual_mixing):
        *outputs, pre = _triton().post_pre(
            *tensors, iterations, eps, norm_eps, accumulate_main_grad
        )
        return (*outputs, pre) if return_pre else tuple(outputs)
    return reference.mhc_post_pre(
        x,
        f,
        post,
        comb,
        fn,
        scale,
        base,
        return_pre=return_pre,
        residual_mixing=residual_mixing,
        iterations=iterations,
        eps=eps,
        norm_eps=norm_eps,
    )


@torch.no_grad()
def mhc_replay(
    x: Tensor,
    merges: Sequence[tuple[Tensor, Tensor, Tensor] | None],
    pres: Sequence[Tensor],
    *,
    backend: str = "auto",
) -> list[tuple[Tensor, Tensor]]:
    """Streams and inputs of consecutive sublayers again, from the mappings of the forward pass.

    For every sublayer k: X[o] = post_k[o] f_k + sum_i comb_k[i, o] X[i], then
    u_k = sum_i pre_k[i] X[i] (eq. 3). Neither products nor Sinkhorn are made again. The bits are
    those that :func:`mhc_pre` and :func:`mhc_post_pre` gave with the same backend. There is no
    gradient: this is for the backward pass.

    Args:
        x: [..., n, C], the streams before the first merge.
        merges: f [..., C], post [..., n] and comb [..., n, n] (both float32) of the merge before
            each sublayer. The first may be None: the sublayer reads x as it is.
        pres: [..., n] float32 of each sublayer, by ``return_pre`` of the forward pass.

    Returns:
        x_next [..., n, C] and u [..., C], both of x's dtype, of each sublayer; x_next is x itself
        where there is no merge.

    Raises:
        ValueError: shapes or numbers that do not belong together, or mappings of 16 bits.
    """
    check_replay(x, merges, pres)
    tensors = (x, *pres, *(tensor for merge in merges if merge is not None for tensor in merge))
    n, channels = x.shape[-2:]
    if choose_backend(backend, tensors, n=n, channels=channels) == "triton":
        return _triton().replay(x, merges, pres)
    return reference.mhc_replay(x, merges, pres)


def mhc_head(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    return_pre: bool = False,
    accumulate_main_grad: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The exit: streams [..., n, C] weighted by a learned sigmoid into [..., C] of x's dtype.

    Args:
        fn: [n, nC], scale: [1], base: [n], all float32 (DeepSeek-V4's ``hc_head``).
        return_pre, accumulate_main_grad: as :func:`mhc_pre`.

    Returns:
        h [..., C] of x's dtype; with ``return_pre`` then pre [..., n] float32, without a gradient.

    Raises:
        ValueError: a wrong shape or dtype, or an eps outside [0, 1).
    """
    if serves(_check_head, backend, (x, fn, scale, base), eps, norm_eps):
        h, pre = _triton().head(x, fn, scale, base, eps, norm_eps, accumulate_main_grad)
        return (h, pre) if return_pre else h
    options = {"eps": eps, "norm_eps": norm_eps, "return_pre": return_pre}
    return reference.mhc_head(x, fn, scale, base, **options)


def mhc_post_head(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    return_pre: bool = False,
    accumulate_main_grad: bool = False,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """:func:`mhc_post` of the last sublayer and :func:`mhc_head` of what it gave.

    Args:
        x: [..., n, C] and f: [..., C], the streams and the sublayer's output; post: [..., n] and
            comb: [..., n, n], float32. fn: [n, nC], scale: [1], base: [n], float32.
        return_pre, accumulate_main_grad: as :func:`mhc_pre`.

    Returns:
        h [..., C] of x's dtype; with ``return_pre`` x_next [..., n, C], h and pre [..., n].

    Raises:
        ValueError: as the two functions.
    """
    tensors = (x, f, post, comb, fn, scale, base)
    if serves(_check_merge_and_head, backend, tensors, eps, norm_eps):
        outputs = _triton().post_head(*tensors, eps, norm_eps, accumulate_main_grad)
        return outputs if return_pre else outputs[1]
    options = {"eps": eps, "norm_eps": norm_eps, "return_pre": return_pre}
    return reference.mhc_post_head(*tensors, **options)


def mhc_expand(h: Tensor, n: int, *, backend: str = "auto") -> Tensor:
    """The entry: h [..., C] repeated into n streams [..., n, C] of the same dtype.

    Raises:
        ValueError: n < 1.
    """
    if n < 1:
        raise ValueError(f"n={n}: at least 1 stream is needed")
    if choose_backend(backend, (h,), n=n, channels=h.shape[-1]) == "triton":
        return _triton().expand(h, n)
    return reference.mhc_expand(h, n)
