"""What a finished pair says of itself."""

import os
from collections.abc import Mapping

from megatron_mhc.data.shards import TRAIN, VALID, Counts
from megatron_mhc.data.tokenizers import Tokenizer


def build_manifest(
    wanted: dict, tokenizer: Tokenizer, counts: Counts, skipped: Mapping[str, int]
) -> dict:
    """The manifest but for the files' sizes, which ``Outputs.publish`` adds.

    Args:
        wanted: the run's identity.
        skipped: files and documents passed over, by reason.
    """
    return {
        "settings": wanted,
        "tokenizer": tokenizer.kind,
        "vocab_size": tokenizer.vocab_size,
        "eod_id": tokenizer.eod_id,
        "tokenizer_flags": list(tokenizer.flags),
        **{name: value for name, value in counts.as_json().items() if name != "skipped"},
        "skipped": dict(skipped),
    }


def summary(prefix: str, manifest: dict) -> str:
    """The pairs with their sizes, in one line."""
    parts = [
        f"{prefix}_{split} ({manifest['documents'][split]} documents, "
        f"{manifest['tokens'][split]} tokens)"
        for split in (TRAIN, VALID)
        if split in manifest["documents"]
    ]
    return ", ".join(parts)


def train_flags(prefix: str, manifest: dict) -> str:
    """Megatron's flags to train on the pairs."""
    data = [
        f"--{split}-data-path {os.path.abspath(prefix)}_{split}"
        for split in (TRAIN, VALID)
        if split in manifest["documents"]
    ]
    return " ".join([*data, *manifest["tokenizer_flags"]])
