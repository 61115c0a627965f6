"""Transformer Engine's fused norm and linear layer keeps the norm's output to itself."""

import importlib.util

from .record import Patch


def _build(original):
    def apply_normalization(u, out, weight, bias, eps, quantizer, *rest):
        # Imported here: the patch records must load before Megatron does.
        from megatron_mhc import recompute_sublayer

        results = original(u, out, weight, bias, eps, quantizer, *rest)
        # A quantized output is a byte a channel, and is kept.
        if quantizer is None and out is None:
            recompute_sublayer.report_norm(
                lambda u: original(u, None, weight, bias, eps, None, *rest)[0], u, results[0]
            )
        return results

    return apply_normalization


def _why_not() -> str | None:
    found = importlib.util.find_spec("transformer_engine")
    return None if found else "Transformer Engine is not installed"


PATCH = Patch(
    name="te_normalization",
    target="transformer_engine.pytorch.module.layernorm_linear:apply_normalization",
    reason="LayerNormLinear saves both its input and what its norm made of it; "
    "recompute needs to know the second",
    tested={"2.20.2": "8e3428cbd7105905"},
    build=_build,
    why_not=_why_not,
    package="transformer-engine",
    with_flag="--mhc-recompute",
)
