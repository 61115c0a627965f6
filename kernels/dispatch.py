"""Which implementation serves a call: ``backend="auto" | "triton" | "torch"``."""

import logging

logger = logging.getLogger(__name__)

BACKENDS = ("auto", "triton", "torch")

_NO_TRITON = "this version has no Triton kernels yet"
_said: set[str] = set()


def choose_backend(backend: str) -> str:
    """The implementation that serves ``backend``, in words: "torch".

    "auto" says once, in one line, why it did not take Triton; "triton" never falls back.

    Raises:
        ValueError: backend is none of ``BACKENDS``.
        RuntimeError: backend is "triton" and Triton cannot serve the call.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r}: expected one of {', '.join(BACKENDS)}")
    if backend == "triton":
        raise RuntimeError(f"backend='triton': {_NO_TRITON}; use backend='auto' or 'torch'")
    if backend == "auto" and _NO_TRITON not in _said:
        _said.add(_NO_TRITON)
        logger.warning("mHC kernels: PyTorch is in use, not Triton (%s)", _NO_TRITON)
    return "torch"
