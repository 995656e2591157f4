"""A real run on a tiny model verifies; whatever is done to it is named."""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from cells import cell as made_by_hand
from folders import tiny_folder

from dyndepth.cells.cell import Cell
from dyndepth.cells.identity import cell_hash
from dyndepth.cells.store import FORMAT, Store
from dyndepth.results import schema, tables
from dyndepth.results.tables import write_tables
from dyndepth.sweep import run as sweep
from dyndepth.sweep.settings import read
from dyndepth.verify import __main__ as door
from dyndepth.verify import tables as verified
from dyndepth.verify.again import drawn, excuse
from dyndepth.verify.differences import COARSE, EXACT, differences
from dyndepth.verify.findings import means, of_cell
from dyndepth.verify.stored import NAME, check, read_manifest, sha256, write_manifest

pytestmark = pytest.mark.rule

GRID = "uls(spacing=even),early_exit(confidence=fixed),oracle(depths=2, windows=2)"
"""A static rule, one by token, and one that chooses by outcomes; dense comes with every sweep."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with ``model``, ``corpus.txt`` and ``run``: four cells with a manifest."""
    folder = tiny_folder(tmp_path_factory.mktemp("verified"))
    arguments = ["--model", str(folder / "model"), "--corpus", str(folder / "corpus.txt")]
    arguments += ["--tasks", "quartz,last_word,title_generation", "--limit", "5,title_generation=2"]
    arguments += ["--methods", GRID, "--speedups", "1.5", "--timing", "off", "--device", "cpu"]
    status = sweep.sweep(read([*arguments, "--output_path", str(folder / "run")]))
    assert status == 0
    write_manifest(folder / "run")
    return folder


@pytest.fixture
def run(tiny, tmp_path, monkeypatch) -> Path:
    """A copy of the run, to be spoilt. Tables are not validated, which takes seconds each time."""
    monkeypatch.setattr(tables, "validate", lambda name, rows: None)
    monkeypatch.setattr(schema, "read", lambda path: None)
    return Path(shutil.copytree(tiny / "run", tmp_path / "run"))


@pytest.fixture
def told(tiny, capsys) -> Callable[..., tuple[int, str]]:
    """Calls the command; returns its status and what it printed, on one line a finding."""

    def call(path: Path, *arguments: str) -> tuple[int, str]:
        status = door.main([str(path), "--corpus", str(tiny / "corpus.txt"), *arguments])
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


def _some(run: Path, seed: int = 0, method: str | None = None) -> Path:
    """The file of a random cell."""
    files = sorted((run / "cells").glob(f"{method or ''}*.json"))
    return random.Random(seed).choice(files)


def _change(path: Path, change: Callable[[Any], None]) -> str:
    """Change a cell's content; its hash, name and file follow. Returns the hash."""
    body = json.loads(path.read_text())
    change(body)
    body["cell"] = cell_hash(body["identity"])
    path.unlink()
    cell = Cell(**{key: body[key] for key in Cell.__dataclass_fields__})
    Store(path.parents[1]).write(cell)
    return str(body["cell"])


def _consistent(run: Path) -> None:
    """Tables and manifest as if the changed cells were the true ones."""
    write_tables(Store(run).all(), run)
    write_manifest(run)


def _failures(run: Path) -> list[tuple[str, str]]:
    return [(each.cell, each.what) for each in check(run)[1] if each.failure]


def test_untouched_run_verifies(tiny, told):
    status, out = told(tiny / "run", "--all", "--documents", "2")
    assert status == 0, out
    assert "4 cells read, 4 computed again: nothing failed, 0 notes." in out
    assert "FAILED" not in out


def test_with_all_documents_everything_is_compared(run, told):
    def change(body):
        row = next(row for row in body["routing"] if row["phase"] == "all")
        row["executed"] = row["executed"] / 2 + 0.25

    key = _change(_some(run, method="uls"), change)
    _consistent(run)
    assert _failures(run) == []
    status, out = told(run, "--all", "--documents", "all")
    assert status == 1
    assert out.count("FAILED") == 1
    assert f"{key}" in out
    assert "routing: executed of all/all/0/attention" in out


class TestTampered:
    def test_score(self, run, told):
        def change(body):
            row = next(row for row in body["accuracy"] if row["metric"] == "acc")
            row["value"] = row["value"] / 2 + 0.01

        key = _change(_some(run), change)
        assert {(key, "file was altered: SHA-256")} < set(_failures(run))
        _consistent(run)
        ((cell, what),) = _failures(run)
        assert cell == key
        assert what.startswith("accuracy: value of ")
        status, out = told(run, "--only-stored")
        assert (status, out.count("FAILED")) == (1, 1)
        assert f"cell {key} again: python -m dyndepth.sweep --model" in out

    def test_standard_error(self, run):
        def change(body):
            next(row for row in body["accuracy"] if row["stderr"])["stderr"] *= 0.9

        key = _change(_some(run, 1), change)
        _consistent(run)
        ((cell, what),) = _failures(run)
        assert cell == key
        assert what.startswith("accuracy: stderr of ")

    def test_answer(self, run, told):
        """The outcome alone does not fit the score; with the score, it does not come out again."""

        def outcome(body):
            row = next(row for row in body["samples"] if row["task"] == "quartz")
            row["outcome"] = 1.0 - row["outcome"]
            row["outcomes"] = json.dumps(json.loads(row["outcomes"]) | {"acc,none": row["outcome"]})

        def score(body):
            rows = [row for row in body["samples"] if row["task"] == "quartz"]
            value = sum(row["outcome"] for row in rows) / len(rows)
            for row in body["accuracy"]:
                if (row["task"], row["metric"]) == ("quartz", "acc"):
                    row["value"] = value
                    row["stderr"] = (value * (1 - value) / (len(rows) - 1)) ** 0.5

        key = _change(_some(run, 2), outcome)
        _consistent(run)
        assert _failures(run) == [(key, "accuracy: value of quartz acc against its documents")]
        _change(next((run / "cells").glob(f"*{key}.json")), score)
        _consistent(run)
        assert _failures(run) == []
        status, out = told(run, "--all", "--documents", "5")
        assert status == 1
        assert "samples: outcome of quartz/" in out
        assert out.count(f"cell {key} again") == 1

    def test_likelihood_is_found_by_computing_it_again_alone(self, run, told):
        def change(body):
            for row in body["samples"]:
                if row["task"] == "quartz":
                    found = json.loads(row["loglikelihoods"])
                    row["loglikelihoods"] = json.dumps([found[0] + 1e-3, *found[1:]])

        key = _change(_some(run, 3), change)
        _consistent(run)
        assert _failures(run) == []
        status, out = told(run, "--all", "--documents", "1")
        assert status == 1
        assert out.count("FAILED") == 1
        assert "samples: loglikelihoods" in out
        assert f"cell {key} again" in out

    def test_flops(self, run):
        def change(body):
            row = next(row for row in body["compute"] if row["phase"] == "all")
            row["block_speedup"] *= 1.1

        key = _change(_some(run, 4), change)
        _consistent(run)
        ((cell, what),) = _failures(run)
        assert cell == key
        assert what.startswith("compute: block_speedup of ")

    def test_identity(self, run, told):
        """Under its own hash the cell is another one; under the old hash the file is none."""
        path = _some(run, method="uls")
        old = path.stem[-12:]
        key = _change(path, lambda body: body["identity"].update(seed=7))
        failures = _failures(run)
        assert (old, f"cell is missing: no file {path.name}") in failures
        new = next((run / "cells").glob(f"*{key}.json"))
        assert (new.name, "file of a cell is not in the manifest") in failures
        body = json.loads(new.read_text())
        body["identity"]["seed"] = 8
        new.write_text(json.dumps(body))
        assert (new.name, "file cannot be read as a cell") in _failures(run)
        assert told(run, "--only_stored")[0] == 1

    def test_commit_which_no_hash_covers(self, run):
        key = _change(_some(run), lambda body: body["identity"].update(git_commit="0"))
        write_tables(Store(run).all(), run)
        assert _failures(run) == [(key, "file was altered: SHA-256")]

    def test_table(self, run, told):
        path = run / "accuracy.csv"
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        column = rows[0].index("value")
        old, rows[3][column] = rows[3][column], "0.123"
        with path.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)
        ((cell, what),) = _failures(run)
        assert cell == "accuracy.csv"
        assert what == f"is not the function of the cells: row 3 (cell {rows[3][0]}), value"
        status, out = told(run, "--only_stored")
        assert status == 1
        assert "0.123" in out
        assert old in out

    def test_parquet_table(self, run):
        import pyarrow.compute
        from pyarrow import parquet

        table = parquet.read_table(run / "samples.parquet")
        place = table.column_names.index("tokens")
        more = pyarrow.compute.add(table["tokens"], 1)
        parquet.write_table(table.set_column(place, "tokens", more), run / "samples.parquet")
        ((cell, what),) = _failures(run)
        assert cell == "samples.parquet"
        assert what.endswith("tokens")


def test_pages_are_checked_where_they_are(run):
    from dyndepth.results.leaderboard import leaderboard
    from dyndepth.results.leaderboard_pages import write

    cells = Store(run).all()
    write(cells, leaderboard(cells), run)
    write_manifest(run)
    assert _failures(run) == []
    for name in ("leaderboard.md", "leaderboard.html"):
        text = (run / name).read_text("utf-8")
        place = text.index("early_exit")
        (run / name).write_text(f"{text[:place]}x{text[place + 1 :]}", "utf-8")
    failures = _failures(run)
    assert [cell for cell, _ in failures] == ["leaderboard.md", "leaderboard.html"]
    assert all("is not the function of the cells: line " in what for _, what in failures)
    (run / "leaderboard.html").unlink()
    assert ("leaderboard.html", "file is missing") in _failures(run)


def test_tables_of_comparison_are_checked_where_they_are(run, monkeypatch):
    from dyndepth.results import comparison

    texts = {"comparison.csv": "a,b\n1,2\n", "curves.csv": "c\n3\n", "equal_flops.csv": "d\n"}
    monkeypatch.setattr(comparison, "compared", lambda cells: {})
    monkeypatch.setattr(comparison, "texts", lambda rows: texts)
    for name in ("comparison.csv", "curves.csv"):
        (run / name).write_text(texts[name])
    assert _failures(run) == []
    (run / "comparison.csv").write_text("a,b\n1,4\n")
    what = "is not the function of the cells: row 1, b"
    assert _failures(run) == [("comparison.csv", what)]


class TestMissing:
    def test_cell(self, run, told):
        path = _some(run, 5)
        path.unlink()
        failures = _failures(run)
        assert (path.stem[-12:], f"cell is missing: no file {path.name}") in failures
        assert {cell for cell, _ in failures} > {"accuracy.csv", "samples.parquet"}
        assert told(run, "--only_stored")[0] == 1
        (run / NAME).unlink()
        assert {cell for cell, _ in _failures(run)} > {"accuracy.csv", "samples.parquet"}

    def test_part_of_a_cell(self, run):
        path = _some(run, 6)
        path.write_bytes(path.read_bytes()[:-100])
        failures = _failures(run)
        assert (path.name, "file cannot be read as a cell") in failures
        assert (path.stem[-12:], "file was altered: SHA-256") in failures

    def test_table(self, run):
        (run / "compute.csv").unlink()
        assert _failures(run) == [("compute.csv", "table is missing")]

    def test_document(self, run):
        def change(body):
            body["samples"] = body["samples"][1:]

        key = _change(_some(run, 7), change)
        _consistent(run)
        found = {what for cell, what in _failures(run) if cell == key}
        assert any(what.startswith("accuracy: n of ") for what in found)
        assert any(what.startswith("compute: tokens of ") for what in found)


def test_a_column_that_there_was_not_yet_is_a_note(run):
    """As long as nothing stands in it; else the table is not that of the cells."""

    def without(path: Path, column: str) -> None:
        with path.open(newline="") as file:
            rows = list(csv.reader(file))
        place = rows[0].index(column)
        with path.open("w", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerows(row[:place] + row[place + 1 :] for row in rows)

    without(run / "timing.csv", "timing_code")
    assert _failures(run) == []
    (note,) = [each for each in check(run)[1] if each.cell == "timing.csv"]
    assert note.what == "was written before there was timing_code"
    routing = pd.read_parquet(run / "routing.parquet")
    routing.drop(columns="system_instruction").to_parquet(run / "routing.parquet", index=False)
    assert _failures(run) == []
    (note,) = [each for each in check(run)[1] if each.cell == "routing.parquet"]
    assert note.what == "was written before there was system_instruction"
    routing.drop(columns="executed").to_parquet(run / "routing.parquet", index=False)
    without(run / "accuracy.csv", "value")
    differs = "is not the function of the cells: columns"
    assert _failures(run) == [("accuracy.csv", differs), ("routing.parquet", differs)]


def test_times_with_columns_of_before_are_a_note(tmp_path):
    """Columns that there are no more say nothing; what lacks a mode was eager, and what lacks a
    temperature of the likeliest tokens."""
    one = made_by_hand(phases="both")
    one.timing = [{"phase": "decode", "batch": 1, "length": 8, "wall_speedup": 1.1}]
    write_tables([one], tmp_path)
    path = tmp_path / "timing.csv"
    (row,) = csv.DictReader(path.read_text().splitlines())
    assert row.pop("mode") == "eager"
    assert row.pop("temperature") == "0"

    def written(row: dict[str, str]) -> list[tuple[str, str, bool]]:
        path.write_text("\n".join([",".join(row), ",".join(map(_quoted, row.values())), ""]))
        found = verified.tables(tmp_path, [one])
        return [(each.cell, each.what, each.failure) for each in found]

    old = row | {"device_speedup": "1.5"}
    note = "was written before there was mode, temperature"
    assert written(old) == [("timing.csv", note, False)]
    ((_, what, failure),) = written(old | {"wall_speedup": "1.2"})
    assert (what.split(":")[0], failure) == ("is not the function of the cells", True)


def _quoted(text: str) -> str:
    return f'"{text}"' if "," in text else text


def test_extra_cell(run):
    key = _change(_some(run), lambda body: body["identity"].update(target_speedup=9.0))
    extra = next((run / "cells").glob(f"*{key}.json"))
    assert (extra.name, "file of a cell is not in the manifest") in _failures(run)
    shutil.copy(extra, extra.with_name(f"copy-{key}.json"))
    what = "file of a cell has a wrong name: it was copied or renamed"
    assert (f"copy-{key}.json", what) in _failures(run)


@pytest.mark.parametrize("key", ["torch", "harness_code", "data_fingerprint", "dyndepth"])
def test_mixed_versions(run, key, told):
    cell = _change(_some(run, 8), lambda body: body["identity"].update({key: "other"}))
    _consistent(run)
    assert _failures(run) == [(cell, f"mixed versions: {key}")]
    status, out = told(run, "--only_stored")
    assert status == 1
    assert f"mixed versions: {key}" in out


def test_digests_of_before_are_no_other_version(run):
    from dyndepth.cells.identity import FORMER

    former, today = next(iter(FORMER.items()))
    for number, path in enumerate(sorted((run / "cells").glob("*.json"))):
        digest = today if number else former
        _change(path, lambda body, own=digest: body["identity"].update(model_fingerprint=own))
    _consistent(run)
    assert not [what for _, what in _failures(run) if what.startswith("mixed versions")]


def test_other_code_here_is_a_note(run, told):
    for path in sorted((run / "cells").glob("*.json")):
        _change(path, lambda body: body["identity"].update(harness_code="older"))
    _consistent(run)
    status, out = told(run, "--sample", "1", "--documents", "1")
    assert status == 0
    assert "made with another harness_code than is here" in out
    assert "nothing failed, 1 note." in out


def test_a_failed_cell_is_a_note(tmp_path):
    good, bad = made_by_hand(phases="both"), made_by_hand(method="a", phases="both")
    empty = Cell(made_by_hand(method="b", phases="both").identity)
    bad = Cell(bad.identity, status="error", error="out of memory")
    store = Store(tmp_path)
    for each in (good, bad, empty):
        store.write(each)
    write_tables(store.all(), tmp_path)
    found = {(each.cell, each.what): each for each in check(tmp_path)[1]}
    assert not found[bad.key, "failed when it was run"].failure
    assert found[bad.key, "failed when it was run"].stored == "out of memory"
    assert found[empty.key, "has status done and no scores"].failure


def test_cells_that_no_table_can_hold(tmp_path):
    store = Store(tmp_path)
    cell = made_by_hand()
    cell.accuracy[0]["n"] = "many"
    store.write(cell)
    (found,) = [each for each in check(tmp_path)[1] if each.cell == "tables"]
    assert (found.what, found.failure) == ("cannot be made of these cells", True)
    assert "many" in found.found


def test_numbers_that_are_none():
    cell = made_by_hand()
    cell.accuracy[0]["value"] = None
    cell.samples[1]["loglikelihoods"] = "[NaN]"
    found = {each.what for each in of_cell(cell)}
    assert "accuracy: value of one is not finite" in found
    assert "samples: loglikelihoods of one is not finite" in found
    cell = made_by_hand()
    for row in cell.samples[:2]:
        row["outcome"] = 0.5
    assert "outcome of one/0 (and of 1 more)" in {each.what for each in of_cell(cell)}
    cell.samples[0]["outcomes"] = "no json"
    assert [each.what for each in of_cell(cell)] == ["rows cannot be read"]


def test_metric_that_is_no_mean_is_a_note():
    cells = [made_by_hand(seed=seed) for seed in (0, 1)]
    for each in cells:
        each.accuracy[0]["value"] = 0.6
    (found,) = means(cells)
    assert (found.what, found.failure) == ("is no mean over documents: acc,none of one", False)
    cells[0].accuracy[0] |= {"value": 0.75, "stderr": 0.25}
    (found,) = means(cells)
    assert (found.cell, found.stored, found.found) == (cells[1].key, "0.6", "0.75")


def test_draw_takes_every_method_before_a_second():
    names = ["a"] * 6 + ["b", "c", "c"]
    cells = [made_by_hand(method=name, seed=seed) for seed, name in enumerate(names)]
    failed = Cell(made_by_hand(method="d").identity, status="error")
    for seed in range(5):
        found = drawn([*cells, failed], 3, seed)
        assert sorted(each.identity["method"] for each in found) == ["a", "b", "c"]
        assert found == drawn([*cells, failed], 3, seed)
    assert len({drawn(cells, 3, seed)[0].key for seed in range(9)}) > 1
    assert drawn([*cells, failed], None, 0) == cells


def test_tolerance_is_coarse_only_where_it_must():
    cell = made_by_hand(dtype="float32", device="cpu")
    cell.provenance = {"device_name": "abacus", "threads": 2}
    rule = {"needs_training": False, "uses_labels": False, "granularity": "static"}
    here = cell.provenance | rule
    assert excuse(cell, cell.identity, here) == ""
    assert excuse(cell, cell.identity, here | {"threads": 1}) == ""
    token = {"threads": 1, "granularity": "token"}
    assert "another machine" in excuse(cell, cell.identity, here | token)
    assert excuse(cell, cell.identity, here | {"granularity": "token"}) == ""
    for change, why in (({"harness_code": "y"}, "other harness_code"), ({"device": "cuda"}, "not")):
        assert excuse(cell, cell.identity | change, here).startswith(why)
    half = made_by_hand(dtype="bfloat16", device="cpu")
    assert excuse(half, half.identity, here) == "not float32 on the CPU"


def test_coarse_lets_few_answers_flip():
    cell = made_by_hand([1, 1, 1, 0])
    for row in cell.samples:
        row["loglikelihoods"] = "[-3.0, -3.1]"

    def flip(row, likelihoods="[-3.05, -3.04]"):
        hit = 1 - row["outcome"]
        row |= {"outcome": hit, "outcomes": json.dumps({"acc,none": hit})}
        row["loglikelihoods"] = likelihoods

    rows = [dict(row) for row in cell.samples]
    assert differences(cell, "samples", rows, EXACT) == []
    # What it is read off has not moved: somebody wrote another answer down.
    flip(rows[0], "[-3.0, -3.1]")
    both = ["samples: outcome of one/0", "samples: outcomes of one/0"]
    assert [x.what for x in differences(cell, "samples", rows, EXACT)] == both
    assert [x.what for x in differences(cell, "samples", rows, COARSE)] == both
    rows[0] = dict(cell.samples[0])
    flip(rows[0])
    assert len(differences(cell, "samples", rows, EXACT)) == 3
    assert differences(cell, "samples", rows, COARSE) == []
    flip(rows[1])
    found = differences(cell, "samples", rows, COARSE)
    assert found[0].what == "samples: outcome of one/0 (and of 1 more)"
    assert (found[0].stored, found[0].found) == ("1", "0")


class TestManifest:
    def test_is_a_function_of_the_cells(self, run):
        content = (run / NAME).read_bytes()
        assert write_manifest(run).read_bytes() == content
        body = json.loads(content)
        assert body["format"] == FORMAT
        assert len(body["cells"]) == 4
        (line,) = body["commands"]
        assert line.startswith("python -m dyndepth.sweep --model ")
        for entry in read_manifest(run).cells.values():
            assert entry["sha256"] == sha256(run / "cells" / entry["file"])
        write_manifest(run, ["make results"])
        assert json.loads((run / NAME).read_text())["commands"] == ["make results"]

    def test_is_not_written_over_a_run_that_fails(self, run, told):
        (run / NAME).unlink()
        (run / "routing.parquet").write_text("")
        status, out = told(run, "--write-manifest")
        assert status == 1
        assert "no manifest was written" in out
        assert not (run / NAME).exists()
        write_tables(Store(run).all(), run)
        status, out = told(run, "--write-manifest")
        assert status == 0
        assert (run / NAME).is_file()

    def test_that_cannot_be_read_is_named(self, run):
        (run / NAME).write_text("{}")
        assert _failures(run) == [(NAME, "cannot be read")]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--all", "--sample", "3"], "exclude each other"),
        (["--sample", "0"], "--sample takes a whole number"),
        (["--limit", "few"], "--limit takes a whole number"),
        (["--surprise"], "no flag --surprise"),
    ],
)
def test_wrong_input(run, told, arguments, says):
    status, out = told(run, *arguments)
    assert status == 2
    assert says in out


def test_no_run(tmp_path, told):
    status, out = told(tmp_path)
    assert status == 2
    assert "is no run" in out


def test_a_latency_that_is_not_the_median_is_found():
    one = made_by_hand(phases="both")
    row = {"phase": "decode", "batch": 1, "length": 8, "wall_speedup": 1.1}
    row |= {"dense_median_s": 0.02, "dense_tpot_ms": 20.0, "method_tpot_ms": None}
    one.timing = [row]
    assert not [each for each in of_cell(one) if "tpot" in each.what]
    one.timing = [row | {"dense_tpot_ms": 19.0}]
    (found,) = [each for each in of_cell(one) if "tpot" in each.what]
    assert (found.what, found.stored) == ("timing: dense_tpot_ms of decode 1x8", "19")
