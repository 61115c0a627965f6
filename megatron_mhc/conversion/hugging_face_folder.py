"""Hugging Face folders: config.json and safetensors, read by tensor and written in shards."""

import contextlib
import json
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mhc.errors import UserError

SHARD_BYTES = 5_000_000_000
"""Most bytes of weights to a file, as Hugging Face's own folders have."""
INDEX = "model.safetensors.index.json"


class HuggingFaceFolder:
    """A folder of transformers' ``save_pretrained``.

    Attributes:
        config: config.json. files: file of every tensor, by name.

    Raises:
        UserError: names what is missing or cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = folder / "config.json"
        if not path.is_file():
            raise UserError(f"--hf {folder}: there is no {path}; give a folder of save_pretrained")
        self.config = self._json(path.name)
        index, single = folder / INDEX, folder / "model.safetensors"
        if index.is_file():
            self.files = self._json(INDEX).get("weight_map")
            if not isinstance(self.files, dict) or not all(map(_is_name, self.files.values())):
                raise UserError(
                    f"--hf {folder}: {INDEX}: expected a weight_map of file names in it"
                )
        elif single.is_file():
            with self._open(single.name) as opened:
                self.files = dict.fromkeys(opened.keys(), single.name)
        else:
            raise UserError(f"--hf {folder}: neither {INDEX} nor {single.name} there")

    def _json(self, name: str) -> dict:
        try:
            content = json.loads((self.folder / name).read_text())
        except ValueError as problem:
            raise UserError(f"--hf {self.folder}: {name}: no JSON: {problem}") from None
        if not isinstance(content, dict):
            raise UserError(f"--hf {self.folder}: {name}: expected an object in it")
        return content

    @contextlib.contextmanager
    def _open(self, name: str):
        try:
            with safe_open(self.folder / name, framework="pt") as opened:
                yield opened
        except (SafetensorError, OSError) as problem:
            raise UserError(f"--hf {self.folder}: {name}: {problem}") from None

    def read(self, name: str) -> Tensor:
        """One tensor, in the dtype of the file."""
        with self._open(self.files[name]) as opened:
            return opened.get_tensor(name)


def _is_name(value: object) -> bool:
    """Whether it names a file in the folder."""
    return isinstance(value, str) and Path(value).name == value != ""


class Writer:
    """Collects tensors into shards and writes each when it is full.

    Args:
        folder: exists, empty.
    """

    def __init__(self, folder: Path, shard_bytes: int = SHARD_BYTES) -> None:
        self._folder = folder
        self._shard_bytes = shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._names: list[list[str]] = []
        self._bytes = self._total = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; it may be written at once."""
        size = tensor.numel() * tensor.element_size()
        if self._shard and self._bytes + size > self._shard_bytes:
            self._flush()
        self._shard[name] = tensor.contiguous()
        self._bytes += size
        self._total += size

    def _flush(self) -> None:
        path = self._folder / f"shard-{len(self._names)}"
        save_file(self._shard, path, metadata={"format": "pt"})
        self._names.append(list(self._shard))
        self._shard, self._bytes = {}, 0

    def finish(self) -> None:
        """Write what is left, and the index: names hold the number of shards, known only now."""
        self._flush()
        count, where = len(self._names), {}
        for index, names in enumerate(self._names):
            file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
            (self._folder / f"shard-{index}").rename(self._folder / file)
            where |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": self._total}, "weight_map": where}
        (self._folder / INDEX).write_text(json.dumps(index, indent=2))
