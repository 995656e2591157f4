"""Who is told of a sweep's progress: chosen from its settings.

``people`` has lines and a live view, ``json_log`` is for programs, ``trackers`` for experiment
trackers.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

from dyndepth.cells.cell import Cell
from dyndepth.sweep.progress.interface import STDERR, Job, Listener
from dyndepth.sweep.progress.people import Lines, Live
from dyndepth.sweep.settings import Settings


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
        from dyndepth.sweep.progress.json_log import JsonLog

        everyone.listeners.append(JsonLog(settings.log_json, warn))
    if settings.trackers:
        from dyndepth.sweep.progress.trackers import Trackers, check

        everyone.listeners.append(Trackers(check(settings.trackers), warn))
    if settings.log_json != STDERR:
        # Last, so that its view opens after and closes before what trackers print themselves.
        everyone.listeners.append(_for_people(several))
    return everyone


def _for_people(several: bool) -> Listener:
    from rich.console import Console

    console = Console(stderr=True)
    return Live(console) if several and console.is_interactive else Lines()
