"""The interface through which a sweep tells how it goes on, and the libraries' bars hushed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

from dyndepth.cells.cell import Cell, readable_name
from dyndepth.sweep.settings import Settings

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


def failure(job: Job, total: int, cell: Cell, debug: bool) -> str:
    """The line that says why a cell failed, and below with ``debug`` its traceback, else where that
    is."""
    line = f"[{job.index}/{total}] {job.name}: failed: {cell.error}"
    if debug or not cell.traceback:
        return f"{line}\n{cell.traceback}" if debug else line
    file = f"cells/{readable_name(cell.identity)}-{cell.key}.json"
    return f"{line}\n  its traceback is in {file} of the output path; --debug prints it"


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
