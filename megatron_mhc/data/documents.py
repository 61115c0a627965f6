"""A stretch of a source to documents of bounded length."""

import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from megatron_mhc.data.sources import Source
from megatron_mhc.errors import UserError

LINE_SEARCH = 1 << 20
"""Bytes of a text looked through for the next line's start."""


@dataclass(frozen=True)
class Span:
    """Bytes ``start`` to ``end`` of a source; both lie at a line's start where it has lines."""

    source: Source
    start: int
    end: int


def read_span(
    span: Span, limit: int, json_key: str, skipped: Counter[str]
) -> Iterator[tuple[int, bytes]]:
    """Yield documents, each with the bytes of input just read (for the progress bar).

    An empty document only reports progress.

    Args:
        span: what to read. A text is one document unless it is longer than ``limit``.
        limit: longest document, bytes.
        json_key: field of a JSON record that holds the text.
        skipped: counts the records without such text.

    Raises:
        UserError: the file is gone, unreadable or changed.
    """
    with span.source.open() as stream:
        stream.seek(span.start)
        if span.source.is_jsonl:
            for line in _lines(stream, span.end - span.start):
                yield len(line), b""
                text = _record_text(line, json_key)
                if text is not None:
                    for _, piece in _pieces(io.BytesIO(text), len(text), limit):
                        yield 0, piece
                elif line.strip():
                    skipped["bad JSON record"] += 1
        else:
            yield from _pieces(stream, span.end - span.start, limit)
    span.source.check_unchanged()


def cut(text: bytes, limit: int) -> int:
    """Where a document of at most ``limit`` bytes that starts ``text`` should end.

    That is after a line in the second half, else between two characters, and anywhere in
    bytes that are not UTF-8.
    """
    if len(text) <= limit:
        return len(text)
    line = text.rfind(b"\n", limit // 2, limit) + 1
    if line:
        return line
    for end in range(limit, limit - 4, -1):
        if text[end] & 0xC0 != 0x80:
            return end
    return limit


def spans_of(source: Source, most: int) -> Iterator[Span]:
    """Cut a source into spans of about ``most`` bytes."""
    if source.size <= most:
        yield Span(source, 0, source.size)
        return
    with source.open() as stream:
        start = 0
        for target in range(most, source.size, most):
            # A long line can carry one boundary beyond the next targets.
            if target > start:
                end = min(_boundary(stream, target, source.is_jsonl), source.size)
                yield Span(source, start, end)
                start = end
    if start < source.size:
        yield Span(source, start, source.size)


def chunks_of(sources: Iterable[Source], most: int) -> list[list[Span]]:
    """Groups of spans in order, each of about ``most`` bytes."""
    chunks: list[list[Span]] = [[]]
    size = 0
    for source in sources:
        for span in spans_of(source, most):
            if size and size + span.end - span.start > most:
                chunks.append([])
                size = 0
            chunks[-1].append(span)
            size += span.end - span.start
    return chunks


def check_jsonl(source: Source, json_key: str) -> None:
    """Raises UserError when the first record of a ``.jsonl`` source has no such text."""
    with source.open() as stream:
        line = next((line for line in stream if line.strip()), b"")
    if _record_text(line, json_key) is not None:
        return
    try:
        record = json.loads(line)
        keys = ", ".join(sorted(record)) if isinstance(record, dict) else "none, it is no object"
    except ValueError as error:
        raise UserError(f"{source.path}: the first line is not JSON ({error})") from None
    raise UserError(
        f"--json-key {json_key!r}: no text under it in the first record of {source.path}; "
        f"its keys are: {keys}"
    )


def _boundary(stream: BinaryIO, target: int, is_jsonl: bool) -> int:
    # One byte early, so that a line that starts exactly at the target is found.
    stream.seek(target - 1)
    line = stream.readline(-1 if is_jsonl else LINE_SEARCH)
    if is_jsonl or line.endswith(b"\n"):
        return stream.tell()
    stream.seek(target)
    following = stream.read(4)
    for ahead, byte in enumerate(following):
        if byte & 0xC0 != 0x80:
            return target + ahead
    return target


def _pieces(stream: BinaryIO, left: int, limit: int) -> Iterator[tuple[int, bytes]]:
    window = b""
    while True:
        more = stream.read(min(left, limit + 1 - len(window)))
        left -= len(more)
        window += more
        if not window:
            return
        end = cut(window, limit)
        yield end, window[:end]
        window = window[end:]


def _lines(stream: BinaryIO, left: int) -> Iterator[bytes]:
    while left > 0 and (line := stream.readline()):
        left -= len(line)
        yield line


def _record_text(line: bytes, json_key: str) -> bytes | None:
    try:
        text = json.loads(line)[json_key]
        return text.encode()
    # Not JSON (or nested too deep), no object, no such key, not a string, or half a surrogate pair.
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None
