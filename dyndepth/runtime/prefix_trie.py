"""Which streams each sublayer computes when many static plans run together: a trie, as a schedule.

Skipping a sublayer is the identity, so two plans have the same hidden states, and are one *stream*,
for as long as they executed the same sublayers. The streams form a trie of executed prefixes. It is
walked layer by layer: at each sublayer the plans of a stream that execute it go on in a computed
stream, the others keep the old one. Plain lists of numbers; ``many_plans`` runs them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from dyndepth.method import ATTENTION, MLP

Plan = list[list[bool]]
"""``[layers][2]``, True = execute."""


@dataclass
class Places:
    """Places of one store of streams; a place that is given up is taken again."""

    count: int = 0
    spare: list[int] = field(default_factory=list)

    def take(self) -> int:
        """A place that nobody holds."""
        if self.spare:
            return self.spare.pop()
        self.count += 1
        return self.count - 1


@dataclass
class Moves:
    """Streams that one operation reads at ``sources`` and puts at ``targets``."""

    sources: list[int] = field(default_factory=list)
    targets: list[int] = field(default_factory=list)

    def add(self, source: int, target: int) -> None:
        """One stream more."""
        self.sources.append(source)
        self.targets.append(target)


@dataclass
class Step:
    """What one sublayer does, in this order.

    Attributes:
        narrowed: wide streams that no longer need all positions: copied, not computed.
        last: wide streams for which it is the last attention; what it puts is narrow.
        wide, narrow: streams that it computes at all their positions.
    """

    narrowed: Moves = field(default_factory=Moves)
    last: Moves = field(default_factory=Moves)
    wide: Moves = field(default_factory=Moves)
    narrow: Moves = field(default_factory=Moves)


@dataclass(frozen=True)
class _Stream:
    plans: list[int]
    place: int
    narrow: bool


class Schedule:
    """Which streams each sublayer runs for, given the plans, and where they are kept.

    A stream is *wide*, all positions, until no plan in it has an attention to come, and from then
    on, if ``narrows``, *narrow*: only the positions that are read.

    Attributes:
        steps: one pair of steps a layer, attention and MLP.
        wide, narrow: places in the two stores.
        ends: place of each stream in the end, all narrow or all wide.
        which: stream that each plan ends in.
        count: number of streams in the end.
    """

    def __init__(self, plans: list[Plan], narrows: bool) -> None:
        self.plans = plans
        self.narrows = narrows
        self.wide, self.narrow = Places(), Places()
        self._last = [
            max((layer for layer, gates in enumerate(plan) if gates[ATTENTION]), default=-1)
            for plan in plans
        ]
        now = [_Stream(list(range(len(plans))), self.wide.take(), narrow=False)]
        self.steps: list[tuple[Step, Step]] = []
        for layer in range(len(plans[0])):
            now, attention = self._advance(layer, ATTENTION, now)
            now, mlp = self._advance(layer, MLP, now)
            self.steps.append((attention, mlp))
        self.ends = [stream.place for stream in now]
        self.count = len(now)
        owner = {plan: number for number, stream in enumerate(now) for plan in stream.plans}
        self.which = [owner[plan] for plan in range(len(plans))]

    def _advance(self, layer: int, sublayer: int, now: list[_Stream]) -> tuple[list[_Stream], Step]:
        """The streams after one sublayer, and what it does."""
        step, after, left = Step(), [], []
        for stream in now:
            free = True  # its place, for one of the two streams that it becomes
            for runs in (False, True):
                plans = [plan for plan in stream.plans if self.plans[plan][layer][sublayer] == runs]
                if not plans:
                    continue
                narrow = stream.narrow or self._narrows(plans, layer)
                if narrow and not stream.narrow:
                    place = self.narrow.take()
                    if runs and sublayer == ATTENTION:
                        step.last.add(stream.place, place)
                    else:
                        step.narrowed.add(stream.place, place)
                        if runs:
                            step.narrow.add(place, place)
                else:
                    places, moves = (self.narrow, step.narrow) if narrow else (self.wide, step.wide)
                    place = stream.place if free else places.take()
                    free = False
                    if runs:
                        moves.add(stream.place, place)
                after.append(_Stream(plans, place, narrow))
            if free:
                left.append(stream.place)
        self.wide.spare += left  # only now: the step may still read them
        return after, step

    def _narrows(self, plans: list[int], layer: int) -> bool:
        """Whether none of the plans has an attention after ``layer``."""
        return self.narrows and all(self._last[plan] <= layer for plan in plans)
