"""What the user asked for, checked before anything is read or written."""

import os
from dataclasses import dataclass

from megatron_mhc.errors import UserError

BYTES = "bytes"
"""The tokenizer that needs no files: one token a byte."""

STDLIB_MIN_BYTES = 20_000_000
"""Text that ``--stdlib`` promises, in bytes."""

LARGEST_DOCUMENT = 1 << 30
"""Bytes. Megatron's index counts a document's tokens in int32, so 2 GiB could not be written."""


@dataclass(frozen=True)
class Settings:
    """One call of the tool; every field is the command-line flag of the same name.

    Attributes:
        output_prefix: path before ``_train.bin``, ``_valid.bin`` and ``.json``.
        inputs: text files, ``.jsonl`` files and folders of them.
        stdlib: take the text of the running Python's standard library too.
        tokenizer: ``"bytes"``, a Hugging Face tokenizer folder or a SentencePiece model file.
        validation_fraction: share of the documents for validation, 0 (no such pair) to below 1.
        json_key: field of a ``.jsonl`` record that holds the text.
        min_bytes: fewest bytes of text to accept; None is 20,000,000 with ``stdlib``, else 1.
        max_document_bytes: longer texts are cut into documents of at most this many bytes.
        chunk_bytes: bytes of text between two points a killed run can continue from.
        overwrite: replace what an earlier run left under ``output_prefix``.
    """

    output_prefix: str
    inputs: tuple[str, ...] = ()
    stdlib: bool = False
    tokenizer: str = BYTES
    validation_fraction: float = 0.02
    json_key: str = "text"
    min_bytes: int | None = None
    max_document_bytes: int = 256 << 10
    chunk_bytes: int = 16 << 20
    overwrite: bool = False

    def __post_init__(self) -> None:
        """Raises UserError for a value that no run could use."""
        if not os.path.basename(self.output_prefix) or os.path.isdir(self.output_prefix):
            raise UserError(
                f"--output-prefix {self.output_prefix!r} is a folder: "
                "give the files' common name in it too, as in data/corpus"
            )
        if not self.inputs and not self.stdlib:
            raise UserError("nothing to read: name text files or folders, or give --stdlib")
        if not 0 <= self.validation_fraction < 1:
            raise UserError(
                f"--validation-fraction {self.validation_fraction}: must be 0 or more, below 1"
            )
        if not 16 <= self.max_document_bytes <= LARGEST_DOCUMENT:
            raise UserError(
                f"--max-document-bytes {self.max_document_bytes}: must be 16 to {LARGEST_DOCUMENT}"
            )
        if self.chunk_bytes < 1:
            raise UserError(f"--chunk-bytes {self.chunk_bytes}: must be 1 or more")
        if self.min_bytes is not None and self.min_bytes < 1:
            raise UserError(f"--min-bytes {self.min_bytes}: must be 1 or more")

    @property
    def required_bytes(self) -> int:
        """The fewest bytes of text this run accepts."""
        if self.min_bytes is not None:
            return self.min_bytes
        return STDLIB_MIN_BYTES if self.stdlib else 1
