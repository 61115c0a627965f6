"""``python -m megatron_mhc.patches``: every patch and its state on the installed Megatron."""

from rich.console import Console
from rich.table import Table

from megatron_mhc import environment

from . import megatron_version, status


def main() -> None:
    environment.prepare()
    table = Table(title=f"megatron-core {megatron_version()}", show_lines=True)
    for heading in ("patch", "state", "target", "reason", "tested on"):
        table.add_column(heading, overflow="fold")
    for row in status():
        state = f"{row.state}: {row.detail}" if row.detail else row.state
        tested = ", ".join(row.patch.tested)
        table.add_row(row.patch.name, state, row.patch.target, row.patch.reason, tested)
    console = Console()
    # A pipe has no width of its own; 80 columns would fold every target in two.
    (console if console.is_terminal else Console(width=160)).print(table)


if __name__ == "__main__":
    main()
