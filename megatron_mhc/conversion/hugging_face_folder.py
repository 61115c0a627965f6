"""Hugging Face folders: config.json and safetensors, read by tensor and written in shards."""

import contextlib
import json
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_mhc.errors import UserError

from .architecture import ROPE_SCALING, Architecture

SHARD_BYTES = 5_000_000_000
"""Most bytes of weights to a file, as Hugging Face's own folders have."""
INDEX = "model.safetensors.index.json"
MODELING = Path(__file__).with_name("modeling_mhc_llama.py")


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


def write_config(folder: Path, model: Architecture, dtype: torch.dtype) -> None:
    """config.json of a Llama, or of an mHC Llama with the code that transformers needs for it."""
    from transformers import LlamaConfig

    from .modeling_mhc_llama import MHCLlamaConfig

    rope = {"rope_type": "default", "rope_theta": model.rope_base}
    if model.rope_scaling is not None:
        rope |= {**ROPE_SCALING, "factor": model.rope_scaling}
    fields = {
        "vocab_size": model.vocabulary,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.groups,
        "head_dim": model.head_channels,
        "max_position_embeddings": model.positions,
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": rope,
        "tie_word_embeddings": model.tied,
        "dtype": str(dtype).removeprefix("torch."),
        # A tokenizer's, which a checkpoint of Megatron's does not hold.
        "bos_token_id": None,
        "eos_token_id": None,
    }
    if model.mhc is None:
        config = LlamaConfig(**fields, architectures=["LlamaForCausalLM"])
    else:
        code = MODELING.stem
        config = MHCLlamaConfig(
            **fields,
            architectures=["MHCLlamaForCausalLM"],
            auto_map={
                "AutoConfig": f"{code}.MHCLlamaConfig",
                "AutoModelForCausalLM": f"{code}.MHCLlamaForCausalLM",
            },
            hc_mult=model.mhc.num_streams,
            hc_sinkhorn_iters=model.mhc.sinkhorn_iterations,
            hc_eps=model.mhc.eps,
        )
        shutil.copy(MODELING, folder)
    config.save_pretrained(folder)
