"""The finished files under an output prefix, and the manifest that vouches for them."""

import contextlib
import json
import os
from collections.abc import Sequence

from megatron_mhc.data.durable import move, write_json
from megatron_mhc.data.shards import TRAIN, VALID
from megatron_mhc.errors import UserError

SUFFIXES = (".bin", ".idx")


class Outputs:
    """Names and states of the files of one output prefix.

    Attributes:
        prefix: the ``--output-prefix``.
        manifest_path: written last; without it nothing is finished.
        partial: folder of an unfinished run.
    """

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.manifest_path = f"{prefix}.json"
        self.partial = f"{prefix}.partial"
        self.files = [f"{prefix}_{split}{end}" for split in (TRAIN, VALID) for end in SUFFIXES]

    def contains(self, path: str) -> bool:
        """Whether ``path`` is one of the files a run leaves here, finished or not."""
        path = os.path.abspath(path)
        mine = [os.path.abspath(name) for name in [*self.files, self.manifest_path]]
        return path in mine or path.startswith(os.path.abspath(self.partial) + os.sep)

    def manifest(self) -> dict | None:
        """The manifest, None without one.

        Raises:
            UserError: another program's file has its name.
        """
        try:
            with open(self.manifest_path, encoding="utf-8") as stream:
                manifest = json.load(stream)
            if {"settings", "files"} <= manifest.keys():
                return manifest
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (ValueError, AttributeError):
            pass
        raise UserError(
            f"--output-prefix {self.prefix}: {self.manifest_path} is not a manifest of this tool; "
            "move it away or use another prefix"
        )

    def existing(self) -> list[str]:
        """Those of the pairs' files that are there."""
        return [path for path in self.files if os.path.exists(path)]

    def damage(self, manifest: dict) -> str:
        """What is wrong with the files a manifest lists, "" when they are as it says."""
        folder = os.path.dirname(self.prefix)
        for name, size in manifest["files"].items():
            path = os.path.join(folder, name)
            if not os.path.exists(path):
                return f"{path} is missing"
            if os.path.getsize(path) != size:
                return f"{path} has {os.path.getsize(path)} bytes, its manifest says {size}"
        return ""

    def publish(self, stem: str, splits: Sequence[str], manifest: dict) -> dict:
        """Move the pairs under ``stem`` here, the manifest last, and return the manifest.

        A reader needs both files of a pair. The old indices go first and each new one comes
        after its data, so that at no time an index lies beside data it was not made for.
        """
        old_index = [path for path in self.files if path.endswith(".idx")]
        old_data = [path for path in self.files if path.endswith(".bin")]
        for path in [self.manifest_path, *old_index, *old_data]:
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
        files = {}
        for split in splits:
            for end in SUFFIXES:
                path = f"{self.prefix}_{split}{end}"
                move(f"{stem}_{split}{end}", path)
                files[os.path.basename(path)] = os.path.getsize(path)
        manifest = {**manifest, "files": files}
        write_json(self.manifest_path, manifest)
        return manifest
