"""Are a run's tables the function of its cells? They are made anew and compared byte by byte.

Those that every sweep writes must be there; those of ``dyndepth.compare`` (with its defaults)
and the pages of ``dyndepth.leaderboard`` are compared if they are. What they hold must be as
``dyndepth.results.schema`` has it.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dyndepth.cells.cell import Cell
from dyndepth.common.errors import UserError
from dyndepth.results.columns import SINCE
from dyndepth.results.leaderboard_pages import PAGES
from dyndepth.results.schema import COMPARED, TABLES
from dyndepth.results.tables import CHECKED, NAMES, entry, write_tables
from dyndepth.verify.findings import Finding

_UNFIT = (UserError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError)
"""What tampered rows make the tables' functions say."""


def tables(run: Path, cells: Sequence[Cell]) -> Iterator[Finding]:
    """Tables of the run that are missing, or that differ from those made of ``cells``."""
    from dyndepth.results import schema

    with TemporaryDirectory() as folder:
        try:
            write_tables(cells, Path(folder))
            for name in NAMES:
                if name not in CHECKED:  # the others were validated as they were written
                    schema.read(Path(folder) / name)
        except _UNFIT as fault:
            yield Finding("tables", "cannot be made of these cells", found=_told(fault))
            return
        made = {name: (Path(folder) / name).read_bytes() for name in NAMES}
    for name in NAMES:
        if not (run / name).is_file():
            yield Finding(name, "table is missing")
    present = [name for name in COMPARED if (run / name).is_file()]
    if present:
        from dyndepth.results.comparison import compared, texts

        try:
            found = texts(compared(cells))
            made |= {name: found[name].encode() for name in present}
        except _UNFIT as fault:
            yield Finding(", ".join(present), "cannot be made of these cells", found=_told(fault))
    pages = [name for name in PAGES if (run / name).is_file()]
    if pages:
        from dyndepth.results import leaderboard, leaderboard_pages

        try:
            shown = leaderboard_pages.texts(cells, leaderboard.leaderboard(cells))
            made |= {name: shown[name].encode() for name in pages}
        except _UNFIT as fault:
            yield Finding(", ".join(pages), "cannot be made of these cells", found=_told(fault))
    for name, content in made.items():
        if (run / name).is_file():
            yield from _compared(name, (run / name).read_bytes(), content)


def _told(fault: Exception) -> str:
    text = " ".join(str(fault).split())
    return text if isinstance(fault, UserError) else f"{type(fault).__name__}: {text}"


def _compared(name: str, stored: bytes, made: bytes) -> Iterator[Finding]:
    if stored == made:
        return
    added = _added(name, stored, made) if name.endswith((".csv", ".parquet")) else []
    if added:
        what = f"was written before there was {', '.join(added)}"
        yield Finding(name, what, found="`dyndepth tables RUN` adds it", failure=False)
        return
    what = "is not the function of the cells"
    try:
        told = _FIRST[Path(name).suffix](stored, made)
    except Exception as fault:  # noqa: BLE001 - whatever a damaged file makes a library say
        yield Finding(name, f"{what}: it cannot be read", found=" ".join(str(fault).split()))
        return
    if told is not None:
        place, one, other = told
        yield Finding(name, f"{what}: {place}", one, other)
    elif name.endswith(".parquet"):
        # The library writes its own version into the file.
        yield Finding(name, "has the same content in other bytes", failure=False)
    else:
        yield Finding(name, f"{what}: line ends or quotes")


Difference = tuple[str, str, str]
"""Where two tables first differ, what is stored there, and what should be."""


def _added(name: str, stored: bytes, made: bytes) -> list[str]:
    """The columns by which ``stored`` would be ``made``, if all that it lacks are columns that are
    empty, or as files from before are read; columns that there were before count for nothing."""
    table = TABLES.get(name)
    former, defaults = (table.former, table.defaults) if table else (frozenset(), {})
    defaults = {**SINCE, **defaults}
    try:
        old, new = (_rows(name, content) for content in (stored, made))
    except (ValueError, OSError, csv.Error):  # pyarrow's are of the first two
        return []
    header = new[0]
    known = old[0] if old else header
    kept = [place for place, column in enumerate(header) if column in known]
    added = [place for place, column in enumerate(header) if column not in known]
    read_as = {place: defaults.get(header[place], "") for place in added}
    blank = {place: ("", value, entry(value)) for place, value in read_as.items()}
    empty = all(row[place] in blank[place] for row in new[1:] for place in added)
    left = [place for place, column in enumerate(known) if column not in former]
    try:
        before = [[row[place] for place in left] for row in old]
    except IndexError:
        return []
    same = [[row[place] for place in kept] for row in new] == before
    return [header[place] for place in added] if empty and same else []


def _rows(name: str, content: bytes) -> list[list[Any]]:
    """A table's header and rows; what is missing in a parquet file is the empty text of a CSV."""
    if name.endswith(".csv"):
        return list(csv.reader(io.StringIO(content.decode(), newline="")))
    from pyarrow.parquet import read_table

    found = read_table(io.BytesIO(content))
    columns = [
        [entry(v) if isinstance(v, bool) or v is None else v for v in each.to_pylist()]
        for each in found.columns
    ]
    return [found.column_names, *map(list, zip(*columns, strict=True))]


def _first_csv(stored: bytes, made: bytes) -> Difference | None:
    old, new = (list(csv.reader(io.StringIO(x.decode(), newline=""))) for x in (stored, made))
    header = new[0]
    if not old or old[0] != header:
        return _columns(old[0] if old else [], header)
    for number, (one, other) in enumerate(zip(old[1:], new[1:], strict=False), start=1):
        if one == other:
            continue
        if len(one) != len(header):
            return f"row {number}", f"{len(one)} fields", f"{len(header)} fields"
        column = next(i for i in range(len(header)) if one[i] != other[i])
        of = f" ({header[0]} {one[0]})" if header[0] in ("cell", "setting") else ""
        return f"row {number}{of}, {header[column]}", one[column], other[column]
    return _length(len(old) - 1, len(new) - 1)


def _first_line(stored: bytes, made: bytes) -> Difference | None:
    old, new = (content.decode().split("\n") for content in (stored, made))
    for number, (one, other) in enumerate(zip(old, new, strict=False), start=1):
        if one != other:
            at = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)
            part = slice(max(0, at - 20), at + 20)
            return f"line {number}, character {at + 1}", one[part], other[part]
    return None if len(old) == len(new) else ("lines", str(len(old)), str(len(new)))


def _first_parquet(stored: bytes, made: bytes) -> Difference | None:
    from pyarrow.parquet import read_table

    old, new = (read_table(io.BytesIO(content)) for content in (stored, made))
    if old.column_names != new.column_names:
        return _columns(old.column_names, new.column_names)
    common = min(old.num_rows, new.num_rows)
    found: list[tuple[int, Difference]] = []
    for name in new.column_names:
        one, other = old[name][:common], new[name][:common]
        if one.equals(other):
            continue
        pairs = zip(one.to_pylist(), other.to_pylist(), strict=True)
        row = next((i for i, (a, b) in enumerate(pairs) if a != b), None)
        if row is None:
            if one.type != other.type:
                found.append((0, (f"type of {name}", str(one.type), str(other.type))))
            continue
        cell = old["cell"][row].as_py()
        place = f"row {row + 1} (cell {cell}), {name}"
        found.append((row, (place, str(one[row].as_py()), str(other[row].as_py()))))
    if found:
        return min(found, key=lambda each: each[0])[1]
    return _length(old.num_rows, new.num_rows)


def _columns(old: Sequence[str], new: Sequence[str]) -> Difference:
    lost, extra = [c for c in new if c not in old], [c for c in old if c not in new]
    if lost:
        return "columns", f"without {','.join(lost)}", f"with {','.join(lost)}"
    if extra:
        return "columns", f"with {','.join(extra)}", f"without {','.join(extra)}"
    place = next((i for i, pair in enumerate(zip(old, new, strict=False)) if len(set(pair)) > 1), 0)
    return f"order of columns, the {place + 1}th", old[place], new[place]


def _length(old: int, new: int) -> Difference | None:
    return None if old == new else ("rows", str(old), str(new))


_FIRST = {
    ".csv": _first_csv,
    ".parquet": _first_parquet,
    ".md": _first_line,
    ".html": _first_line,
}
"""By kind of file, what tells where two first differ."""
