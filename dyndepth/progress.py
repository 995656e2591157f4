"""What a sweep tells people while it runs, and the interface through which it tells anybody.

The sweep calls a ``Listener``; ``listener_for`` picks one from the settings. ``Lines`` and
``Live`` are for people, ``dyndepth.json_log`` is for programs, ``dyndepth.trackers`` for
experiment trackers.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from dyndepth.cells.cell import Cell
from dyndepth.countdown import Countdown, in_words
from dyndepth.options import Settings

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live as Display


STDERR = "-"
"""Value of --log_json for standard error."""


@dataclass(frozen=True)
class Job:
    """What is being done to one cell.

    Attributes:
        index: the cell's place in the sweep, from 1.
        name: the cell in a few words, as ``grid.Plan.describe`` has it.
        what: ``running`` (it is being scored) or ``timing`` (it was scored before).
        worker: which worker has it; empty where cells are computed in the sweep's own process.
    """

    index: int
    name: str
    what: str = "running"
    worker: str = ""


class Listener(Protocol):
    """Who is told about a sweep. All calls come from one thread of the sweep's own process.

    A cell is either kept, or began and then ended. One whose worker died begins again, with the
    same index; an interrupted one never ends. Only ``start`` may raise UserError: nothing was
    computed by then.
    """

    def start(self, total: int, settings: Settings) -> None:
        """The sweep has ``total`` cells, the kept ones included. Comes first, once.

        Raises:
            UserError: this listener cannot do what the settings ask of it.
        """

    def kept(self, job: Job, cell: Cell) -> None:
        """``cell`` was recorded before, done or failed; nothing is done to it."""

    def began(self, job: Job) -> None:
        """A cell is being computed from now on."""

    def scored(self, job: Job, cell: Cell, seconds: float) -> None:
        """``cell`` took ``seconds`` so far: its scores are recorded, and it begins again to be
        timed, at once or when all others are scored."""

    def ended(self, job: Job, cell: Cell, seconds: float) -> None:
        """``cell`` took ``seconds`` in all, and is recorded as ``done`` or ``error``."""

    def note(self, text: str, level: str = "info") -> None:
        """Something that is worth a sentence; ``level`` is ``info`` or ``warning``."""

    def close(self, summary: dict[str, Any]) -> None:
        """The sweep is over. Comes last, after an interruption or an error too.

        ``summary`` is what the sweep's last line of output holds: counts by outcome, paths; less
        of it where the sweep did not come to its end.
        """


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


class Several(Listener):
    """Tells each of ``listeners``, in order; closes them in the opposite order, each of them."""

    def __init__(self, listeners: Sequence[Listener]) -> None:
        self.listeners = list(listeners)

    def start(self, total: int, settings: Settings) -> None:
        """As ``Listener.start``; where one refuses, those before it are closed again."""
        with ExitStack() as started:
            for listener in self.listeners:
                listener.start(total, settings)
                started.callback(listener.close, {})
            started.pop_all()

    def kept(self, job: Job, cell: Cell) -> None:
        for listener in self.listeners:
            listener.kept(job, cell)

    def began(self, job: Job) -> None:
        for listener in self.listeners:
            listener.began(job)

    def scored(self, job: Job, cell: Cell, seconds: float) -> None:
        for listener in self.listeners:
            listener.scored(job, cell, seconds)

    def ended(self, job: Job, cell: Cell, seconds: float) -> None:
        for listener in self.listeners:
            listener.ended(job, cell, seconds)

    def note(self, text: str, level: str = "info") -> None:
        for listener in self.listeners:
            listener.note(text, level)

    def close(self, summary: dict[str, Any]) -> None:
        with ExitStack() as last_first:
            for listener in self.listeners:
                last_first.callback(listener.close, summary)


def listener_for(settings: Settings, several: bool) -> Several:
    """Who is told about a sweep, whose cells ``several`` workers compute or its own process.

    For people ``Live`` if stderr is a terminal and there are several workers, else ``Lines``; in
    place of both, JSON on stderr with --log_json -. With --log_json FILE the file is written
    beside. --trackers add theirs.

    Raises:
        UserError: the file of --log_json cannot be written, or a tracker is unknown or missing.
    """
    everyone = Several([])

    def warn(text: str) -> None:
        everyone.note(text, "warning")

    if settings.log_json is not None:
        from dyndepth.json_log import JsonLog

        everyone.listeners.append(JsonLog(settings.log_json, warn))
    if settings.trackers:
        from dyndepth.trackers import Trackers, check

        everyone.listeners.append(Trackers(check(settings.trackers), warn))
    if settings.log_json != STDERR:
        # Last, so that its view opens after and closes before what trackers print themselves.
        everyone.listeners.append(_for_people(several))
    return everyone


def _for_people(several: bool) -> Listener:
    from rich.console import Console

    console = Console(stderr=True)
    return Live(console) if several and console.is_interactive else Lines()


def _count(total: int, settings: Settings) -> Countdown:
    return Countdown(total, settings.timing != "off")


def failure(job: Job, total: int, cell: Cell, debug: bool) -> str:
    """The line that says why a cell failed; with ``debug`` its traceback below."""
    line = f"[{job.index}/{total}] {job.name}: failed: {cell.error}"
    return f"{line}\n{cell.traceback}" if debug else line


@contextmanager
def no_bars() -> Iterator[None]:
    """Inside, tqdm draws no bars in this process, whatever the callers of tqdm ask for."""
    from tqdm.std import tqdm

    # The environment's TQDM_DISABLE gives way to a ``disable`` that a caller passes.
    original = tqdm.__init__

    def disabled(self: Any, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options | {"disable": True})

    tqdm.__init__ = disabled  # type: ignore[method-assign]
    try:
        yield
    finally:
        tqdm.__init__ = original  # type: ignore[method-assign]
