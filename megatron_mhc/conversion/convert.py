"""From one format to the other: every tensor accounted for, written aside and renamed."""

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path

import torch
from torch import Tensor

from megatron_mhc.config import MHCConfig
from megatron_mhc.errors import UserError

from . import megatron_folder
from .architecture import Architecture
from .hugging_face_config import from_config, write_config
from .hugging_face_folder import HuggingFaceFolder, Writer
from .megatron_arguments import from_arguments
from .megatron_folder import MegatronCheckpoint
from .tensors import EMBEDDING, OUTPUT, Place, places

_HALVES = {torch.bfloat16: "bf16", torch.float16: "fp16"}
REPORT = "conversion_report.json"


@dataclasses.dataclass(frozen=True)
class Converted:
    """A conversion that is over.

    Attributes:
        megatron, hugging_face: the folders, one of which is new; megatron is the iteration's.
        tensors: how many of Megatron's were converted.
    """

    model: Architecture
    megatron: Path
    hugging_face: Path
    tensors: int


def words(made: Converted) -> list[str]:
    """Flags of examples/pretrain_gpt.py that start from an import, beside those of the run."""
    found = ["--pretrained-checkpoint", str(made.megatron.parent)]
    for name, value in made.model.flags().items():
        found += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return found


@contextlib.contextmanager
def _aside(out: Path) -> Iterator[Path]:
    """A folder beside ``out`` that takes its name at the end, and is removed where that fails.

    Raises:
        UserError: ``out`` exists.
    """
    if os.path.lexists(out):
        raise UserError(f"--out {out}: exists; give a new folder")
    partial = out.with_name(f"{out.name}.{os.getpid()}.partial")
    made = [folder for folder in partial.parents if not folder.exists()]
    partial.mkdir(parents=True)
    try:
        yield partial
        partial.rename(out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
        for folder in made:
            with contextlib.suppress(OSError):  # the result is in it
                folder.rmdir()


def _report(folder: Path, source: Path, model: Architecture, lines: list[dict], **more) -> None:
    content = {"from": str(source), "model": dataclasses.asdict(model), **more, "tensors": lines}
    (folder / REPORT).write_text(json.dumps(content, indent=1))


def _line(place: Place, tensor: Tensor) -> dict:
    return {
        "megatron": place.key,
        "layer": place.layer,
        "hugging_face": place.names,
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
    }


def to_hugging_face(load: Path, out: Path, step: int | None = None) -> Converted:
    """Export a Megatron checkpoint: layer by layer, in the dtypes that it has.

    Args:
        load: a --save folder. step: its iteration; None is the latest. out: a new folder.

    Raises:
        UserError: no such checkpoint, no Llama, tensors missing or left over, ``out`` exists.
    """
    with _aside(out) as folder:
        megatron_folder.start()
        checkpoint = MegatronCheckpoint(load, step)
        model = from_arguments(checkpoint.args, f"--load {checkpoint.path}")
        wanted = places(model)
        checkpoint.check(model, wanted)
        writer, lines = Writer(folder), []
        for _, together in groupby(wanted, lambda place: place.layer):
            for place, tensor in checkpoint.read(list(together)).items():
                lines.append(_line(place, tensor))
                for name, part in zip(place.names, place.split(tensor), strict=True):
                    writer.add(name, part)
        writer.finish()
        write_config(folder, model, checkpoint.dtypes[wanted[0].key])
        _report(folder, checkpoint.path, model, lines)
    return Converted(model, checkpoint.path, out, len(lines))


def to_megatron(hf: Path, out: Path, mhc: MHCConfig | None = None) -> Converted:
    """Import a Hugging Face folder as iteration 0 of a --save folder, for --pretrained-checkpoint.

    Args:
        hf: a Llama's folder, or one that :func:`to_hugging_face` made. out: a new folder.
        mhc: give a plain Llama streams, with mappings at their initial values, where the model
            computes what it did (to mhc.eps).

    Raises:
        UserError: no Llama, tensors missing or left over, streams twice, ``out`` exists.
    """
    with _aside(out) as folder:
        source = HuggingFaceFolder(hf)
        model = from_config(source.config, f"--hf {hf}")
        tensors = {}
        if mhc is not None:
            if model.mhc is not None:
                n = model.mhc.num_streams
                raise UserError(f"--mhc: {hf} has {n} streams already; leave it out")
            model = dataclasses.replace(model, mhc=mhc)
            tensors = {place: _initial(model, place) for place in places(model) if place.in_float32}
        wanted = [place for place in places(model) if place not in tensors]
        left_out = _left_out(source, model, {name for place in wanted for name in place.names})
        tensors |= {place: _read(source, place) for place in wanted}
        dtype = tensors[wanted[0]].dtype
        model = dataclasses.replace(model, half=_HALVES.get(dtype))
        megatron_folder.start()
        megatron_folder.write(folder, model, tensors)
        lines = [_line(place, tensor) for place, tensor in tensors.items()]
        _report(folder, hf, model, lines, left_out=left_out)
    return Converted(model, out / megatron_folder.ITERATION, hf, len(lines))


def _read(source: HuggingFaceFolder, place: Place) -> Tensor:
    """Raises UserError where the tensors are not of the place's shape."""
    parts = [source.read(name) for name in place.names]
    for name, part, shape in zip(place.names, parts, place.part_shapes, strict=True):
        if tuple(part.shape) != shape:
            raise UserError(f"--hf {source.folder}: {name}: {tuple(part.shape)}, expected {shape}")
        if part.dtype not in (torch.float32, *_HALVES):
            raise UserError(
                f"--hf {source.folder}: {name}: {part.dtype}, expected float32, bfloat16 or float16"
            )
    tensor = place.join(parts)
    return tensor.float() if place.in_float32 else tensor


def _left_out(source: HuggingFaceFolder, model: Architecture, wanted: set[str]) -> list[str]:
    """Names that Megatron needs nothing of: RoPE's tables, a tied output layer's second copy.

    Raises:
        UserError: names every other tensor that has no place, and every missing one.
    """
    over = sorted(set(source.files) - wanted)
    fine = [name for name in over if name.endswith("rotary_emb.inv_freq")]
    if model.tied and OUTPUT in over:
        if not torch.equal(source.read(OUTPUT), source.read(EMBEDDING)):
            raise UserError(
                f"--hf {source.folder}: config.json has tie_word_embeddings true, and {OUTPUT} "
                f"differs from {EMBEDDING}; set it to false, as transformers takes it"
            )
        fine.append(OUTPUT)
    problems = [f"{name}: not in the folder" for name in sorted(wanted - set(source.files))]
    problems += [f"{name}: has no place in a Llama" for name in over if name not in fine]
    if problems:
        raise UserError(f"--hf {source.folder}\n" + "\n".join(problems))
    return fine


def _initial(model: Architecture, place: Place) -> Tensor:
    """A mapping parameter's initial value."""
    from megatron_mhc import HyperConnection, HyperHead

    if place.layer is None:
        module = HyperHead(model.mhc, model.hidden)
    else:
        sublayer = 2 * place.layer + (".mlp_" in place.key)
        module = HyperConnection(model.mhc, model.hidden, sublayer)
    return getattr(module, place.key.rsplit(".", 1)[1]).detach()
