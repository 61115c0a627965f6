"""Every change that megatron-mhc makes to Megatron at run time, one record a file.

``apply()`` before a model is built, ``undo()`` to have Megatron as it was. A target whose source
is not one that the patch was tested on is refused. ``python -m megatron_mhc.patches`` lists them.
"""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from . import (
    checkpointed_forward,
    compile_helpers,
    cpu_data_iterators,
    cpu_initialize,
    cpu_rng_fork,
    cpu_rng_state,
    layer_callables,
    main_param_states,
    param_groups,
    te_normalization,
    transformer_block,
)
from .record import Patch, PatchRefused, fingerprint, megatron_version

__all__ = [
    "PATCHES",
    "Patch",
    "PatchRefused",
    "Status",
    "apply",
    "fingerprint",
    "megatron_version",
    "require",
    "start_up_line",
    "status",
    "undo",
]

PATCHES: tuple[Patch, ...] = (
    compile_helpers.PATCH,
    transformer_block.PATCH,
    checkpointed_forward.PATCH,
    param_groups.PATCH,
    main_param_states.PATCH,
    te_normalization.PATCH,
    layer_callables.PATCH,
    cpu_initialize.PATCH,
    cpu_data_iterators.PATCH,
    cpu_rng_state.PATCH,
    cpu_rng_fork.PATCH,
)

_originals: dict[str, Any] = {}


@dataclass(frozen=True)
class Status:
    """How one patch stands on the installed Megatron.

    Attributes:
        state: "applied", "ready", "skipped" or "refused".
        detail: why it was skipped or refused, else "".
    """

    patch: Patch
    state: str
    detail: str = ""


def status() -> list[Status]:
    """The state of every patch; imports their targets, changes nothing."""
    rows = []
    for patch in PATCHES:
        why_not = patch.why_not()
        if patch.name in _originals:
            rows.append(Status(patch, "applied"))
        elif why_not:
            rows.append(Status(patch, "skipped", why_not))
        elif patch.with_flag:
            rows.append(Status(patch, "skipped", f"for {patch.with_flag}"))
        else:
            try:
                patch.check(patch.current())
                rows.append(Status(patch, "ready"))
            except PatchRefused as refusal:
                rows.append(Status(patch, "refused", str(refusal)))
    return rows


def apply(force: bool = False, flags: Collection[str] = ()) -> None:
    """Apply every patch that is needed here and not applied yet: all of them, or none.

    Args:
        force: also where the replaced source is not one that was tested.
        flags: those in use, of patches that only one flag needs ("--mhc-recompute").

    Raises:
        PatchRefused: an unknown source, and not ``force``.
    """
    wanted = [p for p in PATCHES if p.with_flag is None or p.with_flag in flags]
    needed = [p for p in wanted if p.name not in _originals and not p.why_not()]
    originals = {patch.name: patch.current() for patch in needed}
    if not force:
        for patch in needed:
            patch.check(originals[patch.name])
    for patch in needed:
        patch.put(patch.build(originals[patch.name]))
    _originals.update(originals)


def undo() -> None:
    """Put every original back."""
    for patch in PATCHES:
        if patch.name in _originals:
            patch.put(_originals.pop(patch.name))


def require(name: str) -> None:
    """Check that a patch is in force, for code that cannot work without it.

    Raises:
        RuntimeError: it is not applied.
    """
    if name not in _originals:
        (flag,) = [patch.with_flag for patch in PATCHES if patch.name == name]
        call = f"apply(flags=[{flag!r}])" if flag else "apply()"
        raise RuntimeError(
            f"patch {name} is not applied: call megatron_mhc.patches.{call} before building one"
        )


def start_up_line() -> str:
    """One line: which patches were applied, skipped (why) and refused."""
    words = {"applied": [], "skipped": [], "refused": [], "ready": []}
    for row in status():
        note = f" ({row.detail})" if row.state == "skipped" else ""
        words[row.state].append(row.patch.name + note)
    parts = [f"{state}: {', '.join(names)}" for state, names in words.items() if names]
    return f"mHC patches on megatron-core {megatron_version()}: " + "; ".join(parts)
