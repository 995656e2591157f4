"""What of a method is committed, in the first sentence of its card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.card_parameters import choices
from dyndepth.cells.identity import Row
from dyndepth.common.errors import UserError
from dyndepth.common.spec import parameters_of
from dyndepth.markdown import Record, joined, read

if TYPE_CHECKING:
    from dyndepth.method import DynamicDepthMethod


STUDIES = "[studies](../studies.md)"
"""Where a card's reader finds the studies."""


def study_rows(root: Path, results: Path) -> dict[str, list[Record]]:
    """Study -> rows of its leaderboard.csv, of the folders with claims beside the main run's
    (``results``, relative to ``root``)."""
    beside = (path.parent for path in sorted((root / results).parent.glob("*/claims.csv")))
    boards = {folder.name: folder / "leaderboard.csv" for folder in beside}
    main = (root / results).name
    return {name: read(path) for name, path in boards.items() if path.is_file() and name != main}


def status(
    cls: type[DynamicDepthMethod],
    measured: Sequence[Record],
    published: Sequence[Row],
    elsewhere: Mapping[str, Sequence[Record]],
) -> str:
    """What is committed, in the main run and ``elsewhere`` (study -> rows of the method), what
    failed, what of the method has no row, and whether any of it is of a model that was published
    of."""
    committed = [*measured, *(row for own in elsewhere.values() for row in own)]
    if not committed:
        return "Implemented and tested; no row of it is committed."
    done = sum(row["status"] == "done" for row in measured)
    models = joined(row["model"] for row in committed)
    text = "Implemented and tested; no row of it in the main run"
    if measured:
        text = f"Implemented and tested; {done} of {len(measured)} cells of the main run finished"
    if elsewhere:
        count = row_count(sum(map(len, elsewhere.values())))
        text += f", and {who_has(elsewhere).lower()} {count} of it ({STUDIES})"
    text += f"; measured on {models}."
    missing = unmeasured(cls, committed)
    if missing:
        text += f" No committed row has {'; '.join(missing)}."
    theirs = {row["model"] for row in published if row.get("model")}
    if theirs and not theirs & {row["model"] for row in committed}:
        text += (
            f" The published values are of {joined(sorted(theirs))}: they stand beside ours and do "
            "not compare with them row by row."
        )
    return text + (" A bound, not a competitor." if cls.uses_labels else "")


def row_count(count: int) -> str:
    """``1 row``, ``2 rows``."""
    return f"{count} row{'' if count == 1 else 's'}"


def who_has(names: Mapping[str, Any]) -> str:
    """``The study `a` has``, ``The studies `a` and `b` have``."""
    several = len(names) > 1
    found = joined(f"`{name}`" for name in names)
    return f"The {'studies' if several else 'study'} {found} {'have' if several else 'has'}"


def unmeasured(cls: type[DynamicDepthMethod], committed: Sequence[Record]) -> list[str]:
    """``parameter=choice or choice`` for what no row of ``committed`` has, of the parameters that
    are a choice among names."""
    missing = []
    for name, known in choices(cls).items():
        default = next(field.default for field in fields(cls) if field.name == name)
        found = set()
        for row in committed:
            try:
                given = parameters_of(f"{cls.name}({row['parameters']})", "method")
            except UserError:
                continue
            found.add(row["phases"] if name == "phases" else given.get(name, default))
        left = [f"`{name}={choice}`" for choice in known if choice not in found]
        if left:
            missing.append(" or ".join([", ".join(left[:-1]), left[-1]] if left[1:] else left))
    return missing
