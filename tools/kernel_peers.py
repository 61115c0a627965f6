"""The public mHC kernels that tools/benchmark_kernels.py measures against, where installed.

Each runs one application with its own functions and layouts: the mappings and the aggregation of
the streams, and the merge of a sublayer's output with them; gradients of streams, output and
parameters are added up by autograd as in its own layers.
"""

import importlib
import importlib.metadata

import torch
from torch import Tensor

PEERS = ("te", "te-no-norm", "tilekernels", "liger")
PACKAGES = {"te": "transformer-engine", "tilekernels": "tile-kernels", "liger": "liger-kernel"}
N, ITERATIONS = 4, 20


def _package(backend: str) -> str:
    return PACKAGES[backend.removesuffix("-no-norm")]


def problem(backend: str) -> str | None:
    """Why ``backend`` cannot be measured here, or None."""
    try:
        importlib.metadata.version(_package(backend))
    except importlib.metadata.PackageNotFoundError:
        return f"{_package(backend)} is not installed"
    return None


def versions() -> dict[str, str]:
    """Versions of the peers that are installed."""
    installed = [name for name in PACKAGES if problem(name) is None]
    return {name: importlib.metadata.version(PACKAGES[name]) for name in installed}


def _transformer_engine(inputs: dict[str, Tensor], norm_weight: bool):
    from transformer_engine.pytorch.triton import mhc

    tokens, _, channels = inputs["x"].shape
    # Its own layout: streams innermost, and a batch dimension.
    x = inputs["x"].transpose(1, 2).contiguous().view(tokens, 1, channels, N)
    f = inputs["f"].view(tokens, 1, channels)
    ones = torch.ones(N * channels, device=x.device) if norm_weight else None

    def forward(x, f, phi, alpha, beta):
        u, post, comb = mhc.mhc_generate_mix_and_aggregate(x, phi, alpha, beta, ones)
        return u, mhc.mhc_fused_expand_combine(f, None, post, x, comb, N)

    return forward, [x, f, inputs["fn"], inputs["scale"], inputs["base"].view(1, -1)]


def _tilekernels(inputs: dict[str, Tensor]):
    try:
        functional = importlib.import_module("tile_kernels.modeling.mhc.functional")
    except ModuleNotFoundError:  # 1.0.0 under tilelang 0.1.15: only the second import works
        functional = importlib.import_module("tile_kernels.modeling.mhc.functional")

    def forward(x, f, fn, scale, base):
        u, (post, comb) = functional.mhc_pre(
            x, fn, scale, base, post_mult_value=2.0, sinkhorn_repeat=ITERATIONS
        )
        return u, functional.mhc_post(f, x, post, comb)

    x, f = inputs["x"].unsqueeze(0), inputs["f"].unsqueeze(0)
    return forward, [x, f, inputs["fn"], inputs["scale"], inputs["base"]]


def _liger(inputs: dict[str, Tensor]):
    from liger_kernel.transformers import functional

    def forward(x, f, phi, alpha, base):
        pre, post, residual = functional.liger_mhc_coeffs(
            x, phi, base, alpha[0], alpha[1], alpha[2], tmax=ITERATIONS
        )
        u = functional.liger_mhc_pre(x, pre)
        return u, functional.liger_mhc_post_res(x, f, post, residual)

    phi = inputs["fn"].t().contiguous().bfloat16()
    return forward, [inputs["x"], inputs["f"], phi, inputs["scale"], inputs["base"]]


def operator(op: str, inputs: dict[str, Tensor], backend: str):
    """One application by ``backend`` as (function of its tensors, the tensors); op is post_pre."""
    if backend.startswith("te"):
        return _transformer_engine(inputs, norm_weight=backend == "te")
    return _tilekernels(inputs) if backend == "tilekernels" else _liger(inputs)
