"""Which tensors a model has under Megatron's keys and under Hugging Face's names.

In a Megatron checkpoint a layer's tensors are one tensor of all layers, [layers, ...], whatever its
parallel layout was; the keys are the same for local and Transformer Engine layers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .architecture import Architecture

EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"
"""Hugging Face's; where they are tied a file may hold both."""


@dataclass(frozen=True)
class Place:
    """One tensor of a Megatron checkpoint, and the Hugging Face tensors that it holds.

    Attributes:
        key: Megatron's. names: Hugging Face's, in the order of split and join.
        shape: in Megatron, without the dimension of layers. parts: shapes in Hugging Face,
            where there are several.
        layer: which of the key's layers; None where it belongs to none.
    """

    key: str
    names: tuple[str, ...]
    shape: tuple[int, ...]
    layer: int | None = None
    parts: tuple[tuple[int, ...], ...] = ()
    split: Callable[[Tensor], Sequence[Tensor]] = lambda tensor: [tensor]
    join: Callable[[Sequence[Tensor]], Tensor] = lambda tensors: tensors[0]

    @property
    def part_shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the Hugging Face tensors."""
        return self.parts or (self.shape,)

    @property
    def in_float32(self) -> bool:
        """Parameters of the mappings are float32 in every model."""
        return "hyper" in self.key


def places(model: Architecture) -> list[Place]:
    """Every tensor of the model, in the order in which a token meets them."""
    found = [
        Place(
            "embedding.word_embeddings.weight",
            (EMBEDDING,),
            (model.vocabulary, model.hidden),
        )
    ]
    for layer in range(model.layers):
        found += _layer(model, layer)
    if model.mhc is not None:
        n = model.mhc.num_streams
        shapes = {"fn": (n, n * model.hidden), "scale": (1,), "base": (n,)}
        found += [
            Place(f"decoder.hyper_head.{name}", (f"model.hc_head.hc_{name}",), shape)
            for name, shape in shapes.items()
        ]
    found.append(Place("decoder.final_layernorm.weight", ("model.norm.weight",), (model.hidden,)))
    if not model.tied:
        found.append(Place("output_layer.weight", (OUTPUT,), (model.vocabulary, model.hidden)))
    return found


def _layer(model: Architecture, layer: int) -> list[Place]:
    megatron, theirs = "decoder.layers.", f"model.layers.{layer}."
    hidden, ffn, channels = model.hidden, model.ffn, model.head_channels
    # Of each group: the queries of its heads, its key, its value.
    queries = model.heads // model.groups
    grouped = (queries * channels, channels, channels)

    def split_qkv(qkv: Tensor) -> list[Tensor]:
        parts = qkv.view(model.groups, sum(grouped), hidden).split(grouped, dim=1)
        return [part.reshape(-1, hidden) for part in parts]

    def join_qkv(parts: Sequence[Tensor]) -> Tensor:
        views = [part.view(model.groups, -1, hidden) for part in parts]
        return torch.cat(views, dim=1).reshape(-1, hidden)

    def place(key: str, names: Sequence[str], *shape: int, **how) -> Place:
        return Place(megatron + key, tuple(theirs + name for name in names), shape, layer, **how)

    found = [
        place("self_attention.linear_qkv.layer_norm_weight", ["input_layernorm.weight"], hidden),
        place(
            "self_attention.linear_qkv.weight",
            [f"self_attn.{part}_proj.weight" for part in "qkv"],
            model.groups * sum(grouped),
            hidden,
            parts=tuple((model.groups * rows, hidden) for rows in grouped),
            split=split_qkv,
            join=join_qkv,
        ),
        place(
            "self_attention.linear_proj.weight",
            ["self_attn.o_proj.weight"],
            hidden,
            model.heads * channels,
        ),
        place("mlp.linear_fc1.layer_norm_weight", ["post_attention_layernorm.weight"], hidden),
        place(
            "mlp.linear_fc1.weight",
            ["mlp.gate_proj.weight", "mlp.up_proj.weight"],
            2 * ffn,
            hidden,
            parts=((ffn, hidden),) * 2,
            split=lambda both: both.chunk(2),
            join=torch.cat,
        ),
        place("mlp.linear_fc2.weight", ["mlp.down_proj.weight"], hidden, ffn),
    ]
    if model.mhc is not None:
        n = model.mhc.num_streams
        shapes = {"fn": ((2 + n) * n, n * hidden), "scale": (3,), "base": ((2 + n) * n,)}
        found += [
            place(f"{ours}_hyper_connection.{name}", [f"{hf}_hc.{name}"], *shape)
            for ours, hf in (("self_attention", "attn"), ("mlp", "ffn"))
            for name, shape in shapes.items()
        ]
    return found
