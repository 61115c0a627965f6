"""``python -m megatron_mhc.patches``: every patch and its state on the installed Megatron."""

from rich.table import Table

from megatron_mhc import environment
from megatron_mhc.report.console import table_console

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
    table_console().print(table)


if __name__ == "__main__":
    main()
