"""Text to Megatron's .bin and .idx: what tools/prepare_data.py does, as a library."""

from megatron_mhc.data.prepare import prepare
from megatron_mhc.data.settings import Settings
from megatron_mhc.errors import UserError

__all__ = ["UserError", "Settings", "prepare"]
