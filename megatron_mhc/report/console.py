"""Where tables are printed."""

from rich.console import Console


def table_console() -> Console:
    """The terminal, or a wide page where there is none: a pipe would fold tables at 80 columns."""
    console = Console()
    return console if console.is_terminal else Console(width=160)
