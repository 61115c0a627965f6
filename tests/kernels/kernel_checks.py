"""Random inputs of the mHC operators, and Triton against the float64 reference."""

import torch

from megatron_mhc import kernels
from megatron_mhc.kernels import reference

OPTIONS = {"iterations": 20, "eps": 1e-6, "norm_eps": 1e-6}
# Relative errors ||ours - float64|| / ||float64||. bfloat16: the streams' own rounding. float32:
# sums of a few thousand terms; scale's and base's gradients are sums over tokens that cancel.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2}


def streams_inputs(tokens, n, channels, dtype, std=1.0, device="cpu"):
    """x, f, post, comb, fn, scale and base; ``std`` is about that of the mapping's logits."""
    count = (2 + n) * n
    make = {"device": device}
    return [
        torch.randn(*tokens, n, channels, **make).to(dtype),
        torch.randn(*tokens, channels, **make).to(dtype),
        2 * torch.rand(*tokens, n, **make),
        reference.sinkhorn(torch.randn(*tokens, n, n, **make)),
        torch.randn(count, n * channels, **make) * std / (n * channels) ** 0.5,
        torch.rand(3, **make) + 0.5,
        0.5 * torch.randn(count, **make),
    ]


def operators(n):
    """Every operator as (name, function of all inputs and a backend, indices of its inputs)."""

    def post(x, f, post, comb, backend):
        return (kernels.mhc_post(x, f, post, comb, backend=backend),)

    def pre(x, fn, scale, base, backend):
        return kernels.mhc_pre(x, fn, scale, base, **OPTIONS, backend=backend)

    def post_pre(*inputs, backend):
        return kernels.mhc_post_pre(*inputs, **OPTIONS, backend=backend)

    def head(x, fn, scale, base, backend):
        options = {"eps": 1e-6, "norm_eps": 1e-6, "backend": backend}
        return (kernels.mhc_head(x, fn[:n], scale[:1], base[:n], **options),)

    def post_head(x, f, post, comb, fn, scale, base, backend):
        options = {"eps": 1e-6, "norm_eps": 1e-6, "backend": backend}
        merge = (x, f, post, comb)
        return (kernels.mhc_post_head(*merge, fn[:n], scale[:1], base[:n], **options),)

    def expand(f, backend):
        return (kernels.mhc_expand(f, n, backend=backend),)

    mapping = (4, 5, 6)
    return [
        ("post", post, (0, 1, 2, 3)),
        ("pre", pre, (0, *mapping)),
        ("post_pre", post_pre, tuple(range(7))),
        ("head", head, (0, *mapping)),
        ("post_head", post_head, tuple(range(7))),
        ("expand", expand, (1,)),
    ]


def run(function, inputs, weights, backend):
    """Outputs, then the gradients of every input under the gradients ``weights`` of the outputs."""
    inputs = [tensor.detach().requires_grad_() for tensor in inputs]
    outputs = function(*inputs, backend=backend)
    return [*outputs, *torch.autograd.grad(outputs, inputs, weights)]


def output_weights(function, inputs):
    """Random gradients of the outputs."""
    return [torch.randn_like(output) for output in function(*inputs, backend="torch")]


def relative_error(ours, exact):
    return pooled_error([(ours, exact)])


def pooled_error(pairs):
    """||ours - exact|| / ||exact|| of all pairs (ours, exact) as one vector."""
    missed = sum((ours.double() - exact.double()).square().sum() for ours, exact in pairs)
    whole = sum(exact.double().square().sum() for _, exact in pairs)
    return (missed.sqrt() / whole.sqrt().clamp_min(1e-30)).item()


def errors(function, draw, draws=1, backends=("triton", "torch")):
    """Relative errors of outputs and gradients against float64, a list for each backend.

    Args:
        draw: gives fresh inputs; all ``draws`` of them count as one vector. A gradient of few
            numbers (scale has one to three) is off by luck as much as by arithmetic: where its
            sum nearly cancels, one draw's error is many times what is usual.
    """
    pairs = {backend: [] for backend in backends}
    for _ in range(draws):
        inputs = draw()
        weights = output_weights(function, inputs)
        exact = run(function, [t.double() for t in inputs], [w.double() for w in weights], "torch")
        for backend in backends:
            pairs[backend].append(zip(run(function, inputs, weights, backend), exact))
    return [[pooled_error(column) for column in zip(*pairs[backend])] for backend in backends]


def replay_inputs(tokens, n, channels, sublayers, dtype, backend, device="cpu"):
    """A forward pass through ``sublayers`` mappings with a merge before each but the first.

    Returns:
        The streams at the start; merges and pres for mhc_replay; (x_next, u) of each sublayer.
    """
    options = {**OPTIONS, "return_pre": True, "backend": backend}
    entered, *_, fn, scale, base = streams_inputs(tokens, n, channels, dtype, device=device)
    u, *merge, pre = kernels.mhc_pre(entered, fn, scale, base, **options)
    x, merges, pres, formed = entered, [None], [pre], [(entered, u)]
    for _ in range(sublayers - 1):
        merges.append((torch.randn_like(u), *merge))
        x, u, *merge, pre = kernels.mhc_post_pre(x, *merges[-1], fn, scale, base, **options)
        pres.append(pre)
        formed.append((x, u))
    return entered, (merges, pres), formed
