"""How far the run is: a bar on a terminal, a plain line now and then elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

PLAIN_INTERVAL = 5.0
"""Seconds between two plain lines."""


@contextmanager
def progress(total: int, done: int) -> Iterator[Callable[[int], None]]:
    """Show progress on stdout while the block runs.

    Args:
        total: bytes of input.
        done: bytes that an earlier run has done; they do not count for the speed.

    Yields:
        A function to call with the number of bytes just read.
    """
    if not sys.stdout.isatty():
        yield _plain_lines(total, done)
        return
    from rich import progress as bars

    columns = (
        bars.TextColumn("preparing"),
        bars.BarColumn(),
        bars.DownloadColumn(),
        bars.TransferSpeedColumn(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, transient=True) as bar:
        task = bar.add_task("preparing", total=total, completed=done)
        yield lambda read: bar.advance(task, read)


def _plain_lines(total: int, done: int) -> Callable[[int], None]:
    begin = said = time.monotonic()
    read_now = 0

    def advance(read: int) -> None:
        nonlocal said, read_now
        read_now += read
        now = time.monotonic()
        if now - said >= PLAIN_INTERVAL:
            said = now
            at = done + read_now
            speed = read_now / (now - begin) / 1e6
            print(
                f"{at / 1e6:.1f} of {total / 1e6:.1f} MB ({at / total:.0%}), {speed:.1f} MB/s",
                flush=True,
            )

    return advance
