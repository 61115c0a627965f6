"""Text to Megatron's .bin and .idx: what tools/prepare_data.py does, as a library."""

from megatron_mhc.data.errors import PrepareError
from megatron_mhc.data.prepare import prepare
from megatron_mhc.data.settings import Settings

__all__ = ["PrepareError", "Settings", "prepare"]
