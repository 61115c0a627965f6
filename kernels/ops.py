"""The Triton kernels as operators: autograd, and shapes for torch.compile and export.

Operators take contiguous tensors with any token dimensions: views of them outside would each be a
node of autograd's graph. The functions below make what is not contiguous so. Every backward is an
operator too.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from . import launch
from .expand_kernel import launch_expand
from .launch_backward import backward
from .launch_replay import Merge, launch_replay
from .main_grad import main_grads_of, mark_added
from .operator import on_its_device, operator
from .sinkhorn_kernel import launch_sinkhorn

Mapped = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def _like(reference: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return reference.new_empty(shape, dtype=dtype or reference.dtype)


def _mapping_outputs(x: Tensor, fn: Tensor) -> Mapped:
    """Empty u, post, comb, pre, m and r for streams [..., n, C]."""
    *tokens, n, channels = x.shape
    kept = (0,) if fn.shape[0] == n else tokens
    return (
        _like(x, *tokens, channels),
        _like(fn, *kept, n),
        _like(fn, *kept, n, n),
        _like(fn, *tokens, n),
        _like(fn, *tokens, fn.shape[0]),
        _like(fn, *tokens),
    )


def _arrived(grads: tuple[Tensor | None, ...], x: Tensor, fn: Tensor) -> tuple[Tensor, ...]:
    """Gradients of u, post and comb as the kernels take them; autograd hands over None for an
    unused output.
    """
    *tokens, n, channels = x.shape
    kept = (0,) if fn.shape[0] == n else tokens
    outputs = ((x, (*tokens, channels)), (fn, (*kept, n)), (fn, (*kept, n, n)))
    return tuple(
        like.new_zeros(shape) if grad is None else grad.contiguous()
        for grad, (like, shape) in zip(grads, outputs)
    )


# -- sinkhorn ----------------------------------------------------------------------------------


@operator("sinkhorn_backward", fake=lambda logits, *_: torch.empty_like(logits))
def _sinkhorn_backward(logits: Tensor, grad: Tensor, iterations: int, eps: float) -> Tensor:
    return launch_sinkhorn(logits, grad, iterations, eps)


def _save_sinkhorn(ctx, inputs, output):
    logits, ctx.iterations, ctx.eps = inputs
    ctx.save_for_backward(logits)


def _sinkhorn_grad(ctx, grad):
    (logits,) = ctx.saved_tensors
    return _sinkhorn_backward(logits, grad.contiguous(), ctx.iterations, ctx.eps), None, None


@operator(
    "sinkhorn",
    fake=lambda logits, *_: torch.empty_like(logits),
    save=_save_sinkhorn,
    grad=_sinkhorn_grad,
)
def _sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    return launch_sinkhorn(logits, None, iterations, eps)


# -- expand ------------------------------------------------------------------------------------


@operator("expand_backward", fake=lambda grad, n: _like(grad, grad.shape[0], grad.shape[2]))
def _expand_backward(grad: Tensor, n: int) -> Tensor:
    return launch_expand(grad, n, backward=True)


def _save_expand(ctx, inputs, output):
    ctx.n = inputs[1]


@operator(
    "expand",
    fake=lambda h, n: _like(h, h.shape[0], n, h.shape[1]),
    save=_save_expand,
    grad=lambda ctx, grad: (_expand_backward(grad.contiguous(), ctx.n), None),
)
def _expand(h: Tensor, n: int) -> Tensor:
    return launch_expand(h, n, backward=False)


# -- post --------------------------------------------------------------------------------------


@operator(
    "post_backward",
    fake=lambda x, f, post, comb, _: tuple(torch.empty_like(t) for t in (x, f, post, comb)),
)
def _post_backward(
    x: Tensor, f: Tensor, post: Tensor, comb: Tensor, dx_next: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return backward(x, (f, post, comb), None, None, (dx_next, None, None, None))[:4]


@operator(
    "post",
    fake=lambda x, f, post, comb: torch.empty_like(x),
    save=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
    grad=lambda ctx, grad: _post_backward(*ctx.saved_tensors, grad.contiguous()),
)
def _post(x: Tensor, f: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    return launch.forward(x, (f, post, comb), None)[0]


# -- pre and head ------------------------------------------------------------------------------


@operator(
    "pre_backward",
    fake=lambda x, fn, scale, base, *_: tuple(torch.empty_like(t) for t in (x, fn, scale, base)),
)
def _pre_backward(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    m: Tensor,
    r: Tensor,
    du: Tensor,
    dpost: Tensor,
    dcomb: Tensor,
    iterations: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dx, *_, dfn, dscale, dbase = backward(
        x, None, (fn, scale, base), (x, m, r), (None, du, dpost, dcomb), iterations, eps
    )
    return dx, dfn, dscale, dbase


def _save_pre(ctx, inputs, output):
    *tensors, ctx.iterations, ctx.eps, _ = inputs
    ctx.parameters = ()
    *_, pre, m, r = output
    ctx.mark_non_differentiable(pre, m, r)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, m, r)


def _pre_grad(ctx, du, dpost, dcomb, *_):
    saved = ctx.saved_tensors
    x, fn, scale, base, m, r = saved
    grads = _arrived((du, dpost, dcomb), x, fn)
    numbers = (ctx.iterations, ctx.eps)
    main_grads = main_grads_of(ctx.parameters)
    if main_grads is None:
        return *_pre_backward(*saved, *grads, *numbers), None, None, None
    mapping, mapped = (fn, scale, base), (x, m, r)
    dx, *_ = backward(x, None, mapping, mapped, (None, *grads), *numbers, main_grads)
    return dx, *mark_added(ctx.parameters), None, None, None


@operator("pre", fake=lambda x, fn, *_: _mapping_outputs(x, fn), save=_save_pre, grad=_pre_grad)
def _pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> Mapped:
    return launch.forward(x, None, (fn, scale, base), iterations, eps, norm_eps)


# -- post_pre ----------------------------------------------------------------------------------


@operator(
    "post_pre_backward",
    fake=lambda *arguments: tuple(torch.empty_like(tensor) for tensor in arguments[:7]),
)
def _post_pre_backward(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    x_next: Tensor,
    m: Tensor,
    r: Tensor,
    dx_next: Tensor | None,
    du: Tensor,
    dpost_next: Tensor,
    dcomb_next: Tensor,
    iterations: int,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return backward(
        x,
        (f, post, comb),
        (fn, scale, base),
        (x_next, m, r),
        (dx_next, du, dpost_next, dcomb_next),
        iterations,
        eps,
    )


def _save_post_pre(ctx, inputs, output):
    *tensors, ctx.iterations, ctx.eps, _ = inputs
    ctx.parameters = ()
    x_next, *_, pre, m, r = output
    ctx.mark_non_differentiable(pre, m, r)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*tensors, x_next, m, r)


def _post_pre_grad(ctx, dx_next, du, dpost, dcomb, *_):
    saved = ctx.saved_tensors
    x, merge, mapping, mapped = saved[0], saved[1:4], saved[4:7], saved[7:]
    dx_next = None if dx_next is None else dx_next.contiguous()
    grads = (dx_next, *_arrived((du, dpost, dcomb), x, mapping[0]))
    numbers = (ctx.iterations, ctx.eps)
    main_grads = main_grads_of(ctx.parameters)
    if main_grads is None:
        return *_post_pre_backward(*saved, *grads, *numbers), None, None, None
    streams = backward(x, merge, mapping, mapped, grads, *numbers, main_grads)[:4]
    return *streams, *mark_added(ctx.parameters), None, None, None


@operator(
    "post_pre",
    fake=lambda x, f, post, comb, fn, *_: (torch.empty_like(x), *_mapping_outputs(x, fn)),
    save=_save_post_pre,
    grad=_post_pre_grad,
)
def _post_pre(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return launch.forward(x, (f, post, comb), (fn, scale, base), iterations, eps, norm_eps)


# -- what the package calls --------------------------------------------------------------------


def _tokens(tensor: Tensor, kept: int) -> Tensor:
    """[..., last ``kept`` dimensions] as contiguous [T, ...]."""
    shape = tensor.shape[tensor.dim() - kept :]
    tokens = tensor.numel() // max(1, shape.numel())
    return tensor.reshape(tokens, *shape).contiguous()


def sinkhorn(logits: Tensor, iterations: int, eps: float) -> Tensor:
    """:func:`kernels.sinkhorn` by Triton."""
    return _sinkhorn(_tokens(logits, 2), iterations, eps).view(logits.shape)


def expand(h: Tensor, n: int) -> Tensor:
    """:func:`kernels.mhc_expand` by Triton."""
    return _expand(_tokens(h, 1), n).view(*h.shape[:-1], n, h.shape[-1])


def _contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.contiguous() for tensor in tensors)


def post(x: Tensor, f: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """:func:`kernels.mhc_post` by Triton."""
    return _post(*_contiguous(x, f, post, comb))


def pre(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`kernels.mhc_pre` by Triton, with pre."""
    mapping = _contiguous(fn, scale, base)
    parameters = mapping if accumulate else ()
    x = x.contiguous()
    return _pre(x, *mapping, iterations, eps, norm_eps, parameters=parameters)[:4]


def head(
    x: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    eps: float,
    norm_eps: float,
    accumulate: bool,
) -> tuple[Tensor, Tensor]:
    """:func:`kernels.mhc_head` by Triton, with pre."""
    mapping = _contiguous(fn, scale, base)
    parameters = mapping if accumulate else ()
    u, _, _, pre, _, _ = _pre(x.contiguous(), *mapping, 1, eps, norm_eps, parameters=parameters)
    return u, pre


def post_head(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    eps: float,
    norm_eps: float,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """:func:`kernels.mhc_post_head` by Triton, with x_next and pre."""
    merge = _contiguous(x, f, post, comb)
    mapping = _contiguous(fn, scale, base)
    parameters = mapping if accumulate else ()
    x_next, u, _, _, pre, _, _ = _post_pre(
        *merge, *mapping, 1, eps, norm_eps, parameters=parameters
    )
    return x_next, u, pre


def post_pre(
    x: Tensor,
    f: Tensor,
    post: Tensor,
    comb: Tensor,
    fn: Tensor,
    scale: Tensor,
    base: Tensor,
    iterations: int,
    eps: float,
    norm_eps: float,
    accumulate: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """:func:`kernels.mhc_post_pre` by Triton, with pre."""
    merge = _contiguous(x, f, post, comb)
    mapping = _contiguous(fn, scale, base)
    parameters = mapping if accumulate else ()
    return _post_pre(*merge, *mapping, iterations, eps, norm_eps, parameters=parameters)[:5]


@on_its_device
def replay(
    x: Tensor, merges: Sequence[Merge | None], pres: Sequence[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """:func:`kernels.mhc_replay` by Triton."""
    dense = [None if merge is None else _contiguous(*merge) for merge in merges]
    formed = launch_replay(x.contiguous(), dense, _contiguous(*pres))
    return [(x, u) if merge is None else (x_next, u) for merge, (x_next, u) in zip(merges, formed)]
