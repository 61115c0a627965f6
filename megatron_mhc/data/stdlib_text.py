"""The text every Python brings along: its library's sources and documentation strings."""

import importlib
import inspect
import os
import platform
import site
import sys
import sysconfig
from collections.abc import Iterator

from megatron_mhc.data.sources import Found, Source, add_file, text_source, walk

TEXT_SUFFIXES = (".py", ".txt", ".rst", ".md")
INSTALLED_PACKAGES = ("site-packages", "dist-packages")
TOPICS = os.path.join("pydoc_data", "topics.py")
"""Left out as a source: its texts are taken as the text they are."""


def find_stdlib(enough: int) -> Found:
    """List the running Python's own text.

    The library's modules and text files come first (with CPython's tests, where installed,
    about 32 MB), then the documentation strings of what is written in C. An installation
    without the tests has some 12 MB; only then are the modules of the installed packages
    taken too, in sorted order, until there is enough.

    Args:
        enough: bytes of text to look for.
    """
    found = Found()
    seen: set[tuple[int, int]] = set()
    library = sysconfig.get_path("stdlib")
    for path in walk(library):
        name = os.path.relpath(path, library)
        if name.split(os.sep)[0] in INSTALLED_PACKAGES or name == TOPICS:
            continue
        if name.endswith(TEXT_SUFFIXES):
            add_file(found, seen, path, f"stdlib/{name}")
    found.sources.extend(_documentation())
    size = found.size
    for path, name in _installed_modules():
        if size >= enough:
            break
        taken = len(found.sources)
        add_file(found, seen, path, name)
        size += sum(source.size for source in found.sources[taken:])
    return found


def describe() -> str:
    """The running Python in words, for messages."""
    library = sysconfig.get_path("stdlib")
    return f"{platform.python_implementation()} {platform.python_version()} ({library})"


def _installed_modules() -> Iterator[tuple[str, str]]:
    folders = [sysconfig.get_path("purelib"), sysconfig.get_path("platlib")]
    for folder in filter(os.path.isdir, dict.fromkeys(folders + site.getsitepackages())):
        for path in walk(folder):
            if path.endswith(".py"):
                yield path, f"installed/{os.path.relpath(path, folder)}"


def _documentation() -> Iterator[Source]:
    """One text for each topic of ``help()`` and for each module written in C.

    Only modules inside the interpreter are imported: that runs no code of others.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:  # Some distributions package it apart.
        topics = {}
    for topic in sorted(topics):
        yield text_source(f"topics/{topic}", topics[topic].encode(errors="replace"))
    for name in sorted(sys.builtin_module_names):
        text = "\n\n".join(_doc_strings(name))
        yield text_source(f"doc/{name}", text.encode(errors="replace"))


def _doc_strings(module_name: str) -> Iterator[str]:
    module = importlib.import_module(module_name)
    yield f"{module_name}\n\n{inspect.cleandoc(module.__doc__ or '')}"
    for name, member in sorted(vars(module).items()):
        # Functions and classes only: the text of other values varies from run to run.
        if not (inspect.isbuiltin(member) or inspect.isclass(member)):
            continue
        yield from _entry(f"{module_name}.{name}", member)
        if inspect.isclass(member):
            for attribute, value in sorted(vars(member).items()):
                if inspect.isroutine(value):
                    yield from _entry(f"{module_name}.{name}.{attribute}", value)


def _entry(name: str, member: object) -> Iterator[str]:
    doc = getattr(member, "__doc__", None)
    if isinstance(doc, str) and doc.strip():
        yield f"{name}\n\n{inspect.cleandoc(doc)}"
