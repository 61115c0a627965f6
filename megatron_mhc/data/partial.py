"""The folder of an unfinished run: what is done survives a kill, and one run has it at a time."""

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from megatron_mhc.data.durable import write_json
from megatron_mhc.data.shards import Counts
from megatron_mhc.errors import UserError

LOCK, PLAN = "lock", "plan.json"


class Partial:
    """State of an unfinished run.

    ``plan.json`` holds the settings it was started with and whether it may replace files under
    the prefix; each chunk's counts are written after its pairs, so they mean that it is done.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.merged = os.path.join(folder, "merged")

    def plan(self) -> dict | None:
        """The plan, None when there is no unfinished run."""
        try:
            with open(os.path.join(self.folder, PLAN), encoding="utf-8") as stream:
                return json.load(stream)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def set_plan(self, settings: dict, may_replace: bool) -> None:
        """Write the plan."""
        plan = {"settings": settings, "may_replace": may_replace}
        write_json(os.path.join(self.folder, PLAN), plan)

    def is_ours(self) -> bool:
        """Whether the folder is there and this tool's: it has a plan, or nothing but the lock."""
        if not os.path.isdir(self.folder):
            return False
        return self.plan() is not None or set(os.listdir(self.folder)) <= {LOCK, f"{PLAN}.tmp"}

    @contextmanager
    def locked(self, prefix: str) -> Iterator[None]:
        """Have the folder alone; made when missing, and removed again if nothing came in it.

        Raises:
            UserError: another run has it, it holds files of another program, or it cannot
                be made.
        """
        try:
            os.makedirs(self.folder, exist_ok=True)
        except OSError as error:
            raise UserError(
                f"--output-prefix {prefix}: {self.folder} cannot be made ({error.strerror}); "
                "give a place that can be written to"
            ) from None
        if not self.is_ours():
            raise UserError(
                f"--output-prefix {prefix}: {self.folder} holds files that are not this tool's; "
                "move it away or use another prefix"
            )
        with open(os.path.join(self.folder, LOCK), "w") as lock:
            try:
                # The kernel frees it when the process dies, however it dies.
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"--output-prefix {prefix}: another run is writing it just now; wait for it "
                    "or use another prefix"
                ) from None
            try:
                yield
            finally:
                if self.plan() is None:
                    self.remove()

    def clear(self) -> None:
        """Forget the chunks of an earlier run; its plan stays until ``set_plan``."""
        names = [name for name in os.listdir(self.folder) if name not in (PLAN, LOCK)]
        # Counts first: while they are there, their pairs must be.
        for name in sorted(names, key=lambda name: not name.endswith(".json")):
            os.remove(os.path.join(self.folder, name))

    def remove(self) -> None:
        """Delete the folder if it is there; the plan, which shows that it is ours, near the end."""
        if not os.path.isdir(self.folder):
            return
        self.clear()
        for name in (PLAN, LOCK):
            with suppress(FileNotFoundError):
                os.remove(os.path.join(self.folder, name))
        os.rmdir(self.folder)

    def stem(self, chunk: int) -> str:
        """Path of a chunk's pairs before ``_train`` and ``_valid``."""
        return os.path.join(self.folder, f"chunk-{chunk:06d}")

    def counts(self, chunk: int) -> Counts | None:
        """Counts of a chunk that is done, else None."""
        try:
            with open(f"{self.stem(chunk)}.json", encoding="utf-8") as stream:
                return Counts.from_json(json.load(stream))
        except FileNotFoundError:
            return None

    def set_counts(self, chunk: int, counts: Counts) -> None:
        """Mark a chunk as done."""
        write_json(f"{self.stem(chunk)}.json", counts.as_json())
