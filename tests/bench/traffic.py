"""A labelled history of a token service: who used what from where for weeks, and which of it was abuse.

    traffic = Traffic(Size(seed=101, start=...))
    for append in traffic.ledger(): ...     # events for LEDGER
    for block in traffic.blocks(): ...      # blocks for USAGE, in the order in which they were written
    traffic.labels                          # attacks and look-alikes; how many uses each has, after the last block

The same size gives the same bytes. Memory holds the population and one day's plans, never the history.

    python -m tests.bench.traffic --days 30 --uses 50000000     # how fast it is made, and what is in it
"""

from __future__ import annotations

import argparse
import itertools
import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta

from events import codec
from events.ledger import Append
from events.types import UseBlock
from tests.bench import attacks, lookalikes, signing_in
from tests.bench.behaviour import Behaviour, Entry, Refusal
from tests.bench.encoding import Writers
from tests.bench.labels import Ground, Label
from tests.bench.people import DAY, HOUR, MINUTE, PRESETS, Size
from tests.bench.population import Population

WRITERS = ("sim-a-1", "sim-a-2", "sim-b-1")  # API workers of two hosts


class Traffic:
    """One simulated history. What it yields can be yielded once."""

    def __init__(self, size: Size) -> None:
        self.size = size
        self.population = Population(size)
        self.behaviour = Behaviour(self.population)
        hostile = Ground(self.population, self.behaviour, "attacks")
        attacks.attack(hostile)
        # Look-alikes are beside the attacks, never of the same token: then neither would be the one or the other.
        benign = Ground(self.population, self.behaviour, "look-alikes")
        benign.taken = hostile.taken
        benign.numbers_after(hostile)
        skews = lookalikes.plant(benign)
        self.population.fill_up()
        # With chances of their own: what is done with tokens does not depend on them.
        thieves = Ground(self.population, self.behaviour, "attacks on signing in")
        thieves.numbers_after(benign)
        others = Ground(self.population, self.behaviour, "look-alikes of signing in")
        signing_in.plant(thieves, others)
        self.attacks = [*hostile.labels, *thieves.labels]
        self.lookalikes = [*benign.labels, *others.labels]
        self.writers = Writers(size.seed, list(WRITERS), skews)

    @property
    def labels(self) -> list[Label]:
        return [*self.attacks, *self.lookalikes]

    def ledger(self) -> Iterator[Append]:
        """The ledger's events, in the order of their time."""
        return self.population.ledger()

    def hours(self) -> Iterator[tuple[int, list[Entry], list[Refusal]]]:
        """Every hour with its uses and refused requests, each with the number of its label, in no order."""
        size, behaviour = self.size, self.behaviour
        for machine in behaviour.machines:
            machine.begin()
        hours = range(size.start_us, size.end_us, HOUR)
        loads = [behaviour.load(us) for us in hours]
        wanted = list(itertools.accumulate(loads))
        made = 0
        for index, us in enumerate(hours):
            if (us - size.start_us) % DAY == 0:
                behaviour.day(us)
            left = int(size.uses * wanted[index] / wanted[-1]) - made
            entries, refusals = behaviour.hour(us, left)
            if us >= size.end_us - 2 * DAY:
                entries = _thinned(entries, left)
            if us + HOUR == size.end_us:
                entries = self._exactly(us, entries, size.uses - made)
            made += len(entries)
            yield us, entries, refusals
        assert made == size.uses, f"{made} uses: too few were asked for, or for so many attacks"

    def _exactly(self, us: int, entries: list[Entry], wanted: int) -> list[Entry]:
        """The last hour makes up for what was rounded before."""
        live = [
            machine
            for machine in self.behaviour.machines
            if (token := machine.chain.token_at(us)) is not None and token.outcome(us + HOUR) == "valid"
        ]
        assert live, "no service has a live token in the last hour: the population is too small"
        busiest = max(live, key=lambda machine: machine.load(us))
        while len(entries) < wanted:
            entries += busiest.hour(us, wanted - len(entries), self.behaviour.chance)
        return _thinned(entries, wanted)

    def blocks(self, progress: Callable[[int], None] | None = None) -> Iterator[UseBlock]:
        """The blocks, as the writers would have appended them. `progress` is told how many uses are written."""
        for us, entries, refusals in self.hours():
            yield from self.writers.hour(us, entries, refusals)
            if progress is not None and (us + HOUR - self.size.start_us) % DAY == 0:
                progress(self.writers.uses)
        yield from self.writers.rest(self.size.end_us + MINUTE)
        for label in self.labels:
            label.uses = self.writers.by_label[label.number]
            label.refused = self.writers.refused_by_label[label.number]


def _thinned(entries: list[Entry], wanted: int) -> list[Entry]:
    """Without some of what is ordinary, if there are too many: attacks of the last days were larger than was due."""
    surplus = max(0, len(entries) - wanted)
    ordinary = [entry for entry in entries if not entry[2]]
    return [entry for entry in entries if entry[2]] + ordinary[surplus:]


def midnight(now: datetime | None = None) -> datetime:
    """The last one, UTC."""
    return (now or datetime.now(UTC)).replace(hour=0, minute=0, second=0, microsecond=0)


def options(parser: argparse.ArgumentParser) -> None:
    """The options that say how much is simulated."""
    parser.add_argument("--days", type=int, default=30)
    parser.add_argument("--clients", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--uses", type=int, default=50_000_000)
    parser.add_argument("--attacks", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=101, help="1 to 9 are for tuning, with the preset of that name")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="reported")


def size_of(arguments: argparse.Namespace, until: datetime | None = None) -> Size:
    """The size that the options ask for; the history ends at the last midnight."""
    return Size(
        seed=arguments.seed,
        start=(until or midnight()) - timedelta(days=arguments.days),
        days=arguments.days,
        clients=arguments.clients,
        tokens=arguments.tokens,
        uses=arguments.uses,
        attacks_per_rule=arguments.attacks,
        preset=PRESETS[arguments.preset],
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.traffic", description=__doc__.partition("\n")[0])
    options(parser)
    parser.add_argument("--labels", action="store_true", help="print every label as a line of JSON")
    arguments = parser.parse_args()
    began = time.perf_counter()
    traffic = Traffic(size_of(arguments))
    planned = time.perf_counter()
    size = sum(len(codec.encode_block(block)) for block in traffic.blocks(_show))
    ended = time.perf_counter()
    sys.stderr.write("\n")
    if arguments.labels:
        for label in traffic.labels:
            fields = {name: getattr(label, name) for name in ("kind", "rule", "uses", "refused", "about")}
            print(json.dumps(fields))
        return
    made = traffic.writers
    print(
        f"{len(traffic.population.tokens):,} tokens and {traffic.population.events:,} events, {planned - began:.1f} s"
    )
    print(f"{made.uses:,} uses in {made.blocks:,} blocks, {size / made.uses:.0f} bytes a use, {ended - planned:.1f} s")
    print(f"{made.refused_requests:,} refused requests in {made.refused_rows:,} counts")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024} MiB at the most")
    for kind, count in Counter(label.rule or label.kind for label in traffic.labels).items():
        uses = sum(label.uses + label.refused for label in traffic.labels if kind == (label.rule or label.kind))
        print(f"{count:5} {kind}: {uses:,}")


def _show(uses: int) -> None:
    sys.stderr.write(f"\r{uses:>13,} uses")
    sys.stderr.flush()


if __name__ == "__main__":
    main()
