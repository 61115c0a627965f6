"""Documents to token ids: bytes, a Hugging Face folder or a SentencePiece model."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy

from megatron_mhc.data.settings import BYTES
from megatron_mhc.errors import UserError

TOKENIZER_FILES = (".json", ".model", ".txt", ".jinja")


class Tokenizer(Protocol):
    """What the writer needs of a tokenizer.

    Attributes:
        kind: name for the manifest.
        digest: digest of the tokenizer's files, "" without any.
        vocab_size: ids, the end of document among them; what Megatron calls the same.
        eod_id: the id that ends a document.
        flags: Megatron's training flags for it.
    """

    kind: str
    digest: str
    vocab_size: int
    eod_id: int
    flags: tuple[str, ...]

    def encode(self, documents: Sequence[bytes]) -> list[Sequence[int] | numpy.ndarray | None]:
        """Ids of each document without the end of document; None where it is not UTF-8."""
        ...


class ByteTokenizer:
    """One token a byte, and 256 for the end of a document; takes any bytes."""

    kind = "bytes"
    digest = ""
    vocab_size = 257
    eod_id = 256
    # In megatron-core 0.19.2 NullTokenizer's end of document is its last id, vocab size - 1.
    flags = ("--tokenizer-type", "NullTokenizer", "--vocab-size", "257")

    def encode(self, documents: Sequence[bytes]) -> list[Sequence[int] | numpy.ndarray | None]:
        """See Tokenizer; never None."""
        return [numpy.frombuffer(document, dtype=numpy.uint8) for document in documents]


class HuggingFaceTokenizer:
    """A folder that ``save_pretrained`` wrote; nothing is downloaded."""

    kind = "huggingface"

    def __init__(self, folder: str) -> None:
        """Raises UserError when the folder holds no usable tokenizer."""
        names = sorted(name for name in os.listdir(folder) if name.endswith(TOKENIZER_FILES))
        try:
            from transformers import AutoTokenizer

            self._tokenizer = AutoTokenizer.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False
            )
        # The library raises whatever its parsers raise.
        except Exception as error:
            raise UserError(
                f"--tokenizer {folder}: no Hugging Face tokenizer could be loaded "
                f"({_first_line(error)}); give a folder that save_pretrained wrote, "
                "with tokenizer.json and tokenizer_config.json"
            ) from error
        # Megatron's wrapper takes the separator where there is no end of sequence.
        end = self._tokenizer.eos_token_id
        end = self._tokenizer.sep_token_id if end is None else end
        self.vocab_size = len(self._tokenizer)
        if end is None:
            raise UserError(
                f"--tokenizer {folder}: it has no end-of-sequence token to end documents with; "
                "set eos_token in its tokenizer_config.json"
            )
        self.eod_id = int(end)
        self._backend = self._tokenizer.backend_tokenizer if self._tokenizer.is_fast else None
        if self._backend:
            # Its file may ask for both, and a document must not lose its end.
            self._backend.no_truncation()
            self._backend.no_padding()
        self.digest = _digest(os.path.join(folder, name) for name in names)
        model = os.path.abspath(folder)
        self.flags = ("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", model)

    def encode(self, documents: Sequence[bytes]) -> list[Sequence[int] | numpy.ndarray | None]:
        """See Tokenizer. Text is encoded without special tokens around it."""
        return _encode_texts(documents, self._encode_fast if self._backend else self._encode_slow)

    def _encode_fast(self, texts: list[str]) -> list[list[int]]:
        # Without the character offsets, which take most of the time for long texts.
        encoded = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _encode_slow(self, texts: list[str]) -> list[list[int]]:
        return self._tokenizer(
            texts, add_special_tokens=False, return_attention_mask=False, verbose=False
        )["input_ids"]


class SentencePieceTokenizer:
    """A SentencePiece ``.model`` file."""

    kind = "sentencepiece"

    def __init__(self, path: str) -> None:
        """Raises UserError when the file is no usable model."""
        try:
            from sentencepiece import SentencePieceProcessor

            self._processor = SentencePieceProcessor(model_file=path)
        except (ImportError, OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--tokenizer {path}: no SentencePiece model could be loaded "
                f"({_first_line(error)}); give the .model file of the SentencePiece trainer"
            ) from error
        self.vocab_size = self._processor.get_piece_size()
        self.eod_id = self._processor.eos_id()
        if self.eod_id < 0:
            raise UserError(
                f"--tokenizer {path}: it has no end-of-sequence token to end documents with; "
                "train the model with an eos_id of 0 or more"
            )
        self.digest = _digest([path])
        model = os.path.abspath(path)
        self.flags = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model)

    def encode(self, documents: Sequence[bytes]) -> list[Sequence[int] | numpy.ndarray | None]:
        """See Tokenizer. Text is encoded without begin and end tokens around it."""
        return _encode_texts(documents, lambda texts: self._processor.encode(texts, out_type=int))


def load_tokenizer(name: str) -> Tokenizer:
    """The tokenizer that ``--tokenizer`` names.

    Raises:
        UserError: there is no such file or folder, or it cannot be loaded.
    """
    if name == BYTES:
        return ByteTokenizer()
    if os.path.isdir(name):
        return HuggingFaceTokenizer(name)
    if os.path.isfile(name):
        return SentencePieceTokenizer(name)
    raise UserError(
        f"--tokenizer {name}: no such file or folder; give {BYTES!r}, a Hugging Face "
        "tokenizer folder or a SentencePiece .model file (nothing is downloaded)"
    )


def _encode_texts(
    documents: Sequence[bytes], encode: Callable[[list[str]], list[list[int]]]
) -> list[Sequence[int] | None]:
    """Encode in one call those documents that are UTF-8: both libraries then use all cores."""
    texts: dict[int, str] = {}
    for index, document in enumerate(documents):
        try:
            texts[index] = document.decode()
        except UnicodeDecodeError:
            continue
    ids: list[Sequence[int] | None] = [None] * len(documents)
    if texts:
        for index, encoded in zip(texts, encode(list(texts.values())), strict=True):
            ids[index] = encoded
    return ids


def _digest(paths: Iterable[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for path in paths:
        with open(path, "rb") as stream:
            content = hashlib.file_digest(stream, "blake2b").hexdigest()
        digest.update(f"{os.path.basename(path)}\0{content}\n".encode())
    return digest.hexdigest()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
