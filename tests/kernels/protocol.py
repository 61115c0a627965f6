"""Blocks of post_pre_hopper_kernel on a machine of random speeds: barriers, counts and tickets,
without arithmetic. Asserts that nobody reads what is not there or overwrites what is still read.
"""

import random

# Rules that a launch may be told to break.
MUTATIONS = ("groups by block", "eager reuse", "no wait for shares", "short queue")


class Deadlock(Exception):
    """Nobody can go on."""


class Barrier:
    """An mbarrier: a phase ends when all arrivals and all announced copies are there."""

    def __init__(self, arrivals=1):
        self.arrivals = self.missing = arrivals
        self.copies = self.phase = 0

    def arrive(self):
        self.missing -= 1
        assert self.missing >= 0, "one arrival too many"
        self._flip()

    def landed(self):
        self.copies -= 1
        self._flip()

    def _flip(self):
        if not self.missing and not self.copies:
            self.missing, self.phase = self.arrivals, self.phase ^ 1

    def ended(self, use, depth, ring_empty=False):
        """A wait for the end of a ring's use ``use``, by the parity that the kernel computes."""
        parity = (use // depth & 1) ^ ring_empty
        return lambda: self.phase != parity


class Launch:
    """One launch. ``resident``: how many of its blocks the machine holds at a time."""

    def __init__(
        self, seed, G, groups, resident, tiles, RX, RK, RS, chunk, merge, head, mutation=None
    ):
        self.random = random.Random(seed)
        self.G, self.groups, self.resident, self.tiles = G, groups, resident, tiles
        self.RX, self.RK, self.RS, self.chunk = RX, RK if merge else RX, RS, chunk
        self.merge, self.head, self.mutation = merge, head, mutation
        self.tickets = self.drawn = 0
        self.mail, self.shares = {}, [set() for _ in range(tiles)]
        self.aggregated, self.mapped = [0] * tiles, [0] * tiles
        self.tasks, self.ended = [], []

    def run(self):
        """Starts blocks in a random order and lets tasks take random turns."""
        order = self.random.sample(range(self.G * self.groups), self.G * self.groups)
        running, waits = {}, {}
        while order or self.tasks:
            if order and len(running) < self.resident and self.random.random() < 0.3:
                index = order.pop()
                tasks = self.block(index)
                running[index] = set(map(id, tasks))
                self.tasks += tasks
            ready = [task for task in self.tasks if waits.get(id(task), lambda: True)()]
            if not ready:
                if not order or len(running) >= self.resident:
                    raise Deadlock
                continue
            task = self.random.choice(ready)
            try:
                waits[id(task)] = next(task) or (lambda: True)
            except StopIteration:
                self.tasks.remove(task)
                for index in [index for index, left in running.items() if id(task) in left]:
                    running[index].discard(id(task))
                    if not running[index]:
                        del running[index]
                self.ended.append(task)  # no other gets its identity
        assert self.aggregated == [self.G] * self.tiles
        assert self.mapped == [0 if self.head else 1] * self.tiles

    def pause(self, most):
        for _ in range(self.random.choice((0, 0, 0, most))):
            yield None

    def block(self, index):
        ticket = index if self.mutation == "groups by block" else self.tickets
        self.tickets += 1
        group, rank = divmod(ticket, self.G)
        RX, RK, RS, tiles = self.RX, self.RK, self.RS, self.tiles

        def ring(depth, arrivals=1):
            return [Barrier(arrivals) for _ in range(depth)]

        full, empty, sums_full, sums_empty = ring(RX), ring(RX), ring(RS), ring(RS)
        published, pre_full, queue_full, queue_empty = ring(RK), ring(RK), ring(2), ring(2)
        kept_empty = ring(RK, 2) if self.merge else empty
        xs, sums, pre, queue, numbers = [None] * RX, [None] * RS, [None] * RK, [None] * 2, {}
        kept = [None] * RK if self.merge else xs

        def number(k):
            use, tile = numbers[k % 32]
            assert use == k
            return tile

        def draw(j):
            self.mail[group, j] = self.drawn
            self.drawn += 1
            return self.mail[group, j] * self.chunk < tiles

        def receive(j):
            yield lambda: (group, j) in self.mail
            return self.mail[group, j] * self.chunk

        def land(k):
            yield from self.pause(5)
            xs[k % RX] = k
            full[k % RX].landed()

        def load():
            drawing = rank == self.G - 1 and draw(0)
            tile = yield from receive(0)
            k = 0
            while tile < tiles:
                yield empty[k % RX].ended(k, RX, True)
                numbers[k % 32] = k, tile
                full[k % RX].copies += 1
                full[k % RX].arrive()
                self.tasks.append(land(k))
                yield None
                if drawing and k % self.chunk == 0:
                    drawing = draw(k // self.chunk + 1)
                k, tile = k + 1, tile + 1
                if k % self.chunk == 0:
                    tile = yield from receive(k // self.chunk)
            yield empty[k % RX].ended(k, RX, True)
            numbers[k % 32] = k, tiles
            full[k % RX].arrive()

        def merge():
            k = 0
            yield full[0].ended(0, RX)
            while number(k) < tiles:
                assert xs[k % RX] == k
                yield None
                if self.merge:
                    yield kept_empty[k % RK].ended(k, RK, True)
                    kept[k % RK] = k
                yield sums_empty[k % RS].ended(k, RS, True)
                sums[k % RS] = k
                yield None
                assert xs[k % RX] == k
                sums_full[k % RS].arrive()
                if self.merge:
                    empty[k % RX].arrive()
                k += 1
                yield full[k % RX].ended(k, RX)
            yield sums_empty[k % RS].ended(k, RS, True)
            if self.merge:
                yield kept_empty[k % RK].ended(k, RK, True)
            sums_full[k % RS].arrive()

        def store():
            k = 0
            yield sums_full[0].ended(0, RS)
            while (tile := number(k)) < tiles:
                assert sums[k % RS] == k
                yield from self.pause(10)
                sums_empty[k % RS].arrive()
                self.shares[tile].add(rank)
                yield None
                published[k % RK].arrive()
                done = k if self.mutation == "eager reuse" else k - 1
                if self.merge and done >= 0:
                    if self.mutation == "eager reuse":
                        kept_empty[done % RK].arrive()
                    yield from self.pause(10)
                    assert kept[done % RK] == done
                    if self.mutation != "eager reuse":
                        kept_empty[done % RK].arrive()
                k += 1
                yield sums_full[k % RS].ended(k, RS)
            published[k % RK].arrive()

        def form_pre():
            k = queued = 0
            yield published[0].ended(0, RK)
            while (tile := number(k)) < tiles:
                if self.mutation != "no wait for shares":
                    yield lambda tile=tile: len(self.shares[tile]) == self.G
                assert len(self.shares[tile]) == self.G
                pre[k % RK] = k
                yield None
                pre_full[k % RK].arrive()
                if k % self.G == rank and not self.head:
                    if self.mutation != "short queue":
                        yield queue_empty[queued % 2].ended(queued, 2, True)
                    queue[queued % 2] = tile
                    queue_full[queued % 2].arrive()
                    queued += 1
                yield from self.pause(30)
                k += 1
                yield published[k % RK].ended(k, RK)
            pre_full[k % RK].arrive()
            if not self.head:
                yield queue_empty[queued % 2].ended(queued, 2, True)
                queue[queued % 2] = tiles
                queue_full[queued % 2].arrive()

        def form_mappings():
            k = 0
            yield queue_full[0].ended(0, 2)
            while (tile := queue[k % 2]) < tiles:
                queue_empty[k % 2].arrive()
                self.mapped[tile] += 1
                yield from self.pause(60)
                k += 1
                yield queue_full[k % 2].ended(k, 2)

        def aggregate():
            k = 0
            yield pre_full[0].ended(0, RK)
            while (tile := number(k)) < tiles:
                assert pre[k % RK] == k
                for _ in range(2):
                    assert kept[k % RK] == k
                    yield None
                kept_empty[k % RK].arrive()
                self.aggregated[tile] += 1
                yield from self.pause(30)
                k += 1
                yield pre_full[k % RK].ended(k, RK)

        mapping = [] if self.head else [form_mappings()]
        return [load(), merge(), store(), form_pre(), aggregate(), *mapping]
