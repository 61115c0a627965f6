"""What makes two runs the same: their settings and the state of their inputs."""

from megatron_mhc.data.settings import Settings
from megatron_mhc.data.sources import Found
from megatron_mhc.data.tokenizers import Tokenizer

TOOL_VERSION = 1
"""Raise it whenever the same inputs and settings would give other files."""


def identity(settings: Settings, tokenizer: Tokenizer, found: Found) -> dict:
    """Everything the output depends on, as JSON values."""
    return {
        "tool_version": TOOL_VERSION,
        "tokenizer": tokenizer.kind,
        "tokenizer_digest": tokenizer.digest,
        "validation_fraction": settings.validation_fraction,
        "json_key": settings.json_key,
        "max_document_bytes": settings.max_document_bytes,
        "chunk_bytes": settings.chunk_bytes,
        "source_files": len(found.sources),
        "source_bytes": found.size,
        "source_digest": found.digest(),
    }


def differences(before: dict, now: dict) -> str:
    """What differs between two identities, in words; "" when nothing does."""
    return ", ".join(
        f"{name.replace('_', ' ')} {before.get(name)} then, {now.get(name)} now"
        for name in [*now, *(name for name in before if name not in now)]
        if before.get(name) != now.get(name)
    )
