"""The tables' schemas: ``TABLES`` describes them, ``validate`` refuses a value that cannot be.

Descriptions stand in ``dyndepth.results.columns``; the checking is pandera's. ``read`` gives a
table back with the types that it declares, whatever its digits look like (a hash may have no letter
in it).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dyndepth.cells.identity import Row
from dyndepth.common.errors import UserError
from dyndepth.common.paths import path_of
from dyndepth.results.columns import (
    ACCURACY,
    COMPUTE,
    IDENTITY,
    LEADERBOARD,
    ROUTING,
    SAMPLES,
    SINCE,
    TIMING,
    Column,
    Table,
)
from dyndepth.results.comparison_columns import ALWAYS, COMPARISON, CURVES, EQUAL_FLOPS, TYPES
from dyndepth.results.fields import unquoted

if TYPE_CHECKING:
    import pandas
    import pandera.pandas


TABLES: dict[str, Table] = {
    "accuracy.csv": ACCURACY,
    "compute.csv": COMPUTE,
    "timing.csv": TIMING,
    "routing.parquet": ROUTING,
    "samples.parquet": SAMPLES,
    "leaderboard.csv": LEADERBOARD,
}
"""The tables of a run, in the order in which they are written."""

COMPARED = {
    "comparison.csv": (COMPARISON, "a comparison of one cell with dense on one metric"),
    "curves.csv": (CURVES, "a method's curve on one metric, by one kind of FLOPs"),
    "equal_flops.csv": (EQUAL_FLOPS, "a method at one budget, by one kind of FLOPs"),
}
"""Tables of ``dyndepth.compare``: descriptions of the columns, and what a row is."""

DTYPES = {"text": "string", "integer": "Int64", "number": "float64", "boolean": "boolean"}
"""Type of a column -> the pandas type that holds it, missing values included. A column of type
``any`` is taken as it is."""

_TOLERANCE = 1e-9


@cache
def tables() -> dict[str, Table]:
    """All tables: ``TABLES`` and those of ``COMPARED``."""
    types = {key: own.dtype for key, own in IDENTITY.items()} | TYPES
    compared = {
        name: Table(
            row,
            {
                key: Column(types.get(key, "number"), key not in ALWAYS, text)
                for key, text in descriptions.items()
            },
        )
        for name, (descriptions, row) in COMPARED.items()
    }
    return TABLES | compared


def validate(name: str, table: Sequence[Row] | pandas.DataFrame) -> pandas.DataFrame:
    """``table`` in the declared types, if everything in it may stand in the table ``name``.

    ``table`` is rows (a missing value is None, NaN or an empty text) or a frame as pandas reads it.
    Raises UserError that names the table, the column and the first value that is wrong.
    """
    import pandas

    described = _described(name)
    if isinstance(table, pandas.DataFrame):
        frame = _today(described, table.reset_index(drop=True))
    else:
        since = {key: text for key, text in SINCE.items() if key in described.columns}
        table = [since | described.today(row) for row in table]
        # Every column that a row may lack is there, empty.
        extra = {key for row in table for key in row} - set(described.columns)
        frame = pandas.DataFrame(list(table), columns=[*described.columns, *sorted(extra)])
    _check_names(name, described, list(frame.columns))
    typed = {
        column: _typed(name, column, described.columns[column], frame) for column in frame.columns
    }
    frame = pandas.DataFrame(typed, columns=list(frame.columns))
    from pandera.errors import SchemaError

    try:
        _pandera(name, tuple(frame.columns)).validate(frame)
    except SchemaError as fault:
        raise UserError(_sentence(name, described, frame, fault)) from None
    return frame


def read(path: str | Path) -> pandas.DataFrame:
    """A table's file with the types that its schema declares; it must validate.

    Raises UserError for a file that is missing, cannot be read, has an unknown name, or holds a
    value that cannot be.
    """
    import pandas

    path = path_of(path)
    described = _described(path.name)
    try:
        if path.suffix == ".parquet":
            frame = pandas.read_parquet(path)
        else:
            text = {
                key: "string" for key, column in described.columns.items() if column.dtype == "text"
            }
            # Only the empty field is missing: "none" and "NA" are texts.
            frame = pandas.read_csv(path, dtype=text, keep_default_na=False, na_values=[""])
            for key in set(text) & set(frame):
                frame[key] = frame[key].map(unquoted, na_action="ignore").astype("string")
    except (OSError, ValueError) as fault:
        raise UserError(f"{path} cannot be read as a table: {fault}") from fault
    return validate(path.name, frame)


def validate_folder(folder: str | Path) -> list[str]:
    """Names of the tables in ``folder``, each of which validates; the first fault is raised as
    UserError. Tables that are not there are passed over."""
    present = [name for name in tables() if (path_of(folder) / name).is_file()]
    for name in present:
        read(path_of(folder) / name)
    return present


def _today(described: Table, frame: pandas.DataFrame) -> pandas.DataFrame:
    """A file from before with the columns of today."""
    frame = frame.drop(columns=[column for column in frame if column in described.former])
    names = list(described.columns)
    for key, text in {**SINCE, **described.defaults}.items():
        if key not in described.columns:
            continue
        before = [name for name in names[: names.index(key)] if name in frame]
        if key not in frame and before:
            frame.insert(list(frame).index(before[-1]) + 1, key, text)
    return frame


def _described(name: str) -> Table:
    try:
        return tables()[name]
    except KeyError:
        raise UserError(
            f"there is no schema of a table {name!r}; there is one of {', '.join(tables())}"
        ) from None


def _check_names(name: str, described: Table, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in described.columns:
            raise UserError(f"{name}: column {column!r} is not one of the table's columns")
        if columns.count(column) > 1:
            raise UserError(f"{name}: column {column!r} stands there twice")
    for column in described.columns:
        if column not in columns and not described.may_lack(column):
            raise UserError(f"{name}: column {column!r} is missing")
    wanted = [column for column in described.columns if column in columns]
    for column, other in zip(columns, wanted, strict=True):
        if column != other:
            raise UserError(f"{name}: column {column!r} stands where {other!r} should")


def _typed(name: str, key: str, column: Column, frame: pandas.DataFrame) -> pandas.Series[Any]:
    """The column in its declared type; the first value that does not fit is named."""
    import pandas

    series = frame[key]
    if column.dtype == "any":
        return series
    if column.dtype == "text":
        text = series.astype("string")
        return text.mask(text == "")
    empty = series.isna() | (series.astype("string") == "").fillna(False).astype(bool)
    numbers = series.mask(empty) if empty.any() and series.dtype == object else series
    known: Any
    wrong: Any
    if column.dtype == "boolean":
        known = numbers.map({True: True, False: False, "TRUE": True, "FALSE": False})
        wrong = known.isna() & ~empty
    else:
        known = pandas.to_numeric(numbers, errors="coerce").astype("float64")
        wrong = (known.isna() & ~empty) | (known.abs() == float("inf"))
        wrong = wrong | numbers.map(lambda value: isinstance(value, bool)).astype(bool)
        if column.dtype == "integer":
            wrong = wrong | ((known != known.round()) & known.notna())
    if wrong.any():
        at = int(wrong.to_numpy().argmax())
        raise UserError(_place(name, key, frame, at) + f"{series[at]!r} is no {column.dtype}")
    return known.astype(DTYPES[column.dtype])


@cache
def _pandera(name: str, present: tuple[str, ...]) -> pandera.pandas.DataFrameSchema:
    """The pandera schema of a table whose columns, ``present``, have their types already."""
    import pandera.pandas as pa

    described = tables()[name]
    bounds: dict[str, Any] = {
        "ge": pa.Check.ge,
        "gt": pa.Check.gt,
        "le": pa.Check.le,
        "isin": pa.Check.isin,
    }
    columns = {
        key: pa.Column(
            None if column.dtype == "any" else DTYPES[column.dtype],
            checks=[bounds[check](bound) for check, bound in column.checks.items()],
            nullable=column.nullable,
            required=not described.may_lack(key),
            description=column.description,
        )
        for key, column in described.columns.items()
    }
    return pa.DataFrameSchema(
        columns,
        checks=[_in_order(pa, triple) for triple in described.ordered],
        unique=[key for key in described.key if key in present] or None,
    )


def _in_order(pa: Any, triple: tuple[str, str, str]) -> Any:
    low, value, high = triple

    def check(frame: pandas.DataFrame) -> pandas.Series[bool]:
        if not {low, value, high} <= set(frame.columns):
            return frame.iloc[:, 0].notna() | True
        lower = frame[low].isna() | (frame[low] <= frame[value] + _TOLERANCE)
        upper = frame[high].isna() | (frame[value] <= frame[high] + _TOLERANCE)
        return (lower & upper) | frame[value].isna()

    return pa.Check(check, name=value, error=f"{low} <= {value} <= {high}")


def _sentence(name: str, described: Table, frame: pandas.DataFrame, fault: Any) -> str:
    """A pandera failure in one sentence."""
    cases = fault.failure_cases
    at = int(cases["index"].iloc[0]) if "index" in cases and len(cases) else 0
    column = str(getattr(fault.schema, "name", None))
    if column in described.columns:
        value = frame[column].iloc[at]
        if described.columns[column].dtype != "any" and frame[column].isna().iloc[at]:
            return _place(name, column, frame, at) + "the field must not be empty"
        return _place(name, column, frame, at) + f"{value!r} breaks {_rule(described, column)}"
    if getattr(fault.reason_code, "name", "") == "DUPLICATES":
        return f"{_place(name, ', '.join(described.key), frame, at)}the same values stand twice"
    for low, value, high in described.ordered:
        if fault.check is not None and fault.check.name == value:
            numbers = ", ".join(f"{frame[key].iloc[at]:g}" for key in (low, value, high))
            return f"{_place(name, value, frame, at)}{numbers} break {low} <= {value} <= {high}"
    return f"{name}: {fault}"


def _rule(described: Table, column: str) -> str:
    words = {"ge": "at least", "gt": "more than", "le": "at most", "isin": "one of"}
    checks = described.columns[column].checks.items()
    return " and ".join(
        f"{words[check]} {', '.join(bound) if check == 'isin' else bound}"
        for check, bound in checks
    )


def _place(name: str, column: str, frame: pandas.DataFrame, at: int) -> str:
    cell = f" (cell {frame['cell'].iloc[at]})" if "cell" in frame else ""
    return f"{name}: column {column!r}, row {at + 1}{cell}: "
