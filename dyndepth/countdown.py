"""What became of a sweep's cells so far, and how long the others will take."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from dyndepth.cells.cell import Cell

if TYPE_CHECKING:
    from dyndepth.progress import Job


class Countdown:
    """The cells of a sweep by outcome, and the time that is left.

    A cell that is to be timed (``timed``) has two turns, scoring and timing; else it has one.

    Attributes:
        total, kept, done, failed: cells.
        scored: indices of the cells that wait for being timed, or are being timed.
        running: by index, the job and when it began, on ``clock`` in seconds.
    """

    def __init__(
        self, total: int, timed: bool = False, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total, self.timed, self.clock = total, timed, clock
        self.kept = self.done = self.failed = 0
        self.scored: set[int] = set()
        self.running: dict[int, tuple[Job, float]] = {}
        self.started = clock()
        self._turns: dict[str, list[float]] = {"running": [], "timing": []}
        self._at_once = 1

    @property
    def elapsed(self) -> float:
        """Seconds since the start."""
        return self.clock() - self.started

    @property
    def over(self) -> int:
        """Cells that nothing remains to be done of."""
        return self.kept + self.done + self.failed

    @property
    def share(self) -> float:
        """Turns that are over, as a share of all, from 0 to 1."""
        turns = 2 if self.timed else 1
        return (turns * self.over + len(self.scored)) / max(1, turns * self.total)

    def begin(self, job: Job) -> None:
        """Count a job as running."""
        self.running[job.index] = (job, self.clock())
        self._at_once = max(self._at_once, len(self.running))
        if job.what == "timing":
            self.scored.add(job.index)

    def score(self, job: Job) -> None:
        """Count a job as waiting for being timed."""
        self._turned(job)
        self.scored.add(job.index)

    def end(self, job: Job, cell: Cell) -> None:
        """Count a job as done or failed."""
        if cell.status == "error":
            # It stopped early: how long it took says nothing about the others.
            self.running.pop(job.index, None)
            self.failed += 1
        else:
            self._turned(job)
            self.done += 1
        self.scored.discard(job.index)

    def left(self) -> float | None:
        """Estimated seconds until the last turn ends; None as long as it cannot be told.

        Each turn is taken to last as long as those of its kind that this run finished on average;
        kept cells took it no time. As many cells are scored side by side as were so far, or as
        there are left; they are timed one by one. Cells that will turn out to be kept are counted
        as work. Where several are scored at once, timing comes last: as long as ``unknown`` says
        that none was timed yet, it is left out.
        """
        unfinished = self.total - self.over
        scoring = self._rest("running", unfinished - len(self.scored), self._at_once)
        timing = self._rest("timing", unfinished if self.timed else len(self.scored), 1)
        if scoring is None or (timing is None and (self._at_once == 1 or not scoring)):
            return None
        return scoring + (timing or 0.0)

    @property
    def unknown(self) -> bool:
        """Whether cells remain to be timed, and none was yet."""
        return self.timed and self.over < self.total and not self._turns["timing"]

    def left_in_words(self) -> str:
        """``about 2 min left``; empty where it is unknown or nothing is left."""
        left = self.left()
        if left is None or self.over >= self.total:
            return ""
        return f"about {in_words(left)} left{', then timing' if self.unknown else ''}"

    def _turned(self, job: Job) -> None:
        """A turn came to its end."""
        job, began = self.running.pop(job.index)
        self._turns[job.what].append(self.clock() - began)

    def _rest(self, what: str, cells: int, at_once: int) -> float | None:
        """Seconds that a turn of this kind for each of ``cells`` will take, the running ones
        included."""
        turns = self._turns[what]
        if cells <= 0:
            return 0.0
        if not turns:
            return None
        mean, now = sum(turns) / len(turns), self.clock()
        # The live view asks from a thread of its own.
        running = [began for job, began in list(self.running.values()) if job.what == what]
        rests = [max(0.0, mean - (now - began)) for began in running]
        waiting = max(0, cells - len(rests))
        longest = max([*rests, mean if waiting else 0.0])
        # The longest one bounds it where there are fewer left than run at once.
        return max(longest, (waiting * mean + sum(rests)) / at_once)


def in_words(seconds: float) -> str:
    """A duration for people: ``34 s``, ``12 min``, ``2 h 5 min``."""
    if round(seconds) < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 100:
        return f"{minutes} min"
    return f"{minutes // 60} h {minutes % 60} min"
