"""Blocks of post_pre_hopper_kernel on a machine of random speeds: barriers, counts and tickets,
without arithmetic. Asserts that nobody reads what is not there or overwrites what is still read.
"""

import random

import interpreter  # noqa: F401

from megatron_mhc.kernels.post_pre_hopper_groups import COUNTED, TILE_NUMBERS

BATCH, NUMBERS = COUNTED.value, TILE_NUMBERS.value

# Rules that a launch may be told to break.
MUTATIONS = ("groups by block", "eager reuse", "no wait for shares", "short queue", "late count")


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
        self, seed, G, groups, resident, tiles, RX, RF, RS, long_ones, merge, head, mutation=None
    ):
        self.random = random.Random(seed)
        self.G, self.groups, self.resident, self.tiles = G, groups, resident, tiles
        self.RX, self.RF, self.RS, self.long_ones = RX, RF, RS, long_ones
        self.merge, self.head, self.mutation = merge, head, mutation
        self.tickets, self.drawn = 0, groups
        self.mail, self.shares = {}, [set() for _ in range(tiles)]
        self.counted = [0] * tiles
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

    def first_tile(self, number):
        """Of a chunk: the long ones have two tiles, the others one."""
        return 2 * number if number < self.long_ones else self.long_ones + number

    def pause(self, most):
        for _ in range(self.random.choice((0, 0, 0, most))):
            yield None

    def block(self, index):
        ticket = index if self.mutation == "groups by block" else self.tickets
        self.tickets += 1
        group, rank = divmod(ticket, self.G)
        RX, RF, RS, tiles = self.RX, self.RF, self.RS, self.tiles

        def ring(depth, arrivals=1):
            return [Barrier(arrivals) for _ in range(depth)]

        full, empty, f_empty = ring(RX), ring(RX, 2 if self.merge else 1), ring(RF)
        sums_full, sums_empty, published, pre_full = ring(RS), ring(RS), ring(RX), ring(RX)
        queue_full, queue_empty = ring(2), ring(2)
        xs, fs, sums, pre, queue = [None] * RX, [None] * RF, [None] * RS, [None] * RX, [None] * 2
        numbers = {}

        def number(k):
            use, tile = numbers[k % NUMBERS]
            assert use == k
            return tile

        def draw(j):
            self.mail[group, j] = self.drawn
            self.drawn += 1
            return self.first_tile(self.mail[group, j]) < tiles

        def land(k, ring, depth, what):
            yield from self.pause(5)
            ring[k % depth] = what, k
            full[k % RX].landed()

        def load():
            drawing = rank == self.G - 1
            k = j = 0
            tile, end = self.first_tile(group), self.first_tile(group + 1)
            begins = True
            while tile < tiles:
                yield empty[k % RX].ended(k, RX, True)
                if k == 1:
                    yield full[0].ended(0, RX)
                numbers[k % NUMBERS] = k, tile
                full[k % RX].copies += 1 + self.merge
                full[k % RX].arrive()
                self.tasks.append(land(k, xs, RX, "x"))
                yield None
                if self.merge:
                    yield f_empty[k % RF].ended(k, RF, True)
                    self.tasks.append(land(k, fs, RF, "f"))
                    yield None
                if drawing and begins:
                    drawing = draw(j + 1)
                k, tile = k + 1, tile + 1
                begins = tile == end
                if begins:
                    j += 1
                    yield lambda j=j: (group, j) in self.mail
                    number = self.mail[group, j]
                    tile, end = self.first_tile(number), self.first_tile(number + 1)
            yield empty[k % RX].ended(k, RX, True)
            numbers[k % NUMBERS] = k, tiles
            full[k % RX].arrive()

        copies = set()  # of X', to memory

        def copy_out(k):
            yield from self.pause(20)
            assert xs[k % RX] == ("merged", k)
            copies.remove(k)

        def merge():
            k = 0
            yield full[0].ended(0, RX)
            while number(k) < tiles:
                for _ in range(2):
                    assert xs[k % RX] == ("x", k)
                    assert not self.merge or fs[k % RF] == ("f", k)
                    yield None
                if self.merge:
                    xs[k % RX] = "merged", k
                yield sums_empty[k % RS].ended(k, RS, True)
                sums[k % RS] = k
                yield None
                if self.merge and self.mutation != "eager reuse":
                    yield lambda: not copies
                sums_full[k % RS].arrive()
                if self.merge:
                    assert fs[k % RF] == ("f", k)
                    copies.add(k)
                    self.tasks.append(copy_out(k))
                    f_empty[k % RF].arrive()
                    if k:
                        empty[(k - 1) % RX].arrive()
                k += 1
                yield full[k % RX].ended(k, RX)
            yield sums_empty[k % RS].ended(k, RS, True)
            sums_full[k % RS].arrive()

        def count(first, end):
            for k in range(first, end):
                self.counted[number(k)] += 1

        def store():
            k = 0
            yield sums_full[0].ended(0, RS)
            while (tile := number(k)) < tiles:
                if k and k % BATCH == 0:
                    count(k - BATCH, k)
                assert sums[k % RS] == k
                yield from self.pause(10)
                self.shares[tile].add(rank)
                assert sums[k % RS] == k
                yield None
                sums_empty[k % RS].arrive()
                published[k % RX].arrive()
                yield from self.pause(10)
                k += 1
                yield sums_full[k % RS].ended(k, RS)
            if self.mutation != "late count":
                count(max(k - 1, 0) // BATCH * BATCH, k)
            published[k % RX].arrive()

        def form_pre():
            k = queued = 0
            yield published[0].ended(0, RX)
            while (tile := number(k)) < tiles:
                if self.mutation != "no wait for shares":
                    yield lambda tile=tile: len(self.shares[tile]) == self.G
                assert len(self.shares[tile]) == self.G
                pre[k % RX] = k
                yield None
                pre_full[k % RX].arrive()
                if k % self.G == rank and not self.head:
                    if self.mutation != "short queue":
                        yield queue_empty[queued % 2].ended(queued, 2, True)
                    queue[queued % 2] = tile
                    queue_full[queued % 2].arrive()
                    queued += 1
                yield from self.pause(30)
                k += 1
                yield published[k % RX].ended(k, RX)
            pre_full[k % RX].arrive()
            if not self.head:
                yield queue_empty[queued % 2].ended(queued, 2, True)
                queue[queued % 2] = tiles
                queue_full[queued % 2].arrive()

        def form_mappings():
            k = 0
            yield queue_full[0].ended(0, 2)
            while (tile := queue[k % 2]) < tiles:
                queue_empty[k % 2].arrive()
                yield lambda tile=tile: self.counted[tile] == self.G
                self.mapped[tile] += 1
                yield from self.pause(60)
                k += 1
                yield queue_full[k % 2].ended(k, 2)

        def aggregate():
            k = 0
            yield pre_full[0].ended(0, RX)
            while (tile := number(k)) < tiles:
                assert pre[k % RX] == k
                for _ in range(2):
                    assert xs[k % RX] == ("merged" if self.merge else "x", k)
                    yield None
                empty[k % RX].arrive()
                self.aggregated[tile] += 1
                yield from self.pause(30)
                k += 1
                yield pre_full[k % RX].ended(k, RX)

        mapping = [] if self.head else [form_mappings()]
        return [load(), merge(), store(), form_pre(), aggregate(), *mapping]
