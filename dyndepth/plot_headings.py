"""What stands over a figure: the model, what is shown, the conditions, and how to read it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SIZE = 8
_LETTERS = 17
"""Letters of that size that an inch holds."""
SEVERAL = "with several seeds from the lowest to the highest end"


def head(figure: Figure, table: pd.DataFrame, title: str, *notes: str) -> None:
    """Write the model's name and ``title`` over ``figure``, and ``notes`` as sentences below."""
    width = int(figure.get_size_inches()[0] * _LETTERS)
    first = ": ".join(filter(None, (of_all(table, "model"), title)))
    second = " ".join(f"{note}." for note in notes if note)
    lines = [*textwrap.wrap(first, width), *textwrap.wrap(second, width)]
    if lines:
        figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=_SIZE)


def of_all(table: pd.DataFrame, column: str) -> str:
    """The value of a column, or its values; empty where the table has none."""
    values = table[column].dropna().unique() if column in table else ()
    return " and ".join(
        f"{value:g}" if isinstance(value, float) else str(value) for value in values
    )


def conditions(timed: pd.DataFrame, batch: str, length: str) -> str:
    """Under which conditions the rows of ``timed`` were measured, as far as they say."""
    threads = of_all(timed, "threads")
    found = [f"batch {batch}" if batch else "", f"{length} tokens" if length else ""]
    found += [of_all(timed, "device_name")]
    found += [f"{threads} thread{'s' * (threads != '1')}" if threads else ""]
    found += [of_all(timed, "dtype")]
    return ", ".join(filter(None, found))


def intervals(found: pd.DataFrame, shape: str, over: str = "documents") -> str:
    """What bands or bars (``shape``) of these points show; empty where they have none."""
    if not (found["low"] < found["high"]).any():
        return ""
    several = f"; {SEVERAL}" if (found["seeds"] > 1).any() else ""
    return f"{shape}: 95% intervals over {over}{several}"
