"""Manifold-constrained hyper-connections (mHC) for Megatron-core.

    from megatron_mhc import MHCConfig, HyperConnection
    from megatron_mhc import kernels

Importing this package alone imports neither torch nor Megatron; each name brings what it needs:
``kernels``, MHCConfig, HyperConnection, HyperHead and StreamState torch, the rest Megatron.
"""

import importlib
from pathlib import Path

__version__ = "0.1.0"

_HOMES = {
    "HyperConnection": "hyper_connection",
    "HyperHead": "hyper_head",
    "MHCConfig": "config",
    "PendingMerge": "state",
    "StreamState": "state",
    "get_mhc_block_spec": "specs",
}

__all__ = ["__version__", *_HOMES]

# In a bare checkout kernels/ and patches/ lie beside this folder, not in it as when installed.
_checkout = Path(__file__).resolve().parent.parent
if (_checkout / "kernels" / "reference.py").is_file():
    __path__.append(str(_checkout))


def __getattr__(name: str):
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
