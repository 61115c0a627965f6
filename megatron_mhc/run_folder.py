"""A folder of the small training job belongs to one training, and says to which."""

import json
import os
import warnings
from pathlib import Path

from .checkpoint_guard import latest_iteration
from .errors import UserError

NOTE = "run.json"


def claim(folder: Path, mixing: str, steps: int, data: Path) -> None:
    """Makes the folder, and notes in it what it is for.

    Args:
        data: prefix of the prepared pairs. Noted as seen from the folder, so that a checkout that
            was moved goes on.

    Raises:
        UserError: it is or lies in a file, is of a run with other settings, or is new and its data
            is not there.
    """
    for path in (folder, *folder.parents):
        if path.is_file():
            raise UserError(f"--run {folder}: {path} is a file; give a folder")
    mine = {"mixing": mixing, "steps": steps, "data": data.resolve()}
    begun = _noted(folder) or _saved(folder / "checkpoints")
    for name, theirs in begun.items():
        if theirs != mine[name]:
            raise UserError(
                f"--{name} {mine[name]}: {folder} was begun with {theirs}; give that, or "
                "another --run"
            )
    for ending in () if begun else ("train.bin", "train.idx", "valid.bin", "valid.idx"):
        file = Path(f"{data}_{ending}")
        if not file.is_file():
            raise UserError(f"--data {data}: there is no {file}; tools/prepare_data.py makes it")
    folder.mkdir(parents=True, exist_ok=True)
    aside = (folder / NOTE).with_suffix(".aside")
    aside.write_text(json.dumps({**mine, "data": os.path.relpath(mine["data"], folder.resolve())}))
    os.replace(aside, folder / NOTE)


def _noted(folder: Path) -> dict[str, object]:
    """What the note says; {} without one."""
    if not (folder / NOTE).is_file():
        return {}
    noted = json.loads((folder / NOTE).read_text())
    return {**noted, "data": (folder / noted["data"]).resolve()}


def _saved(checkpoints: Path) -> dict[str, object]:
    """What the newest checkpoint was trained with; {} without one. Earlier runs left no note."""
    step = latest_iteration(checkpoints)
    if step is None:
        return {}
    with warnings.catch_warnings(action="ignore"):  # of packages and processes not needed here
        # Imported here, a matter of seconds: whoever finds a note needs no Megatron.
        from megatron.core.dist_checkpointing import load_common_state_dict

        saved = load_common_state_dict(str(checkpoints / f"iter_{step:07d}"))["args"]
    (train,) = saved.train_data_path
    return {
        "mixing": saved.mhc_residual_mixing if saved.mhc else "plain",
        "steps": saved.train_iters,
        "data": Path(train.removesuffix("_train")).resolve(),
    }
