"""A folder of the small training job belongs to one training, and says to which."""

import json
import os
import warnings
from pathlib import Path

from .checkpoint_guard import latest_iteration
from .command_line import check_data, check_folder
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
    check_folder(folder, f"--run {folder}")
    mine = {"mixing": mixing, "steps": steps, "data": data.resolve()}
    begun = _noted(folder) or _saved(folder)
    for name, theirs in begun.items():
        if theirs != mine[name]:
            raise UserError(
                f"--{name} {mine[name]}: {folder} was begun with {theirs}; give that, or "
                "another --run"
            )
    if not begun:
        check_data(data)
    folder.mkdir(parents=True, exist_ok=True)
    aside = (folder / NOTE).with_suffix(".aside")
    aside.write_text(json.dumps({**mine, "data": os.path.relpath(mine["data"], folder.resolve())}))
    os.replace(aside, folder / NOTE)


def _noted(folder: Path) -> dict[str, object]:
    """What the note says; {} without one."""
    if not (folder / NOTE).is_file():
        return {}
    try:
        noted = json.loads((folder / NOTE).read_text())
        return {**noted, "data": (folder / noted["data"]).resolve()}
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"--run {folder}: {NOTE} there is not this job's; give another folder"
        ) from None


def _saved(folder: Path) -> dict[str, object]:
    """What the newest checkpoint was trained with; {} without one. Earlier runs left no note."""
    checkpoints = folder / "checkpoints"
    step = latest_iteration(checkpoints)
    if step is None:
        return {}
    with warnings.catch_warnings(action="ignore"):  # of packages and processes not needed here
        # Imported here, a matter of seconds: whoever finds a note needs no Megatron.
        from megatron.core.dist_checkpointing import load_common_state_dict

        saved = load_common_state_dict(str(checkpoints / f"iter_{step:07d}"))["args"]
    if not saved.train_data_path:
        raise UserError(f"--run {folder}: its checkpoints are not this job's; give another folder")
    (train,) = saved.train_data_path
    return {
        "mixing": saved.mhc_residual_mixing if saved.mhc else "plain",
        "steps": saved.train_iters,
        "data": Path(train.removesuffix("_train")).resolve(),
    }
