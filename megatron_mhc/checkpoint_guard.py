"""Looks at the checkpoint that is to be loaded, before anything is built.

Two things go wrong late otherwise: weights of a model with other mHC settings, whose shapes may
even agree, and a tracker file that a kill left empty although complete checkpoints lie beside it.
"""

import argparse
import os
from pathlib import Path

from .arguments import DEFAULTS, flag
from .errors import UserError

TRACKER = "latest_checkpointed_iteration.txt"
# Values of --dist-ckpt-strictness with which parameters that a checkpoint lacks stay as they are.
LENIENT = ("log_unexpected", "log_all", "ignore_all")
# What decides the meaning of the weights; gating factor, backend and logging do not.
SETTINGS = ("mhc_num_residual_streams", "mhc_residual_mixing", "mhc_sinkhorn_iterations", "mhc_eps")


def latest_iteration(folder: Path) -> int | None:
    """The iteration that Megatron would load from a --save folder; None where there is none."""
    tracker = folder / TRACKER
    text = tracker.read_text().strip() if tracker.is_file() else ""
    return int(text) if text.isdigit() else None


def complete_iterations(folder: Path) -> list[int]:
    """Iterations under ``folder`` whose distributed checkpoint was written to its end, ascending.

    ``metadata.json`` is the last file that Megatron writes of one.
    """
    found = []
    for path in folder.glob("iter_*"):
        if (path / "metadata.json").is_file() and path.name[5:].isdigit():
            found.append(int(path.name[5:]))
    return sorted(found)


def repair_tracker(folder: Path) -> str | None:
    """Point a cut-off tracker at the newest complete checkpoint.

    Megatron truncates the tracker before it writes it, so a kill between the two leaves it empty.

    Returns:
        What was done, in one line, or None where there was nothing to do.
    """
    tracker = folder / TRACKER
    if not tracker.is_file() or tracker.read_text().strip():
        return None
    complete = complete_iterations(folder)
    if not complete:
        return None
    aside = tracker.with_suffix(".repair")
    aside.write_text(str(complete[-1]))
    os.replace(aside, tracker)
    return f"mHC: {tracker} was cut off; resuming from the last complete checkpoint, {complete[-1]}"


def damage(problem: BaseException) -> str:
    """What a checkpoint's reader raised, in one line."""
    said = str(problem).strip().splitlines() or [type(problem).__name__]
    return f"a file of it is missing or damaged ({said[-1]})"


def saved_settings(checkpoint: Path) -> dict[str, object] | None:
    """The mHC settings a distributed checkpoint was made with; None where it does not tell.

    A checkpoint of a plain model gives "mhc" False. "vocabulary" are the rows of its embedding.

    Raises:
        UserError: it cannot be read.
    """
    # Imported here: tools read trackers with this module, without Megatron.
    from megatron.core.dist_checkpointing import load_common_state_dict
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        saved = load_common_state_dict(str(checkpoint)).get("args")
    except CheckpointingException:
        return None
    except (CheckpointException, EOFError, AssertionError) as problem:
        raise UserError(f"{checkpoint}: {damage(problem)}; use another --ckpt-step") from problem
    if saved is None:
        return None
    vocabulary = getattr(saved, "padded_vocab_size", None)
    # One stream is the plain residual, whatever the other flags say.
    if not getattr(saved, "mhc", False) or saved.mhc_num_residual_streams == 1:
        return {"mhc": False, "vocabulary": vocabulary}
    settings = {name: getattr(saved, name, DEFAULTS[name]) for name in SETTINGS}
    return {"mhc": True, "vocabulary": vocabulary, **settings}


def _source(args: argparse.Namespace) -> tuple[str, Path] | None:
    """The flag and the folder that Megatron loads from: --pretrained-checkpoint where --load has no
    checkpoint.
    """
    load, pretrained = args.load, getattr(args, "pretrained_checkpoint", None)
    if pretrained and not (load and (Path(load) / TRACKER).is_file()):
        if not (Path(pretrained) / TRACKER).is_file():
            raise UserError(
                f"--pretrained-checkpoint {pretrained}: no {TRACKER} there; give a --save folder"
            )
        return "--pretrained-checkpoint", Path(pretrained)
    return ("--load", Path(load)) if load else None


def _refuse_other_settings(args: argparse.Namespace, flagged: str, name: str, saved: dict) -> None:
    """Raises UserError if checkpoint ``name`` from ``flagged`` has other mHC settings."""
    plain = not args.mhc or args.mhc_num_residual_streams == 1
    if saved["mhc"] == plain:
        made, now = ("with", "without") if saved["mhc"] else ("without", "with")
        remedy = (
            "add --mhc"
            if saved["mhc"]
            else "leave --mhc out, or start from it: --pretrained-checkpoint with "
            f"--dist-ckpt-strictness {LENIENT[0]}"
        )
        raise UserError(f"{flagged}: {name} was made {made} --mhc, this run is {now}; {remedy}")
    differing = [
        f"{flag(setting)} {getattr(args, setting)}: {name} was made with {saved[setting]}"
        for setting in SETTINGS
        if saved["mhc"] and saved[setting] != getattr(args, setting)
    ]
    if differing:
        lines = "\n".join(differing)
        raise UserError(f"{flagged}\n{lines}\ngive the checkpoint's values")


def _other_vocabulary(args: argparse.Namespace, checkpoint: Path, there: int | None) -> list[str]:
    """Megatron loads a vocabulary that was padded otherwise, without a word."""
    here = getattr(args, "padded_vocab_size", None)
    if None in (here, there) or here == there:
        return []
    what = f"the last {abs(here - there)} " + (
        "start from random values" if here > there else "are lost, which are tokens or padding"
    )
    return [
        f"mHC: {checkpoint} has {there} rows of vocabulary, this run {here}: {what}; "
        "--make-vocab-size-divisible-by and --tensor-model-parallel-size pad it"
    ]


def check_checkpoint(args: argparse.Namespace) -> list[str]:
    """Refuse a checkpoint that was made with other mHC settings.

    A plain one is taken as the beginning of an mHC model, whose mappings then have their initial
    values, where --pretrained-checkpoint names it and --dist-ckpt-strictness allows for that.

    Args:
        args: Megatron's arguments, the mHC group filled in.

    Returns:
        Lines for the user: what was repaired, what could not be checked.

    Raises:
        UserError: names each differing flag with both values, and the remedy.
    """
    said = []
    remote = [
        path
        for path in (args.load, getattr(args, "pretrained_checkpoint", None))
        if "://" in (path or "")
    ]
    if remote:
        return [f"mHC: {remote[0]} is not on a disk; its mHC settings are not checked"]
    if args.load and args.rank == 0 and (repaired := repair_tracker(Path(args.load))):
        said.append(repaired)
    source = _source(args)
    if source is None:
        return said
    name, folder = source
    step = getattr(args, "ckpt_step", None)
    iteration = step or latest_iteration(folder)
    if iteration is None:
        if (folder / TRACKER).is_file():
            said.append(f"mHC: {folder / TRACKER} names no iteration; mHC settings are not checked")
        return said
    checkpoint = folder / f"iter_{iteration:07d}"
    if not checkpoint.is_dir():
        which = f"--ckpt-step {step}" if step else f"its {TRACKER}"
        there = ", ".join(map(str, complete_iterations(folder))) or "none"
        raise UserError(
            f"{name} {folder}: {which} names {checkpoint.name}, which is not there; complete "
            f"iterations: {there}"
        )
    saved = saved_settings(checkpoint)
    if saved is None:
        said.append(f"mHC: {checkpoint} does not tell its mHC settings; they are not checked")
        return said
    said += _other_vocabulary(args, checkpoint, saved["vocabulary"])
    lenient = getattr(args, "dist_ckpt_strictness", None) in LENIENT
    starts = args.mhc and args.mhc_num_residual_streams != 1 and not saved["mhc"]
    if name == "--pretrained-checkpoint" and lenient and starts:
        said.append(f"mHC: {checkpoint} is a plain model's; mappings start from initial values")
        return said
    _refuse_other_settings(args, f"{name} {folder}", checkpoint.name, saved)
    return said
