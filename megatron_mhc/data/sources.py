"""Which texts there are: files and folders to one list in a fixed order."""

import hashlib
import io
import os
import stat
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from megatron_mhc.errors import UserError

BINARY_PROBE = 8 << 10
"""Bytes at the start of a file in which a NUL means that it is not text."""

JSONL_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True)
class Source:
    """One text, on disk or (documentation strings) in memory.

    Attributes:
        name: path below the input it was found in, with ``/``; not unique.
        size: bytes.
        stamp: changes whenever the text may have changed.
        path: where it lies, or "" for a text in memory.
        text: the text in memory.
    """

    name: str
    size: int
    stamp: str
    path: str = ""
    text: bytes = b""

    @property
    def is_jsonl(self) -> bool:
        """Whether each line is a JSON record."""
        return self.name.lower().endswith(JSONL_SUFFIXES)

    def open(self) -> BinaryIO:
        """Raises UserError when the file has gone or cannot be read."""
        if not self.path:
            return io.BytesIO(self.text)
        try:
            return open(self.path, "rb")
        except OSError as error:
            raise UserError(f"{self.path}: cannot be read any more ({error.strerror})") from None

    def check_unchanged(self) -> None:
        """Raises UserError when the file is not the one that was listed."""
        if not self.path:
            return
        try:
            unchanged = _stamp(os.stat(self.path)) == self.stamp
        except OSError:
            unchanged = False
        if not unchanged:
            raise UserError(
                f"{self.path}: changed while it was being read; give --overwrite to start again"
            )


@dataclass
class Found:
    """The texts to read, and how many files were passed over and why."""

    sources: list[Source] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)

    @property
    def size(self) -> int:
        """Bytes of all sources."""
        return sum(source.size for source in self.sources)

    def digest(self) -> str:
        """A digest of the list: names, sizes and stamps, in order."""
        digest = hashlib.blake2b(digest_size=16)
        for source in self.sources:
            digest.update(
                f"{source.name}\0{source.size}\0{source.stamp}\n".encode(errors="replace")
            )
        return digest.hexdigest()


def text_source(name: str, text: bytes) -> Source:
    """A source for text in memory."""
    return Source(name, len(text), hashlib.blake2b(text, digest_size=8).hexdigest(), text=text)


def find_sources(inputs: Iterable[str], is_output: Callable[[str], bool]) -> Found:
    """List the texts of files and folders, each folder in sorted order.

    Args:
        inputs: files and folders. A file reached twice is taken once.
        is_output: true for a path this run writes, which is left out.

    Raises:
        UserError: an input is missing, unreadable or neither file nor folder.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    for given in inputs:
        if os.path.isdir(given):
            for path in walk(given):
                if not is_output(path):
                    add_file(found, seen, path, os.path.relpath(path, given))
        elif os.path.isfile(given) and os.access(given, os.R_OK):
            add_file(found, seen, given, os.path.basename(given))
        else:
            why = "not readable" if os.path.exists(given) else "no such file or folder"
            raise UserError(f"input {given!r}: {why}; give text files or folders of them")
    return found


def walk(folder: str) -> Iterator[str]:
    """Paths of the files below a folder, sorted, without hidden ones.

    Follows links to folders, but enters no folder twice, so a loop of links ends.

    Raises:
        UserError: a folder cannot be listed.
    """
    entered: set[tuple[int, int]] = set()
    for where, folders, files in os.walk(folder, onerror=_refuse, followlinks=True):
        status = os.stat(where)
        if (status.st_dev, status.st_ino) in entered:
            folders.clear()
            continue
        entered.add((status.st_dev, status.st_ino))
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith("."):
                yield os.path.join(where, name)


def add_file(found: Found, seen: set[tuple[int, int]], path: str, name: str) -> None:
    """Append one file to ``found``, or count why it is passed over.

    ``seen`` holds the (device, inode) of the files taken so far.
    """
    try:
        status = os.stat(path)
        # Opening a pipe or a device could wait for ever.
        if not stat.S_ISREG(status.st_mode):
            found.skipped["not a regular file"] += 1
            return
        with open(path, "rb") as stream:
            head = stream.read(BINARY_PROBE)
    except OSError:
        found.skipped["unreadable"] += 1
        return
    if (status.st_dev, status.st_ino) in seen:
        found.skipped["reached twice"] += 1
    elif not head:
        found.skipped["empty"] += 1
    elif b"\0" in head:
        found.skipped["binary"] += 1
    else:
        seen.add((status.st_dev, status.st_ino))
        name = name.replace(os.sep, "/")
        found.sources.append(Source(name, status.st_size, _stamp(status), path))


def _refuse(error: OSError) -> None:
    raise UserError(f"input folder {error.filename}: cannot be listed ({error.strerror})")


def _stamp(status: os.stat_result) -> str:
    return f"{status.st_size}:{status.st_mtime_ns}"
