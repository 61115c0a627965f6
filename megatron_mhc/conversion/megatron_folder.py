"""Megatron checkpoints of the torch_dist format, read and written by one process on a CPU."""

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_mhc import environment
from megatron_mhc.checkpoint_guard import TRACKER, complete_iterations, damage, latest_iteration
from megatron_mhc.errors import UserError

from .architecture import Architecture
from .megatron_arguments import to_arguments
from .tensors import Place

ITERATION = "iter_0000000"
"""What an imported model is saved as."""
NOT_WEIGHTS = ("optimizer.", "chained_", "rng_state", "rerun_state_machine_state")
"""Beginnings of the keys of what a training keeps beside the model."""
# Transformer Engine's modules of a layer keep fp8 state under these, and its final norm; local
# layers look for the first four.
EXTRA_STATE = (
    "self_attention.linear_proj",
    "self_attention.linear_qkv",
    "mlp.linear_fc1",
    "mlp.linear_fc2",
    "self_attention.core_attention",
)


def start() -> None:
    """Make Megatron importable here, and this process a group of its own."""
    environment.prepare()
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)


class MegatronCheckpoint:
    """One iteration of a --save folder.

    Args:
        folder: the --save folder. step: the iteration; None is the latest.

    Attributes:
        path: of the iteration. args: the arguments that Megatron saved.
        dtypes, shapes: of every tensor of the model, by key; shapes with layers first.

    Raises:
        UserError: it is not there, or not complete, or not of the torch_dist format.
    """

    def __init__(self, folder: Path, step: int | None) -> None:
        iteration = latest_iteration(folder) if step is None else step
        complete = complete_iterations(folder)
        if iteration is None or iteration not in complete:
            wanted = f"no complete iteration {iteration}"
            if iteration is None:
                wanted = f"no {TRACKER} that names an iteration"
            there = ", ".join(map(str, complete)) or "none; give a training's --save folder"
            raise UserError(f"--load {folder}: {wanted} there; iterations for --ckpt-step: {there}")
        self.path = folder / f"iter_{iteration:07d}"
        from megatron.core import dist_checkpointing

        with self._readable():
            saved = dist_checkpointing.load_common_state_dict(str(self.path)).get("args")
            listed = dist_checkpointing.load_tensors_metadata(str(self.path))
        if saved is None:
            raise UserError(f"--load {self.path}: its arguments were not saved with it")
        self.args: argparse.Namespace = saved
        found = {key: tensor for key, tensor in listed.items() if not key.startswith(NOT_WEIGHTS)}
        self.dtypes = {key: tensor.dtype for key, tensor in found.items()}
        self.shapes = {key: tuple(tensor.global_shape) for key, tensor in found.items()}

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        """A damaged file ends in whatever reads it: pickle, torch, Megatron."""
        try:
            yield
        except (Exception, CheckpointException) as problem:  # the latter is a BaseException
            others = [
                i for i in complete_iterations(self.path.parent) if i != int(self.path.name[5:])
            ]
            raise UserError(
                f"--load {self.path}: {damage(problem)}; other "
                f"iterations for --ckpt-step: {', '.join(map(str, others)) or 'none'}"
            ) from problem

    def check(self, model: Architecture, wanted: list[Place]) -> None:
        """That the checkpoint has just these tensors.

        Raises:
            UserError: names what is missing, left over, or of another shape.
        """
        shapes = {
            place.key: place.shape if place.layer is None else (model.layers, *place.shape)
            for place in wanted
        }
        problems = [f"{key}: not in the checkpoint" for key in shapes if key not in self.shapes]
        problems += [f"{key}: has no place in a Llama" for key in self.shapes if key not in shapes]
        problems += [
            f"{key}: {self.shapes[key]}, expected {shape}"
            for key, shape in shapes.items()
            if self.shapes.get(key, shape) != shape
        ]
        if problems:
            raise UserError(f"--load {self.path}\n" + "\n".join(problems))

    def read(self, wanted: Sequence[Place]) -> dict[Place, Tensor]:
        """These tensors of one layer, or of none, in their dtypes there; nothing else is read."""
        data, offsets = {}, {}
        for place in wanted:
            of_layers = () if place.layer is None else (1,)
            shape = (*of_layers, *place.shape)
            data[place.key] = torch.empty(shape, dtype=self.dtypes[place.key])
            offsets[place.key] = (place.layer or 0, *[0] * (len(shape) - 1))
        reader = checkpoint.FileSystemReader(self.path)
        planner = _PartsPlanner(offsets)
        with self._readable():
            checkpoint.load(data, storage_reader=reader, planner=planner, no_dist=True)
        return {place: data[place.key].view(place.shape) for place in wanted}


class _PartsPlanner(checkpoint.DefaultLoadPlanner):
    """Reads one contiguous part of each tensor: where it begins, by key; its size is the target's.

    Megatron's own loading wants all layers of a tensor from a single process.
    """

    def __init__(self, offsets: dict[str, tuple[int, ...]]) -> None:
        super().__init__()
        self._offsets = offsets

    def create_local_plan(self) -> LoadPlan:
        items = []
        for key, target in self.state_dict.items():
            part = ChunkStorageMetadata(torch.Size(self._offsets[key]), target.shape)
            stored = self.metadata.state_dict_metadata[key]
            items += create_read_items_for_chunk_list(key, stored, [part])
        return LoadPlan(items)

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        return self.state_dict[index.fqn]


def _sharded(model: Architecture, place: Place, data: Tensor):
    """A tensor as one layer of its key, or as all of it."""
    from megatron.core.dist_checkpointing import ShardedTensor

    if place.layer is None:
        return ShardedTensor.from_rank_offsets(place.key, data)
    of_layers = (0, place.layer, model.layers)
    return ShardedTensor.from_rank_offsets(place.key, data, of_layers, prepend_axis_num=1)


def write(folder: Path, model: Architecture, tensors: dict[Place, Tensor]) -> None:
    """Write iteration 0 of a --save folder, which ``--pretrained-checkpoint`` takes.

    Args:
        folder: exists, empty.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    state = {"args": to_arguments(model), "checkpoint_version": 3.0, "iteration": 0}
    for index, (place, tensor) in enumerate(tensors.items()):
        state[str(index)] = _sharded(model, place, tensor.contiguous())
    for name in EXTRA_STATE:
        for layer in range(model.layers):
            key = f"decoder.layers.{name}._extra_state"
            state[f"{layer} {key}"] = ShardedObject(key, None, (model.layers,), (layer,))
    final = "decoder.final_layernorm._extra_state"
    state[final] = ShardedObject(final, None, (1,), (0,))
    path = folder / ITERATION
    path.mkdir(parents=True)
    dist_checkpointing.save(state, str(path), validate_access_integrity=False)
    (folder / TRACKER).write_text("0")
