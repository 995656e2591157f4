"""Every table is described, what is right passes, and one wrong value is named."""

from __future__ import annotations

import csv
import shutil
from io import StringIO

import pandas
import pytest
from cells import cell, identity

from dyndepth import plots
from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import LEADING, cell_hash
from dyndepth.common.errors import UserError
from dyndepth.evaluation.evaluate import Evaluation
from dyndepth.results import numbers, schema
from dyndepth.results.leaderboard import leaderboard
from dyndepth.results.schema import TABLES, read, validate, validate_folder
from dyndepth.results.tables import NAMES, as_csv, write_tables
from dyndepth.runtime.flops import CAUSES


def _cells() -> list[Cell]:
    timed = cell([1, 1, 0, 1], method="m", phases="both", parameters="keep=1")
    times = {"wall_speedup": 1.2, "wall_speedup_low": 1.1, "wall_speedup_high": 1.4, "gpu": None}
    timed.timing = [
        {"phase": phase, "batch": 1, "length": 8, "repeats": 9, "suspect": False} | times
        for phase in ("prefill", "decode")
    ]
    failed = Cell(identity(method="broken", phases="both"), status="error", error="ValueError: no")
    return [cell(phases="both"), timed, failed]


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_tables(_cells(), folder)
    return folder


@pytest.fixture
def run(written, tmp_path):
    """A run's folder of the test's own."""
    return shutil.copytree(written, tmp_path, dirs_exist_ok=True)


def _frame(path):
    parquet = path.suffix == ".parquet"
    return pandas.read_parquet(path) if parquet else pandas.read_csv(path, keep_default_na=False)


def test_every_column_is_described_in_a_sentence():
    for name, table in TABLES.items():
        assert tuple(table.columns)[: len(LEADING)] == LEADING, name
        for column, facts in table.columns.items():
            assert len(facts.description) > 10, (name, column)
            assert facts.description.endswith("."), (name, column)
            assert facts.dtype in {*schema.DTYPES, "any"}, (name, column)
        assert set(table.key) <= set(table.columns)
        assert {column for triple in table.ordered for column in triple} <= set(table.columns)


MADE = (*CAUSES, "padding", "status", "chance")
"""Columns that tables have of their own, or that ``flops`` describes."""


def test_what_the_harness_records_is_described():
    documented = Evaluation.__doc__ or ""
    for name in ("accuracy.csv", "compute.csv", "routing.parquet"):
        for column in TABLES[name].own:
            assert f"``{column}``" in documented or column in MADE, column


def test_tables_that_were_written_validate(run):
    assert validate_folder(run) == list(NAMES)
    board = read(run / "leaderboard.csv")
    assert board["status"].tolist() == ["done", "done", "error"]
    assert board["mean_acc"].dtype == "float64"
    assert str(board["bound"].dtype) == "boolean"


@pytest.mark.parametrize(
    ("name", "column", "wrong", "says"),
    [
        ("accuracy.csv", "value", "good", "no number"),
        ("accuracy.csv", "stderr", -0.1, "at least 0"),
        ("accuracy.csv", "n", 2.5, "no integer"),
        ("accuracy.csv", "higher_is_better", "perhaps", "no boolean"),
        ("accuracy.csv", "status", "maybe", "one of done, error"),
        ("compute.csv", "tokens", -1, "at least 0"),
        ("compute.csv", "block_speedup", 0, "more than 0"),
        ("compute.csv", "phase", "prefill", "one of all, prompt, generation"),
        ("timing.csv", "phase", "prompt", "one of prefill, decode"),
        ("timing.csv", "wall_speedup", 3.0, "wall_speedup_low <= wall_speedup"),
        ("timing.csv", "batch", 0, "at least 1"),
        ("routing.parquet", "executed", 1.2, "at most 1"),
        ("routing.parquet", "layer", -1, "at least 0"),
        ("routing.parquet", "sublayer", "block", "one of attention, mlp"),
        ("samples.parquet", "tokens", -3, "at least 0"),
        ("samples.parquet", "doc_hash", "", "must not be empty"),
        ("leaderboard.csv", "mean_acc", 1.5, "at most 1"),
        ("leaderboard.csv", "mean_acc", 0.0, "mean_acc_low <= mean_acc"),
        ("leaderboard.csv", "block_speedup", -1, "more than 0"),
        ("leaderboard.csv", "total_speedup", float("inf"), "no number"),
        ("leaderboard.csv", "target_speedup", 0.5, "at least 1"),
        ("leaderboard.csv", "method", "", "must not be empty"),
        ("leaderboard.csv", "bound", "", "must not be empty"),
        ("leaderboard.csv", "status", "maybe", "one of done, error"),
    ],
)
def test_a_wrong_value_is_refused_and_named(run, name, column, wrong, says):
    frame = _frame(run / name)
    row = 1
    frame[column] = frame[column].astype(object)
    frame.loc[row, column] = wrong
    if column == "mean_acc":  # of these few documents there is no interval
        frame.loc[row, ["mean_acc_low", "mean_acc_high"]] = ["0.4", "0.9"]
    with pytest.raises(UserError) as refused:
        validate(name, frame)
    text = str(refused.value)
    assert text.startswith(f"{name}: column {column!r}, row {row + 1} (cell {frame.cell[row]}): ")
    assert says in text


@pytest.mark.parametrize("name", NAMES)
def test_a_row_that_stands_twice_is_refused(run, name):
    frame = _frame(run / name)
    with pytest.raises(UserError, match="stand twice"):
        validate(name, pandas.concat([frame, frame.iloc[:1]]))


def test_columns_are_those_that_are_described_in_their_order(run):
    frame = _frame(run / "leaderboard.csv")
    with pytest.raises(UserError, match="column 'mean_acc' is missing"):
        validate("leaderboard.csv", frame.drop(columns="mean_acc"))
    with pytest.raises(UserError, match="column 'luck' is not one of"):
        validate("leaderboard.csv", frame.assign(luck=1))
    with pytest.raises(UserError, match=r"stands where '\w+' should"):
        validate("leaderboard.csv", frame[[*frame.columns[1:], frame.columns[0]]])
    with pytest.raises(UserError, match=r"no schema of a table 'luck.csv'; there is one of"):
        validate("luck.csv", frame)


def test_an_optional_column_may_be_absent_and_still_be_wrong(run):
    frame = _frame(run / "timing.csv")
    validate("timing.csv", frame.drop(columns=["cores", "wall_speedup_low"]))
    with pytest.raises(UserError, match="'cores'"):
        validate("timing.csv", frame.assign(cores=0))


def test_nothing_is_written_if_a_value_cannot_be(tmp_path):
    one = cell(phases="both")
    one.compute[0]["block_speedup"] = -2.0
    with pytest.raises(UserError, match=r"compute.csv: column 'block_speedup', row 1 \(cell"):
        write_tables([one], tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_hash_without_a_letter_stays_a_text(run):
    path = run / "leaderboard.csv"
    rows = list(csv.DictReader(StringIO(path.read_text())))
    for row, name in zip(rows, ("001234567890", "123456e78901", "000000000000"), strict=True):
        row["cell"] = row["git_commit"] = name
    buffer = StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    path.write_text(buffer.getvalue())
    found = read(path)
    assert found["cell"].tolist() == ["001234567890", "123456e78901", "000000000000"]
    assert found["git_commit"][0] == "001234567890"


def test_reading_tells_what_is_wrong_with_a_file(run):
    (run / "routing.parquet").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        read(run / "routing.parquet")
    assert "routing.parquet" not in validate_folder(run)
    (run / "samples.parquet").write_bytes(b"no parquet")
    with pytest.raises(UserError, match="cannot be read"):
        validate_folder(run)


def test_csv_holds_no_formula_and_opens_without_surprises(run):
    rows = leaderboard(_cells())
    rows[2]["error"] = '=HYPERLINK("x")'
    text = as_csv(rows, TABLES["leaderboard.csv"].own)
    lines = list(csv.reader(StringIO(text)))
    assert lines[0] == list(TABLES["leaderboard.csv"].columns)
    assert {len(line) for line in lines} == {len(lines[0])}
    row = dict(zip(lines[0], lines[3], strict=True))
    assert row["error"] == '\'=HYPERLINK("x")'
    # A negative number is a number, no formula.
    assert as_csv([{"value": -0.5}], ("value",)).strip().endswith(",-0.5")
    frame = pandas.read_csv(StringIO(text))
    assert "Unnamed: 0" not in frame
    for column, facts in TABLES["leaderboard.csv"].columns.items():
        if facts.dtype in ("number", "integer") and frame[column].notna().any():
            assert pandas.api.types.is_numeric_dtype(frame[column]), column
    assert frame["bound"].dtype == bool


def test_tables_of_the_comparison_are_described_with_types():
    for name in ("comparison.csv", "curves.csv", "equal_flops.csv"):
        columns = schema.tables()[name].columns
        assert {column.dtype for column in columns.values()} <= {*schema.DTYPES, "any"}
        assert (columns["p"].dtype, columns["n"].dtype) == ("number", "integer")
        assert not columns["verdict"].nullable
    described = schema.tables()["comparison.csv"].columns
    row = dict.fromkeys(described) | {"cell": "123", "model": "m", "method": "a", "p": 0.5}
    row |= {"phases": "both", "recovery": "none", "verdict": "better", "pareto": True}
    validate("comparison.csv", [row])
    with pytest.raises(UserError, match="'q' is not one of"):
        validate("comparison.csv", [row | {"q": 1}])
    with pytest.raises(UserError, match="'pareto', row 1 .*'perhaps' is no boolean"):
        validate("comparison.csv", [row | {"pareto": "perhaps"}])
    with pytest.raises(UserError, match="'verdict', row 1 .*must not be empty"):
        validate("comparison.csv", [row | {"verdict": None}])


def test_copies_of_a_run_with_a_changed_digit_fail(run, tmp_path_factory):
    copy = tmp_path_factory.mktemp("copy")
    shutil.copytree(run, copy, dirs_exist_ok=True)
    path = copy / "routing.parquet"
    table = pandas.read_parquet(path)
    table.loc[0, "executed"] = 5.0
    table.to_parquet(path)
    with pytest.raises(UserError, match=r"routing.parquet: column 'executed', row 1 .* at most 1"):
        validate_folder(copy)


@pytest.mark.parametrize(
    "text", ["123456789012", "12e456789012", "5.24.0", "0.1.0", "2026-01-02", "1/2", ".5", "inf"]
)
def test_a_text_that_looks_like_a_number_or_a_date_stays_a_text(text):
    written = as_csv([{"cell": text}, {"cell": "b779a8c7124b0a85"}], ())
    assert [line.partition(",")[0] for line in written.splitlines()[1:]] == [
        f"'{text}",
        "b779a8c7124b0a85",
    ]


def test_a_hash_of_digits_alone_is_one_hash_in_every_table(tmp_path):
    """Some readers would take it for a number; those of the suite know what was put before it."""
    one = cell(method="cut", target_speedup=2.0)
    seed = next(n for n in range(10_000) if cell_hash(one.identity | {"seed": n}).isdigit())
    one.identity["seed"] = seed
    write_tables([cell(), one], tmp_path)
    assert f"'{one.key}" in (tmp_path / "leaderboard.csv").read_text()
    for name, table in plots.read_tables(tmp_path).items():
        if not table.empty:
            assert one.key in set(table["cell"]), name
            assert table["label"].notna().all(), name
    for name in NAMES:
        if name not in ("timing.csv", "samples.parquet"):
            assert one.key in set(read(tmp_path / name)["cell"]), name
    assert one.key in {row["cell"] for row in numbers.read(tmp_path / "leaderboard.csv")}


def test_truth_values_are_those_that_r_knows_too():
    written = as_csv([{"bound": True}, {"bound": False}, {"bound": None}], ())
    found = [row["bound"] for row in csv.DictReader(StringIO(written))]
    assert found == ["TRUE", "FALSE", ""]
    table = pandas.read_csv(StringIO(written))
    assert table["bound"].tolist()[:2] == [True, False]


def test_versions_are_no_dates_in_any_table(run):
    for path in run.glob("*.csv"):
        for row in csv.DictReader(StringIO(path.read_text("utf-8"))):
            for name in ("torch", "transformers", "lm_eval", "dyndepth"):
                assert row[name].startswith(f"{name}=="), path


def test_times_of_before_are_read_as_today(run):
    """Columns that there are no more go, and what ran then ran in eager mode."""
    frame = _frame(run / "timing.csv")
    today = validate("timing.csv", frame)
    assert set(today["mode"]) == {"eager"}
    place = list(frame).index("suspect")
    old = frame.drop(columns=["mode", "dense_busy_s", "method_busy_s", "busy_speedup"])
    for name in ("dense_device_s", "method_device_s", "device_speedup"):
        old.insert(place - 4, name, "")
    read_now = validate("timing.csv", old)
    assert set(read_now["mode"]) == {"eager"}
    assert "device_speedup" not in read_now
    assert list(read_now) == [name for name in today if name in set(read_now)]


def test_one_shape_may_be_timed_in_both_modes(tmp_path):
    cells = _cells()
    cells[1].timing += [row | {"mode": "graphs"} for row in cells[1].timing]
    write_tables(cells, tmp_path)
    assert sorted(read(tmp_path / "timing.csv")["mode"]) == ["eager"] * 2 + ["graphs"] * 2
    frame = _frame(tmp_path / "timing.csv")
    with pytest.raises(UserError, match="one of eager, graphs"):
        validate("timing.csv", frame.replace({"mode": {"graphs": "fast"}}))
