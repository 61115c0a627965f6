"""Runs side by side, as a table on the terminal."""

from rich.table import Table

from .console import table_console
from .curves import LOSS, VALIDATION_LOSS, Curve, Run


def _last(curve: Curve, form: str) -> str:
    return format(curve[max(curve)], form) if curve else "-"


def print_table(runs: list[Run]) -> None:
    """Steps, last losses (nats per token) and the largest composite gain of each run."""
    table = Table()
    for heading in ("run", "steps", "training loss", "validation loss", "max composite gain"):
        table.add_column(heading)
    for run in runs:
        gain = run.max_gain()
        table.add_row(
            run.name,
            str(max(run.curve(LOSS))),
            _last(run.curve(LOSS), ".4f"),
            _last(run.curve(VALIDATION_LOSS), ".4f"),
            "-" if gain is None else f"{gain:.4g}",
        )
    table_console().print(table)
