"""Reads a run's TensorBoard folder back into curves."""

from dataclasses import dataclass
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_mhc.errors import UserError

LOSS = "lm loss"
VALIDATION_LOSS = "lm loss validation"
COMPOSITE = ("mhc/composite_forward_gain", "mhc/composite_backward_gain")

Curve = dict[int, float]
"""Value by step, ascending."""


@dataclass(frozen=True)
class Run:
    """The scalars of one training run.

    Attributes:
        name: for legends and tables.
        scalars: curve by TensorBoard tag.
    """

    name: str
    scalars: dict[str, Curve]

    def curve(self, tag: str) -> Curve:
        """The curve of a tag; empty where the run did not log it."""
        return self.scalars.get(tag, {})

    def sublayers(self, quantity: str) -> dict[str, Curve]:
        """Curves of one per-sublayer quantity ("forward_gain", "pre", ...), in model order."""
        prefix = f"mhc-{quantity}/"
        return {
            tag.removeprefix(prefix): curve
            for tag, curve in sorted(self.scalars.items())
            if tag.startswith(prefix)
        }

    def max_gain(self) -> float | None:
        """The largest composite gain of the run, forward or backward; None for a plain model."""
        values = [value for tag in COMPOSITE for value in self.curve(tag).values()]
        return max(values, default=None)


def read_run(folder: Path, name: str | None = None) -> Run:
    """Reads every TensorBoard event file in ``folder``.

    A resumed run writes a second file; where both have a step, the later one counts.

    Raises:
        UserError: no such folder, or no training loss in it.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "there is no such folder"
        raise UserError(f"{folder}: {what}; give a run's --tensorboard-dir")
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {}
    for tag in events.Tags()["scalars"]:
        latest = {event.step: event.value for event in events.Scalars(tag)}
        scalars[tag] = dict(sorted(latest.items()))
    if LOSS not in scalars:
        raise UserError(
            f"{folder}: no TensorBoard scalar {LOSS!r} here; give a run's --tensorboard-dir"
        )
    return Run(name or folder.name, scalars)
