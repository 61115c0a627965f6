"""Blocks and their warps, who take turns at random, and what is under way beside them."""

import random
from collections.abc import Callable

from greenlet import getcurrent, greenlet


class Deadlock(Exception):
    """Nobody can go on."""


class Job:
    """Something that happens once, at any time until somebody waits for it."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action, self.done = action, False

    def finish(self) -> None:
        if not self.done:
            self.done = True
            self._action()


class Warps(greenlet):
    """The warps of a block that run one function, as one task.

    block: the block's number. several: whether it is more than one warp. stores, copies: jobs that
    it started, oldest first. products: such jobs, and the tiles that they read. leaving: such
    tiles, waited for since the last barrier of all threads. unbarriered: tiles that it
    wrote since then. unfenced: tiles that it wrote since its last fence. loads: since its last
    barrier. polled: when it last read an address that it polls.
    """

    def __init__(
        self, machine: "Machine", block: int, body: Callable[[], None], several: bool = True
    ) -> None:
        super().__init__(body, machine.turns)
        self.machine, self.block, self.several = machine, block, several
        self.ready: Callable[[], bool] = lambda: True
        self.speed = machine.random.choice((1.0, 1.0, 0.1, 0.01))
        self.stores: list[Job] = []
        self.copies: list[Job] = []
        self.products: list[tuple] = []
        self.unbarriered: list = []
        self.unfenced: list = []
        self.leaving: list = []
        self.loads: list = []
        self.polled: dict[int, int] = {}


class Machine:
    """A GPU that holds ``resident`` blocks at a time, and starts them in any order."""

    def __init__(self, memory, seed: int, resident: int | None = None) -> None:
        self.memory, self.random, self.resident = memory, random.Random(seed), resident
        # How soon a job is done beside warps that could go on.
        self.haste = self.random.choice((0.003, 0.05, 0.5))
        self.warps: list[Warps] = []
        self.jobs: list[Job] = []
        self.programs = 0

    def run(self, programs: int, body: Callable[[], None]) -> None:
        self.programs, self.turns = programs, getcurrent()
        waiting = self.random.sample(range(programs), programs)
        resident = self.resident or programs
        while waiting or self.warps or self.jobs:
            self.jobs = [job for job in self.jobs if not job.done]
            running = {warps.block for warps in self.warps}
            if waiting and len(running) < resident and self.random.random() < 0.1:
                self.warps.append(Warps(self, waiting.pop(), body))
            ready = [warps for warps in self.warps if warps.ready()]
            if self.jobs and (not ready or self.random.random() < self.haste):
                self.random.choice(self.jobs).finish()
            elif ready:
                self._turn(self.random.choices(ready, [warps.speed for warps in ready])[0])
            elif self.warps and (not waiting or len(running) >= resident):
                raise Deadlock

    def _turn(self, warps: Warps) -> None:
        warps.switch()
        if warps.dead:
            self.warps.remove(warps)
            assert not warps.copies, "ends before its copies have been made"

    def start(self, job: Job) -> Job:
        self.jobs.append(job)
        return job

    def spawn(self, body: Callable[[], None], count: int) -> Warps:
        """``count`` more warps of the current block."""
        warps = Warps(self, getcurrent().block, body, count > 1)
        self.warps.append(warps)
        return warps


def current() -> Warps:
    """The warps whose turn it is."""
    return getcurrent()


def pause() -> None:
    """Lets others go on first."""
    wait(lambda: True)


def wait(ready: Callable[[], bool]) -> None:
    warps = getcurrent()
    warps.ready = ready
    warps.parent.switch()
