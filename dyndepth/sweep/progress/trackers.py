"""Experiment trackers that users already have, through ``accelerate.tracking``: one step a cell.

What a step holds: ``index`` (the cell's place in the sweep), ``method`` (its short name, for those
trackers that take a text; mlflow has it as the parameter ``method/STEP``), ``target_speedup``,
``seed``, ``seconds``, ``failed`` (0 or 1), the achieved ``block_speedup`` and ``total_speedup``
(FLOPs), the wall speedups with their intervals, and every score as ``task/metric``. The settings
are the run's configuration. At the end leaderboard.csv is logged as a table or attached as a file
where accelerate has a way to: wandb and clearml, mlflow.

A tracker keeps its own settings: WANDB_PROJECT, MLFLOW_TRACKING_URI and the like are in force.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dyndepth.cells.cell import Cell, identity_columns
from dyndepth.cells.identity import flat
from dyndepth.common.errors import UserError
from dyndepth.common.spec import nearest
from dyndepth.sweep.progress.interface import Job, Listener
from dyndepth.sweep.settings import Settings

PROJECT = "dyndepth"
"""The project that runs are filed under where the user's environment names none."""

PROJECT_VARIABLES = {"wandb": "WANDB_PROJECT", "comet_ml": "COMET_PROJECT_NAME"}
"""Environment variables that a name given in code would override."""

RUN_NAMES = {"mlflow": "run_name", "trackio": "name", "wandb": "name"}
"""Parameters by which a tracker that files runs under a project is told the run's name."""

NUMBERS_ONLY = frozenset({"aim", "clearml", "mlflow", "swanlab"})
"""Trackers that refuse or complain about a text among the values of a step."""

PARAMETERS_ANY_TIME = frozenset({"mlflow"})
"""Those among them whose configuration may grow while a run goes on, and takes texts."""


def check(names: Iterable[str]) -> tuple[str, ...]:
    """``names``, each once, if each is a tracker that accelerate knows and whose package is there.

    Raises:
        UserError: one is unknown, or its package is not installed.
    """
    found = tuple(dict.fromkeys(names))
    if not found:
        return ()
    # It brings torch.
    from accelerate import tracking
    from accelerate.utils import LoggerType

    known = sorted(tracking.LOGGER_TYPE_TO_CLASS)
    installed = {str(name) for name in tracking.get_available_trackers()}
    for name in found:
        if name not in known:
            raise UserError(
                f"--trackers names {name!r}, which is none; {nearest(name, known)}"
                f"trackers are {', '.join(known)}"
            )
        # What another package registered with accelerate is there.
        if name in LoggerType.list() and name not in installed:
            package = name.replace("_", "-")
            raise UserError(
                f"--trackers {name} needs a package that is not installed: pip install {package}"
            )
    return found


class Trackers(Listener):
    """Logs a sweep to the trackers ``names``, which ``check`` has let pass.

    One that needs a folder gets ``trackers/<time of the start>`` in the sweep's output path. One
    that fails after the start is left out from there on, at the cost of one call of ``warn`` with a
    sentence: no sweep fails because of it.
    """

    def __init__(self, names: Iterable[str], warn: Callable[[str], None]) -> None:
        self.names, self.warn = tuple(names), warn
        self.steps = 0
        self._open: dict[str, Any] = {}

    def start(self, total: int, settings: Settings) -> None:
        """Open a run in every tracker.

        Raises:
            UserError: a tracker cannot be opened (no login, no server, no folder).
        """
        for name in self.names:
            try:
                with _state():
                    self._open[name] = _opened(name, settings)
                    self._open[name].store_init_configuration(_configuration(settings))
            except Exception as fault:  # noqa: BLE001 - each tracker has errors of its own
                self.close({})
                raise UserError(
                    f"--trackers {name} cannot be started, mend it or leave it out: "
                    f"{_in_one_line(fault)}"
                ) from fault

    def kept(self, job: Job, cell: Cell) -> None:
        """Nothing: it was a step of the run that computed it."""

    def began(self, job: Job) -> None:
        """Nothing: there is no number yet."""

    def scored(self, job: Job, cell: Cell, seconds: float) -> None:
        """Nothing: its step holds its times, too."""

    def ended(self, job: Job, cell: Cell, seconds: float) -> None:
        # Cells end in any order where several run at once, and steps must rise.
        self.steps += 1
        values = _values(job, cell, seconds)
        numbers = {key: value for key, value in values.items() if not isinstance(value, str)}

        def log(name: str, tracker: Any) -> None:
            if name in PARAMETERS_ANY_TIME:
                tracker.store_init_configuration({f"method/{self.steps}": values["method"]})
            tracker.log(numbers if name in NUMBERS_ONLY else values, step=self.steps)

        self._each(log)

    def note(self, text: str, level: str = "info") -> None:
        """Nothing: trackers hold numbers."""

    def close(self, summary: dict[str, Any]) -> None:
        path = Path(summary.get("leaderboard") or "")
        if path.is_file():
            self._each(lambda name, tracker: self._attach(tracker, path))
        self._each(lambda name, tracker: tracker.finish())
        self._open.clear()

    def _attach(self, tracker: Any, path: Path) -> None:
        if hasattr(tracker, "log_table"):
            import pandas

            from dyndepth.results.fields import unquoted

            frame = pandas.read_csv(path).map(lambda x: unquoted(x) if isinstance(x, str) else x)
            tracker.log_table("leaderboard", dataframe=frame, step=self.steps)
        elif hasattr(tracker, "log_artifact"):
            tracker.log_artifact(str(path))

    def _each(self, do: Callable[[str, Any], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                with _state():
                    do(name, tracker)
            except Exception as fault:  # noqa: BLE001 - each tracker has errors of its own
                del self._open[name]
                self.warn(f"the tracker {name} failed and is left out: {_in_one_line(fault)}")


@contextmanager
def _state() -> Iterator[None]:
    """What accelerate's trackers need to exist while they are called.

    It is taken away again where it was not there before: made here, it would bring up a GPU in a
    process that only hands out cells, or decide the device on which a cell trains later on.
    """
    from accelerate import PartialState

    ours = PartialState._shared_state == {}
    if ours:
        PartialState(cpu=True)
    try:
        yield
    finally:
        if ours:
            PartialState._reset_state()


def _opened(name: str, settings: Settings) -> Any:
    """A started tracker."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    cls: Any = LOGGER_TYPE_TO_CLASS[name]
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H-%M-%S")
    if cls.requires_logging_directory:
        tracker = cls(now, str(settings.output_path / "trackers"))
    else:
        project = os.environ.get(PROJECT_VARIABLES.get(name, ""), "") or PROJECT
        run = f"{settings.output_path.name} {now}"
        tracker = cls(project, **({RUN_NAMES[name]: run} if name in RUN_NAMES else {}))
    # Older releases of accelerate start a tracker when they make it.
    if hasattr(tracker, "start"):
        tracker.start()
    return tracker


def _configuration(settings: Settings) -> dict[str, Any]:
    """The settings as texts and numbers; those that are not set are left out."""
    values = {field.name: flat(getattr(settings, field.name)) for field in fields(settings)}
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in values.items()
        if value is not None
    }


def _values(job: Job, cell: Cell, seconds: float) -> dict[str, Any]:
    """The values of one step, by name; without those that are unknown or not finite."""
    from dyndepth.cells.naming import label
    from dyndepth.results.leaderboard import speedups, wall_speedups

    row = identity_columns(cell)
    found: dict[str, Any] = {
        "index": job.index,
        "method": label(row),
        "target_speedup": row["target_speedup"],
        "seed": row["seed"],
        "seconds": seconds,
        "failed": int(cell.status == "error"),
        **speedups(cell),
        **wall_speedups(cell),
    }
    for score in cell.accuracy:
        name = f"{score['task']}/{score['metric']}"
        # The first filter stands for the task, as it does in its own results.
        found.setdefault(name, score["value"])
    return {
        # Some trackers refuse other characters.
        re.sub(r"[^\w./ -]", "_", name): value
        for name, value in found.items()
        if isinstance(value, str) or (value is not None and math.isfinite(value))
    }


def _in_one_line(fault: Exception) -> str:
    return f"{type(fault).__name__}: {' '.join(str(fault).split())}"
