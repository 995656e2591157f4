"""How a wall speedup is told: never without its noise.

``told`` is the one place that writes such a number for people; what prints one calls it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dyndepth.common.modes import EAGER, GRAPHS

WIDE = 0.10
"""An interval that is wider than this fraction of its median is noisy."""

WORDS = {
    "suspect": "faster than the FLOPs allow",
    "no interval": "of fewer than six pairs",
    "noisy": "the interval is wider than 10 % of the number",
    "undecided": "the interval holds 1, neither faster nor slower is shown",
    "loaded": "other work wanted more processors than the timing left free",
}
"""Every word that stands beside a wall speedup, and what it means."""


def legend(texts: Iterable[str] | None = None) -> str:
    """What the words mean that stand in ``texts`` (default: all of them); empty if none does."""
    told = None if texts is None else list(texts)
    return "; ".join(
        f"{word}: {meaning}"
        for word, meaning in WORDS.items()
        if told is None or any(word in text for text in told)
    )


def noise(median: float, low: Any, high: Any, suspect: Any = False, loaded: Any = False) -> str:
    """What is to be said of a wall speedup and its 95% interval, in ``WORDS``; empty if nothing is
    in doubt. An end that is missing or no number is no end; ``suspect`` and ``loaded`` may be a CSV
    file's."""
    found = ["suspect"] if _true(suspect) else []
    least, most = _number(low), _number(high)
    if least is None or most is None:
        found.append("no interval")
    else:
        found += ["noisy"] if (most - least) / median > WIDE else []
        found += ["undecided"] if least <= 1 <= most else []
    found += ["loaded"] if _true(loaded) else []
    return ", ".join(found)


def told(
    median: Any,
    low: Any,
    high: Any,
    suspect: Any = False,
    loaded: Any = False,
    *,
    form: str = "{:.2f}x",
    mark: str = " {}",
) -> str:
    """A wall speedup as ``1.44x [0.89, 1.99] noisy, undecided``; empty if there is none.

    All of them may be texts, as a CSV file has them. ``form`` is that of the median (its ends have
    no unit), ``mark`` that of what ``noise`` says.
    """
    value, least, most = map(_number, (median, low, high))
    if value is None:
        return ""
    text, plain = form.format(value), form.rstrip("x")
    if least is not None and most is not None:
        text += f" [{plain.format(least)}, {plain.format(most)}]"
    word = noise(value, least, most, suspect, loaded)
    return text + (mark.format(word) if word else "")


LEAST_LOAD = 0.5
"""Processors' worth of other work that no machine is idle with."""


def loaded(row: Mapping[str, Any]) -> bool:
    """Whether a row of timing.csv was timed while other work wanted more processors than the
    timing's own threads left free; False where it does not tell. What a machine does by itself, up
    to ``LEAST_LOAD``, is no load: with a thread a processor none is free, and the threads alone
    make a load of that many."""
    load, cores = _number(row.get("load_average")), _number(row.get("cores"))
    if load is None or cores is None:
        return False
    own = _number(row.get("threads")) or 0.0
    return load - own > max(cores - own, LEAST_LOAD)


def _number(value: Any) -> float | None:
    """None for what is missing, an empty text and what is no number."""
    if value is None or value == "":
        return None
    number = float(value)
    return None if math.isnan(number) else number


def _true(value: Any) -> bool:
    """Whether it is true, or a table's word for it."""
    return str(value).strip().lower() in ("true", "1", "1.0")


class Wall(NamedTuple):
    """A wall speedup of a leaderboard: one phase in one mode.

    ``key`` is in its columns' names: ``wall_<key>_speedup``, ``wall_<key>_low``, ``..._high``.
    """

    key: str
    phase: str
    mode: str

    @property
    def column(self) -> str:
        """The column of the speedup."""
        return f"wall_{self.key}_speedup"


WALLS = (
    Wall("prefill", "prefill", EAGER),
    Wall("decode", "decode", EAGER),
    Wall("decode_graphs", "decode", GRAPHS),
)
"""Those that there are: prompts are no part of what graphs repeat."""


def headed(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The wall speedups to show of leaderboard rows, key -> heading: those of eager mode, and those
    of others that some row has; headings name the mode where there are several."""
    rows = list(rows)
    modes = {
        each.mode
        for each in WALLS
        if each.mode == EAGER or any(_number(row.get(each.column)) is not None for row in rows)
    }
    return {
        each.key: f"{each.phase} ({each.mode})" if len(modes) > 1 else each.phase
        for each in WALLS
        if each.mode in modes
    }


SUSPECT = "wall_suspect"
LOADED = "wall_loaded"
"""Columns of a leaderboard that name those of ``WALLS`` that are suspect, or were timed on a loaded
machine, by key."""


def named(row: Mapping[str, Any], column: str) -> set[str]:
    """Keys of a leaderboard row's wall speedups that ``SUSPECT`` or ``LOADED`` names."""
    found = row.get(column)
    return set(filter(None, found.split(", "))) if isinstance(found, str) else set()


def suspects(row: Mapping[str, Any]) -> set[str]:
    """Keys of a leaderboard row's wall speedups that are suspect."""
    return named(row, SUSPECT)


def told_of(row: Mapping[str, Any], key: str, *, form: str = "{:.2f}x", mark: str = " {}") -> str:
    """The wall speedup ``key`` of a leaderboard row; see ``told``."""
    low, high = row.get(f"wall_{key}_low"), row.get(f"wall_{key}_high")
    doubts = [key in named(row, column) for column in (SUSPECT, LOADED)]
    return told(row.get(f"wall_{key}_speedup"), low, high, *doubts, form=form, mark=mark)
