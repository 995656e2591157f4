"""The loop over the cells of a sweep: what is missing is handed out, what comes back is kept.

Cells are scored by as many workers as the executor has slots. Times are taken with nothing else
under way: with one worker right after a cell was scored, with several at the end, one by one. Only
this process writes, each cell as soon as it is there; so whatever dies, no more than the cells in
progress are lost.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field
from itertools import count

from dyndepth.cells.cell import Cell, CellSpec, is_lossless
from dyndepth.cells.identity import Row
from dyndepth.cells.merging import check_rows
from dyndepth.cells.store import Store
from dyndepth.sweep.executors import Executor, WorkerDied
from dyndepth.sweep.grid import wanted
from dyndepth.sweep.progress.interface import Job, Listener
from dyndepth.sweep.settings import Settings
from dyndepth.sweep.worker import Work, failed, timeout_text

TRIES = 3
"""How often a cell is begun whose worker dies; then it counts as the culprit."""

SHARE = 0.05
"""The tables are written anew after a cell, unless that took more of the run than this."""

PATIENCE = 1.0
"""Seconds that the tables may take after Ctrl-C; else ``python -m dyndepth.tables`` writes them."""


@dataclass
class Tally:
    """What became of the cells of one sweep: their hashes, and counts by outcome."""

    keys: list[str] = field(default_factory=list)
    done: int = 0
    reused: int = 0
    failed: int = 0

    def count(self, cell: Cell, kept: bool = False) -> None:
        """Take a cell in that nothing more will be done to."""
        self.keys.append(cell.key)
        self.failed += cell.status == "error"
        if kept:
            self.reused += cell.status == "done"
        else:
            self.done += cell.status == "done"


@dataclass
class _Turn:
    """A cell on its way: its place in the sweep, and how often a worker died over it."""

    index: int
    plan: CellSpec
    identity: Row
    timing: bool = False
    deaths: int = 0
    seat: int = 0
    began: float = 0.0
    seconds: float = 0.0

    @property
    def job(self) -> Job:
        worker = f"worker {self.seat}" if self.seat else ""
        return Job(self.index, self.plan.describe(), "timing" if self.timing else "running", worker)


class Driver:
    """One sweep.

    ``identify`` gives a plan's full identity. After ``run`` returned or raised, ``tally`` says what
    was done.
    """

    def __init__(
        self,
        cells: Sequence[CellSpec],
        executor: Executor,
        store: Store,
        settings: Settings,
        listener: Listener,
        identify: Callable[[CellSpec], Row],
    ) -> None:
        self.cells, self.executor, self.store = cells, executor, store
        self.settings, self.listener, self.identify = settings, listener, identify
        self.tally = Tally()
        self._scoring: deque[_Turn] = deque()
        self._timing: deque[_Turn] = deque()
        self._flying: dict[Future[Cell], _Turn] = {}
        self._several = executor.slots > 1
        self._tables = _Tables(store)

    def run(self) -> Tally:
        """Compute what is missing of the cells; the tables hold what was done.

        Raises:
            KeyboardInterrupt: as it comes; then the tables are left behind if they are many.
            RunFailed: the disk takes no more.
        """
        try:
            self._look()
            while self._scoring or self._timing or self._flying:
                self._hand_out()
                done, _ = wait(self._flying, timeout=1.0, return_when=FIRST_COMPLETED)
                for future in done:
                    self._take(future, self._flying.pop(future))
        except KeyboardInterrupt:
            if self.tally.done + self.tally.failed and (self._tables.seconds or 0.0) < PATIENCE:
                self._tables.write()
            raise
        self._tables.write()
        return self.tally

    def _look(self) -> None:
        """Sort the cells by what remains to be done."""
        for index, plan in enumerate(self.cells, start=1):
            turn = _Turn(index, plan, self.identify(plan))
            recorded = None
            if self.settings.resume != "never":
                recorded = self.store.read(turn.identity)
            todo = needed(recorded, self.settings)
            if recorded is not None and todo == "nothing":
                self.listener.kept(turn.job, recorded)
                self.tally.count(recorded, kept=True)
            elif todo == "timing":
                turn.timing = True
                self._timing.append(turn)
            else:
                self._scoring.append(turn)

    def _hand_out(self) -> None:
        """Begin what may run now: as many cells to score as there are slots, or one to time."""
        if any(turn.timing for turn in self._flying.values()):
            return
        slots = self.executor.slots
        if self._timing and not self._flying:
            # With one worker a cell is timed while what was scored is still at hand.
            first = slots == 1 and self._scoring and self._timing[0].index < self._scoring[0].index
            if first or not self._scoring:
                self._begin(self._timing.popleft())
                return
        while self._scoring and len(self._flying) < slots:
            self._begin(self._scoring.popleft())

    def _begin(self, turn: _Turn) -> None:
        if self._several:
            taken = {other.seat for other in self._flying.values()}
            turn.seat = next(seat for seat in count(1) if seat not in taken)
        self.listener.began(turn.job)
        turn.began = time.monotonic()
        scored = self.store.read(turn.identity) if turn.timing else None
        future = self.executor.submit(Work(turn.plan, turn.identity, scored))
        self._flying[future] = turn

    def _take(self, future: Future[Cell], turn: _Turn) -> None:
        """Keep what came of a turn, or have it done again if its worker died."""
        try:
            cell = future.result()
        except WorkerDied as fault:
            turn.deaths += 1
            if turn.deaths < TRIES:
                self.listener.note(f"{turn.plan.describe()}: {fault}; trying again", "warning")
                (self._timing if turn.timing else self._scoring).appendleft(turn)
                return
            cell = failed(self._blank(turn), f"{fault}, {TRIES} times")
        except TimeoutError:
            cell = failed(self._blank(turn), timeout_text(self.settings.cell_timeout))
        cell = self.store.write(cell)
        if not turn.timing and (idle := skipped_nothing(cell)):
            self.listener.note(f"{turn.plan.describe()} skipped nothing: {idle}", "warning")
        turn.seconds += time.monotonic() - turn.began
        if cell.status == "done" and not turn.timing and needed(cell, self.settings) == "timing":
            self.listener.scored(turn.job, cell, turn.seconds)
            turn.timing, turn.deaths = True, 0
            self._timing.insert(0 if self.executor.slots == 1 else len(self._timing), turn)
        else:
            self.listener.ended(turn.job, cell, turn.seconds)
            self.tally.count(cell)
        self._tables.changed()

    def _blank(self, turn: _Turn) -> Cell:
        recorded = self.store.read(turn.identity) if turn.timing else None
        return recorded or Cell(turn.identity)


class _Tables:
    """Writes the tables anew when cells changed, but not all the time."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._stale, self._next = True, 0.0
        self.seconds: float | None = None

    def changed(self) -> None:
        """A cell was written."""
        self._stale = True
        if time.monotonic() >= self._next:
            self.write()

    def write(self) -> None:
        """Write them if cells changed since."""
        if not self._stale:
            return
        from dyndepth.results.tables import write_tables

        started = time.monotonic()
        with self.store.tables():
            cells = self.store.all()
            check_rows(cells)
            write_tables(cells, self.store.path)
        ended = time.monotonic()
        # The first time takes in what is loaded once.
        self.seconds = 0.0 if self.seconds is None else ended - started
        self._stale, self._next = False, ended + self.seconds / SHARE


def skipped_nothing(cell: Cell) -> str:
    """On which tasks a scored cell was meant to skip and executed all that dense executes, as a
    sentence; empty where there are none."""
    reached = {
        row["task"]: row.get("block_speedup") for row in cell.compute if row.get("phase") == "all"
    }
    whole = [task for task, speedup in reached.items() if speedup == 1.0]
    # Of drafts the target is theirs: outside of them every block is meant to run.
    if cell.identity["target_speedup"] <= 1.0 or not whole or is_lossless(cell):
        return ""
    if len(whole) == len(reached):
        return "every token of every task executed every block, so its scores and times are dense's"
    return (
        f"every token of {', '.join(whole)} executed every block, so its scores on "
        f"{'it' if len(whole) == 1 else 'them'} are dense's"
    )


def needed(recorded: Cell | None, settings: Settings) -> str:
    """What remains to be done of a cell: ``everything``, ``timing`` or ``nothing``."""
    if recorded is None:
        return "everything"
    if settings.resume == "always" and recorded.status == "error":
        return "nothing"
    lacking = recorded.lacks(settings.timing)
    named = settings.mode is not None or settings.timing_shapes or settings.compiled_dense
    if settings.timing == "off" or not named or not recorded.timing:
        return lacking
    if lacking == "everything" or recorded.status == "error":
        return lacking
    # Asked for by name: that others were timed at a lower level is no matter.
    return "timing" if recorded.untimed(wanted(settings, recorded)) else "nothing"
