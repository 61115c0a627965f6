"""The mathematics of manifold-constrained hyper-connections (arXiv 2512.24880) in plain PyTorch.

This file is the oracle of every kernel: any number of streams, any floating dtype, differentiable
by autograd. Tokens are whatever leading dimensions a tensor has (written ``...`` below).

    n  streams          C  channels          X    [..., n, C]  the residual streams of a token
    f  [..., C]         a sublayer's output (attention or MLP)
    u  [..., C]         a sublayer's input, before its own norm

One application, with vec(X) row-major in (stream, channel) and sigma the logistic function:

    r     = rsqrt(mean(vec(X)^2) + norm_eps)
    m     = r * (fn @ vec(X))                     fn [(2+n)n, nC], rows pre | post | comb
    pre   = sigma(m_pre * scale[0] + base_pre) + eps
    post  = 2 sigma(m_post * scale[1] + base_post)
    comb  = sinkhorn(m_comb * scale[2] + base_comb)       [n, n], index (in, out): H_res = comb^T
    u     = sum_i pre[i] X[i]
    X'[o] = post[o] f + sum_i comb[i, o] X[i]

Streams keep their dtype; mappings and accumulation are float32, or float64 for float64 input.
The mappings agree with DeepSeek-V4's released code and, at eps = 0, with eq. 3 and 7 to 9 of the
paper, written for the transpose of H_res: column sums of comb are exact, row sums approximate.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

RESIDUAL_MIXINGS = ("sinkhorn", "unconstrained", "identity")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the dtype of mappings and sums over ``dtype`` streams."""
    return torch.promote_types(dtype, torch.float32)


def sinkhorn(logits: Tensor, iterations: int = 20, eps: float = 1e-6) -> Tensor:
    """Doubly stochastic matrices by Sinkhorn-Knopp (paper eq. 9, DeepSeek-V4's eps).

        M = softmax(L, -1) + eps;  M /= M.sum(-2) + eps
        then iterations - 1 times:  M /= M.sum(-1) + eps;  M /= M.sum(-2) + eps

    Args:
        logits: [..., n, n] float32 or float64.
        iterations: column normalisations, at least 1; the last step normalises columns.
        eps: added to the softmax and to every sum.

    Returns:
        [..., n, n] of the logits' dtype; columns sum to 1 up to eps, rows up to convergence.
    """
    matrix = logits.softmax(-1) + eps
    matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    for _ in range(iterations - 1):
        matrix = matrix / (matrix.sum(-1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(-2, keepdim=True) + eps)
    return matrix


def rms_norm(x: Tensor, norm_eps: float) -> Tensor:
    """r x with r = rsqrt(mean(x^2) + norm_eps) over the last dimension, without a weight.

    The mappings are r (fn @ vec(X)) = fn @ (r vec(X)). The second order is that of DeepSeek-V4's
    modules in transformers; where logits are near 100, the other one rounds to 1e-5 of it.
    """
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm_eps)


def products(normed: Tensor, fn: Tensor) -> Tensor:
    """fn @ normed, of every token, in their own dtype: autocast would round both to bfloat16."""
    if normed.is_meta:  # which autocast does not know
        return normed @ fn.T
    with torch.autocast(normed.device.type, enabled=False):
        return normed @ fn.T


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
) -> tuple[Tensor, Tensor, Tensor]:
    """The three mappings of one application (paper eq. 7 and 8; ``unconstrained``: eq. 5).

    Args:
        x: [..., n, C] streams.
        fn, scale, base: float32 parameters; shapes by ``residual_mixing``:
            sinkhorn       fn [(2+n)n, nC], scale [3], base [(2+n)n]
            identity       fn [2n, nC],     scale [2], base [2n]       comb is the identity
            unconstrained  fn [2+n, C],     scale [3], base [(2+n)n]   tanh, stream by stream
        residual_mixing: one of ``RESIDUAL_MIXINGS``.
        iterations, eps: of :func:`sinkhorn`; eps is also added to pre.
        norm_eps: inside the root of the RMS.

    Returns:
        pre [..., n], post [..., n], comb [..., n, n] in the accumulation dtype.
    """
    n = x.shape[-2]
    x = x.to(accumulation_dtype(x.dtype))
    if residual_mixing == "unconstrained":
        m = torch.tanh(products(rms_norm(x, norm_eps), fn))  # [..., n, 2+n], a row per stream
        pre = m[..., 0] * scale[0] + base[:n]
        post = m[..., 1] * scale[1] + base[n : 2 * n]
        comb = m[..., 2:] * scale[2] + base[2 * n :].unflatten(-1, (n, n))
        return pre, post, comb

    m = products(rms_norm(x.flatten(-2), norm_eps), fn)
    pre = torch.sigmoid(m[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(m[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    if residual_mixing == "identity":
        comb = torch.eye(n, dtype=m.dtype, device=m.device).expand(*m.shape[:-1], n, n)
    else:
        logits = m[..., 2 * n :] * scale[2] + base[2 * n :]
        comb = sinkhorn(logits.unflatten(-1, (n, n)), iterations, eps)
    return pre, post, comb


def aggregate(x: Tensor, pre: Tensor) -> Tensor:
    """u = sum_i pre[i] X[i]: [..., n, C] and [..., n] to [..., C] of x's dtype (H_pre X, eq. 3)."""
    return (pre.unsqueeze(-1) * x.to(pre.dtype)).sum(-2).to(x.dtype)


def mhc_pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    return_pre: bool = False,
    **mapping_options,
) -> tuple[Tensor, ...]:
    """Mappings and aggregation; arguments as :func:`mhc_mappings`.

    Returns:
        u [..., C] of x's dtype, post [..., n] and comb [..., n, n] in the accumulation dtype; with
        ``return_pre`` then pre [..., n], without a gradient.
    """
    pre, post, comb = mhc_mappings(x, fn, scale, base, **mapping_options)
    outputs = (aggregate(x, pre), post, comb)
    return (*outputs, pre.detach()) if return_pre else outputs


def mhc_post(x: Tensor, f: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The merge X'[o] = post[o] f + sum_i comb[i, o] X[i] (paper eq. 3).

    Args:
        x: [..., n, C] streams before the sublayer.
        f: [..., C] the sublayer's output.
        post: [..., n]; comb: [..., n, n], index (in, out).

    Returns:
        [..., n, C] of x's dtype.
    """
    wide = x.to(comb.dtype)
    merged = post.unsqueeze(-1) * f.to(comb.dtype).unsqueeze(-2)
    # Stream by stream: a batch of n x n matrix products is twice as slow on a CPU.
    for i in range(x.shape[-2]):
        merged = torch.addcmul(merged, comb[..., i, :, None], wide[..., i, None, :])
    return merged.to(x.dtype)


def mhc_post_pre(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    **pre_options,
) -> tuple[Tensor, ...]:
    """:func:`mhc_post`, then :func:`mhc_pre` of the next sublayer on what it gave.

    Returns:
        x_next [..., n, C], then what :func:`mhc_pre` gives.
    """
    x_next = mhc_post(x, f, post, comb)
    return x_next, *mhc_pre(x_next, fn, scale, base, **pre_options)


def mhc_replay(
    x: Tensor, merges: Sequence[tuple[Tensor, Tensor, Tensor] | None], pres: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Merges and aggregations of consecutive sublayers, their mappings given.

    Args:
        x: [..., n, C]. merges: (f, post, comb) before each sublayer; None: x is what it reads.
        pres: [..., n] of each sublayer.

    Returns:
        x_next [..., n, C] and u [..., C] of each sublayer.
    """
    formed = []
    for merge, pre in zip(merges, pres):
        x = x if merge is None else mhc_post(x, *merge)
        formed.append((x, aggregate(x, pre)))
    return formed


def mhc_post_head(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    return_pre: bool = False,
    **head_options,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """:func:`mhc_post`, then :func:`mhc_head` on what it gave.

    Returns:
        h [..., C] of x's dtype; with ``return_pre`` x_next [..., n, C], h and the head's pre.
    """
    x_next = mhc_post(x, f, post, comb)
    head = mhc_head(x_next, fn, scale, base, return_pre=return_pre, **head_options)
    return (x_next, *head) if return_pre else head


def mhc_head(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    *,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
    return_pre: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """The exit: h = sum_i (sigma(r (fn @ vec(X)) scale + base) + eps)[i] X[i] (DeepSeek-V4's head).

    Args:
        x: [..., n, C]; fn: [n, nC]; scale: [1]; base: [n].

    Returns:
        h [..., C] of x's dtype, what the final norm sees; with ``return_pre`` then the sigmoid's
        sum pre [..., n], without a gradient.
    """
    flat = x.to(accumulation_dtype(x.dtype)).flatten(-2)
    m = products(rms_norm(flat, norm_eps), fn)
    pre = torch.sigmoid(m * scale + base) + eps
    h = aggregate(x, pre)
    return (h, pre.detach()) if return_pre else h


def mhc_expand(h: Tensor, n: int) -> Tensor:
    """The entry: [..., C] repeated into [..., n, C], in memory of its own."""
    return h.unsqueeze(-2).repeat(*[1] * (h.dim() - 1), n, 1)
