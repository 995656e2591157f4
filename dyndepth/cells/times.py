"""Which times a cell has, what is missing of those that are wanted, and what new ones replace.

A row of timing.csv says at what ``level`` it was taken, in which ``mode``, and whether the level
chose its shape or somebody ``asked`` for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from dyndepth.cells.identity import Row
from dyndepth.common.modes import EAGER, GRAPHS, MODES

TIMING_LEVELS = ("off", "quick", "full")

ASKED = "asked"
"""What stands in ``shapes`` of a row whose batch and length somebody asked for."""


class Shape(NamedTuple):
    """A batch of prompts of ``length`` tokens, each continued by ``new_tokens`` steps; without any
    the prefill alone is timed."""

    batch: int
    length: int
    new_tokens: int

    def __str__(self) -> str:
        more = f" + {self.new_tokens}" if self.new_tokens else ""
        return f"{self.batch} x {self.length}{more}"


class Wanted(NamedTuple):
    """Times that a cell is to have: at that level or a higher one, in each of the modes.

    ``shapes``: those that were asked for; none: the level's own. ``compiled``: compiled dense
    beside them, or why there is none.
    """

    level: str
    modes: Sequence[str]
    shapes: Sequence[Shape] = ()
    compiled: bool = False


def missing(rows: Sequence[Row], level: str, wanted: Wanted) -> dict[str, tuple[Shape, ...]]:
    """By mode the shapes that are to be timed in it; an entry without any: all of the level's own.

    ``rows`` are a cell's times; those that do not say theirs are of ``level``.
    """
    found: dict[str, tuple[Shape, ...]] = {}
    for mode in wanted.modes:
        own = [row for row in rows if mode_of(row) == mode]
        stand = [row for row in own if _stands(row, level, wanted)]
        if wanted.shapes:
            # Graphs hold decode steps alone.
            possible = [shape for shape in wanted.shapes if shape.new_tokens or mode != GRAPHS]
            lacking = tuple(shape for shape in possible if not _has(stand, shape, mode))
            found |= {mode: lacking} if lacking else {}
        else:
            # A level's times are taken together, and those of one level stand for it.
            places = {_place(row, level) for row in own if not _asked(row)}
            whole = (
                all(row in stand for row in own if not _asked(row) and _place(row, level) == place)
                for place in places
            )
            if not any(whole):
                found[mode] = ()
    return found


def renewed(rows: Sequence[Row], mode: str, new: Sequence[Row], level: str) -> list[Row]:
    """``rows`` with ``new`` ones of one mode, in the order of the modes. ``level`` is what rows are
    of that do not say so.

    A row takes the place of another of the same batch, length, phase and temperature, a level's of
    a level's, one that was asked for of one that was asked for, and only if it is as thorough, over
    as many steps, and has compiled dense if that has. So nobody's times are lost by what another
    asks for; ``one_each`` chooses among those of one shape.
    """
    named = [{**row, "level": row.get("level") or level} for row in rows]
    own = [row for row in named if mode_of(row) == mode]
    kept = [row for row in named if mode_of(row) != mode]
    kept += [row for row in own if not any(_covers(other, row, level) for other in new)]
    # Prompts are timed again with more steps, and may have been timed better before.
    more = [row for row in new if not any(_covers(other, row, level) for other in kept)]
    return sorted([*kept, *more], key=lambda row: MODES.index(mode_of(row)))


def one_each(rows: Sequence[Row]) -> list[Row]:
    """Of a cell's times one a phase, batch, length and mode, in their order: one whose
    tokens are the likeliest before those that were drawn, then one that has a speedup over compiled
    dense before others, then the most thorough, then a level's before one that was asked for, then
    that of the most steps, then the last."""
    best: dict[tuple[Any, ...], tuple[tuple[Any, ...], Row]] = {}
    for place, row in enumerate(rows):
        key = row["phase"], int(row["batch"]), int(row["length"]), mode_of(row)
        named = row.get("level")
        rank = (
            -temperature_of(row),
            row.get("speedup_over_compiled") is not None,
            TIMING_LEVELS.index(named) if named in TIMING_LEVELS else -1,
            not _asked(row),
            row.get("new_tokens") or 0,
            place,
        )
        best[key] = max(best.get(key, (rank, row)), (rank, row), key=lambda each: each[0])
    return [row for _, row in sorted(best.values(), key=lambda each: each[0][-1])]


def reached(rows: Sequence[Row], level: str) -> str | None:
    """The level that every mode of ``rows`` has reached in which a level chose shapes; None if
    there is none."""
    found: dict[str, int] = {}
    for row in rows:
        if not _asked(row):
            found[mode_of(row)] = max(found.get(mode_of(row), 0), _place(row, level))
    return TIMING_LEVELS[min(found.values())] if found else None


def mode_of(row: Row) -> str:
    """The mode of a row; those of before there was a choice are eager."""
    return str(row.get("mode", EAGER))


def temperature_of(row: Row) -> float:
    """At which temperature a row's tokens were drawn, 0 for the likeliest, as those of before there
    was a choice are."""
    return float(row.get("temperature") or 0.0)


def _asked(row: Row) -> bool:
    return row.get("shapes") == ASKED


def _place(row: Row, level: str) -> int:
    return TIMING_LEVELS.index(row.get("level") or level)


def _compiled(row: Row) -> bool:
    """Whether compiled dense was timed, or it is known why not."""
    return row.get("speedup_over_compiled") is not None or bool(row.get("compiled_error"))


def _stands(row: Row, level: str, wanted: Wanted) -> bool:
    """Whether a row is as thorough as is wanted, and has compiled dense if that is."""
    enough = _place(row, level) >= TIMING_LEVELS.index(wanted.level)
    return enough and (_compiled(row) or not wanted.compiled)


def _covers(row: Row, other: Row, level: str) -> bool:
    """Whether ``row`` tells all that ``other`` does; see ``renewed``."""
    steps, others = (each.get("new_tokens") or 0 for each in (row, other))
    return (
        (mode_of(row), _asked(row)) == (mode_of(other), _asked(other))
        and all(row[key] == other[key] for key in ("batch", "length", "phase"))
        and _place(row, level) >= _place(other, level)
        and steps >= others
        and temperature_of(row) == temperature_of(other)
        and (_compiled(row) or not _compiled(other))
    )


def _has(rows: Sequence[Row], shape: Shape, mode: str) -> bool:
    """Whether ``rows`` of one mode hold every phase of that shape, over as many steps or more."""
    phases = [] if mode == GRAPHS else ["prefill"]
    phases += ["decode"] if shape.new_tokens else []
    own = [row for row in rows if (row["batch"], row["length"]) == shape[:2]]
    return all(
        any(
            row["phase"] == phase
            and (phase == "prefill" or (row.get("new_tokens") or 0) >= shape.new_tokens)
            for row in own
        )
        for phase in phases
    )
