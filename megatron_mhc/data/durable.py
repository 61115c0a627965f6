"""Files that are there whole or not at all, also after a power cut."""

import json
import os


def write_json(path: str, value: object) -> None:
    """Put JSON at ``path`` in one step."""
    temporary = f"{path}.tmp"
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2)
        stream.write("\n")
    move(temporary, path)


def move(temporary: str, path: str) -> None:
    """Bring a finished file to its name in one step, its content first to the disk."""
    sync(temporary)
    os.replace(temporary, path)
    sync(os.path.dirname(path) or ".")


def sync(path: str) -> None:
    """Wait until a file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
