"""What the tests of conversion share: a Llama of transformers', logits and weights of a folder."""

from pathlib import Path

import torch

from megatron_mhc.conversion import convert, verify
from megatron_mhc.conversion.hugging_face_folder import HuggingFaceFolder

CONFIG = {
    "model_type": "llama",
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


def write_llama(folder: Path) -> Path:
    """A Llama of random weights, as transformers saves it."""
    from transformers import LlamaConfig, LlamaForCausalLM

    LlamaForCausalLM(LlamaConfig(**CONFIG)).save_pretrained(folder)
    return folder


def compare(made: convert.Converted) -> verify.Comparison:
    return verify.compare(made.megatron, made.hugging_face)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: HuggingFaceFolder(folder).read(name) for name in HuggingFaceFolder(folder).files}
