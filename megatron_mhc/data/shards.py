"""Documents to pairs of .bin and .idx: one small pair a chunk, then all in one."""

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy

from megatron_mhc.data.documents import Span, read_span
from megatron_mhc.data.durable import sync
from megatron_mhc.data.megatron_io import add_pairs, indexed_dataset
from megatron_mhc.data.settings import Settings
from megatron_mhc.data.tokenizers import Tokenizer

TRAIN, VALID = "train", "valid"

BATCH_BYTES = 4 << 20
"""Bytes of text encoded in one call, enough to keep all cores busy."""

COUNTERS = ("documents", "tokens", "text_bytes", "skipped")


@dataclass
class Counts:
    """What was written, by split, and what was passed over, by reason."""

    documents: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)
    text_bytes: Counter[str] = field(default_factory=Counter)
    skipped: Counter[str] = field(default_factory=Counter)
    text_digest: str = ""

    def add(self, other: "Counts") -> None:
        """Add another's counts; digests chain, so their order matters."""
        for name in COUNTERS:
            getattr(self, name).update(getattr(other, name))
        both = f"{self.text_digest}{other.text_digest}".encode()
        self.text_digest = hashlib.blake2b(both, digest_size=16).hexdigest()

    def as_json(self) -> dict:
        """Plain dictionaries; ``from_json`` reads them back."""
        counters = {name: dict(getattr(self, name)) for name in COUNTERS}
        return {**counters, "text_digest": self.text_digest}

    @classmethod
    def from_json(cls, value: dict) -> "Counts":
        """Counts as ``as_json`` gave them."""
        counters = {name: Counter(value[name]) for name in COUNTERS}
        return cls(**counters, text_digest=value["text_digest"])


def splits(settings: Settings) -> tuple[str, ...]:
    """Names of the pairs to write."""
    return (TRAIN, VALID) if settings.validation_fraction > 0 else (TRAIN,)


def split_of(digest: bytes, validation_fraction: float) -> str:
    """The split of a document, from a digest of its text: equal texts never part."""
    share = int.from_bytes(digest[:8], "big") / 2**64
    return VALID if share < validation_fraction else TRAIN


def write_shard(
    stem: str,
    spans: Iterable[Span],
    tokenizer: Tokenizer,
    settings: Settings,
    advance: Callable[[int], None],
) -> Counts:
    """Write ``{stem}_train`` and ``{stem}_valid`` pairs, safe on the disk when this returns.

    Args:
        advance: called with bytes of input as they are read.

    Raises:
        UserError: a source changed since it was listed.
    """
    counts = Counts()
    text_digest = hashlib.blake2b(digest_size=16)
    builders = _builders(stem, tokenizer, splits(settings))
    for batch in _batches(_documents(spans, settings, counts.skipped, advance)):
        for text, ids in zip(batch, tokenizer.encode(batch), strict=True):
            if ids is None:
                counts.skipped["not UTF-8"] += 1
            elif len(ids) == 0:
                counts.skipped["no tokens"] += 1
            else:
                digest = hashlib.blake2b(text, digest_size=16).digest()
                text_digest.update(digest)
                split = split_of(digest, settings.validation_fraction)
                builder = builders[split]
                tokens = numpy.empty(len(ids) + 1, dtype=builder.dtype)
                tokens[:-1] = ids
                tokens[-1] = tokenizer.eod_id
                builder.add_document(tokens, [len(tokens)])
                counts.documents[split] += 1
                counts.tokens[split] += len(tokens)
                counts.text_bytes[split] += len(text)
    counts.text_digest = text_digest.hexdigest()
    _finalize(stem, builders)
    return counts


def merge_shards(
    stem: str, parts: Sequence[str], tokenizer: Tokenizer, names: Sequence[str]
) -> None:
    """Join the pairs of all ``parts`` (stems), in order, to pairs under ``stem``."""
    builders = _builders(stem, tokenizer, names)
    for split, builder in builders.items():
        add_pairs(builder, [f"{part}_{split}" for part in parts])
    _finalize(stem, builders)


def _builders(stem: str, tokenizer: Tokenizer, names: Sequence[str]) -> dict:
    module = indexed_dataset()
    dtype = module.DType.optimal_dtype(tokenizer.vocab_size)
    return {
        split: module.IndexedDatasetBuilder(module.get_bin_path(f"{stem}_{split}"), dtype=dtype)
        for split in names
    }


def _finalize(stem: str, builders: dict) -> None:
    module = indexed_dataset()
    for split, builder in builders.items():
        prefix = f"{stem}_{split}"
        builder.finalize(module.get_idx_path(prefix))
        sync(module.get_bin_path(prefix))
        sync(module.get_idx_path(prefix))


def _documents(
    spans: Iterable[Span], settings: Settings, skipped: Counter[str], advance: Callable[[int], None]
) -> Iterator[bytes]:
    for span in spans:
        for read, text in read_span(span, settings.max_document_bytes, settings.json_key, skipped):
            advance(read)
            if text:
                yield text


def _batches(documents: Iterable[bytes]) -> Iterator[list[bytes]]:
    batch: list[bytes] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document)
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
