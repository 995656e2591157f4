"""Progress for people: lines, or a live view, with the time that is left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dyndepth.cells.cell import Cell
from dyndepth.sweep.progress.interface import Job, Listener, failure
from dyndepth.sweep.settings import Settings

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live as Display


class Lines(Listener):
    """Plain lines, for pipes and files: progress to stdout, failures and warnings to stderr."""

    def start(self, total: int, settings: Settings) -> None:
        self.count, self.debug = _count(total, settings), settings.debug

    def kept(self, job: Job, cell: Cell) -> None:
        self.count.kept += 1
        print(f"{self._label(job)}: kept ({cell.status})", flush=True)

    def began(self, job: Job) -> None:
        self.count.begin(job)
        where = f", {job.worker}" if job.worker else ""
        print(f"{self._label(job)}: {job.what} ({self.count.elapsed:.0f} s{where})", flush=True)

    def scored(self, job: Job, cell: Cell, seconds: float) -> None:
        self.count.score(job)
        self._passed(job, "scored in", seconds)

    def ended(self, job: Job, cell: Cell, seconds: float) -> None:
        self.count.end(job, cell)
        if cell.status == "error":
            print(failure(job, self.count.total, cell, self.debug), file=sys.stderr, flush=True)
        self._passed(job, "failed after" if cell.status == "error" else "done in", seconds)

    def note(self, text: str, level: str = "info") -> None:
        warning = level == "warning"
        said = f"warning: {text}" if warning else text
        print(said, file=sys.stderr if warning else sys.stdout, flush=True)

    def close(self, summary: dict[str, Any]) -> None:
        """Nothing: the sweep itself prints its results."""

    def _passed(self, job: Job, how: str, seconds: float) -> None:
        left = self.count.left_in_words()
        rest = f"; {left}" if left else ""
        print(f"{self._label(job)}: {how} {in_words(seconds)}{rest}", flush=True)

    def _label(self, job: Job) -> str:
        return f"[{job.index}/{self.count.total}] {job.name}"


class Live(Listener):
    """One view on a terminal that is drawn again and again, on stderr: cells by outcome, the time
    left, and what runs, since when, on which worker. Failures and notes stay above it.

    It is for several workers. Where cells are computed in the sweep's own process, the bars of what
    is going on inside a cell (training, scoring, timing) are the live view, and two that draw on
    one terminal spoil each other: there ``Lines`` is the right one, and workers that share the
    terminal run inside ``no_bars``.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console

        self.console = Console(stderr=True) if console is None else console
        self._display: Display | None = None

    def start(self, total: int, settings: Settings) -> None:
        from rich.live import Live as Display

        self.count, self.debug = _count(total, settings), settings.debug
        self._display = Display(
            get_renderable=self.view,
            console=self.console,
            refresh_per_second=2,
            # What is printed goes above the view, unless it goes to a file anyway.
            redirect_stdout=sys.stdout.isatty(),
        )
        self._display.start(refresh=True)

    def kept(self, job: Job, cell: Cell) -> None:
        self.count.kept += 1
        self._refresh()

    def began(self, job: Job) -> None:
        self.count.begin(job)
        self._refresh()

    def scored(self, job: Job, cell: Cell, seconds: float) -> None:
        self.count.score(job)
        self._refresh()

    def ended(self, job: Job, cell: Cell, seconds: float) -> None:
        self.count.end(job, cell)
        if cell.status == "error":
            self._above(failure(job, self.count.total, cell, self.debug), "red")
        self._refresh()

    def note(self, text: str, level: str = "info") -> None:
        warning = level == "warning"
        self._above(f"warning: {text}" if warning else text, "yellow" if warning else "")

    def close(self, summary: dict[str, Any]) -> None:
        if self._display is not None:
            self._display.stop()

    def view(self) -> Group:
        """What the terminal shows at this moment."""
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        count = self.count
        outcomes = [f"{count.done} done", f"{count.failed} failed", f"{count.kept} kept"]
        if count.scored:
            outcomes.insert(0, f"{len(count.scored)} scored")
        left = count.left_in_words()
        head = Table.grid(padding=(0, 1))
        head.add_row(
            Text(f"{count.over} of {count.total} cells"),
            ProgressBar(total=1.0, completed=count.share, width=20),
            Text(", ".join([*outcomes, left] if left else outcomes)),
        )
        body = Table.grid(padding=(0, 2))
        for job, began in list(count.running.values()):
            body.add_row(
                Text(f"[{job.index}/{count.total}] {job.name}"),
                Text(job.what),
                Text(in_words(count.clock() - began), justify="right"),
                Text(job.worker),
            )
        # A terminal too low for all rows cuts them off at the bottom: the sums stand on top.
        return Group(head, body) if count.running else Group(head)

    def _above(self, text: str, style: str) -> None:
        from rich.text import Text

        self.console.print(Text(text, style=style), soft_wrap=True)

    def _refresh(self) -> None:
        if self._display is not None:
            self._display.refresh()


def _count(total: int, settings: Settings) -> Countdown:
    return Countdown(total, settings.timing != "off")


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
