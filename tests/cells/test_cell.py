"""Cells on the disk, and the tables as a pure function of them."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
from cells import cell, identity

from dyndepth.cells.cell import TIMING_LEVELS, Cell, order
from dyndepth.cells.identity import UNHASHED, cell_hash, plain, same_data, setting
from dyndepth.cells.recipe import Recipe
from dyndepth.cells.store import Store
from dyndepth.common.errors import UserError
from dyndepth.common.files import write_atomically
from dyndepth.results.tables import NAMES, as_csv, write_tables


def test_hash_follows_what_changes_the_numbers_and_nothing_else():
    base = identity()
    for key in base:
        changed = cell_hash(base | {key: "other"}) != cell_hash(base)
        assert changed == (key not in UNHASHED), key


def test_setting_is_shared_with_dense_whatever_the_method():
    method = identity(method="m", target_speedup=2.0, seed=3, parameters="a=1", method_code="y")
    assert setting(method) == setting(identity())
    assert setting(identity(recovery="lora(rank=4)")) == setting(identity())
    assert setting(identity(dtype="bfloat16")) != setting(identity())


def test_written_cell_is_read_back_equal(tmp_path):
    written = Store(tmp_path).write(cell())
    assert Store(tmp_path).read(identity()) == written
    assert Store(tmp_path).read(identity(seed=1)) is None


def test_file_is_found_by_eye(tmp_path):
    path = Store(tmp_path).file(
        identity(method="m", parameters="rule='a b'", phases="both", target_speedup=1.25, seed=7)
    )
    assert path.name.startswith("m-rule=_a_b_-both-x1.25-seed7-")
    recovered = Store(tmp_path).file(identity(seed=7, recovery=str(Recipe(rank=8))))
    assert "-seed7-lora_rank=8-" in recovered.name


def test_what_is_not_recovered_stands_first():
    cells = [cell(recovery=text) for text in ("joint", "lora", "none")]
    assert [c.identity["recovery"] for c in sorted(cells, key=order)] == ["none", "joint", "lora"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[1, 2]",
        lambda text: text.replace('"seed": 0', '"seed": 1'),
        lambda text: text.replace('"format": 1', '"format": 0'),
        lambda text: text.replace('"status": "done"', '"status": "doing"'),
        lambda text: json.dumps(json.loads(text) | {"accuracy": ["row"]}),
        lambda text: text.encode()[:-3] + b"\xff\xfe",
    ],
)
def test_damaged_file_counts_as_absent_and_says_so_once(tmp_path, capsys, damage):
    store = Store(tmp_path)
    store.write(cell())
    store.write(cell(seed=5))
    path = store.file(identity())
    content = damage(path.read_text())
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    fresh = Store(tmp_path)
    assert fresh.read(identity()) is None
    assert [found.identity["seed"] for found in fresh.all()] == [5]
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 1
    assert path.name in warnings[0]


def test_packed_cells_are_read_and_replaced(tmp_path, capsys):
    store = Store(tmp_path)
    for seed in (0, 1):
        store.write(cell(seed=seed))
    plain, size = store.all(), store.file(identity()).stat().st_size
    store.pack()
    names = [path.name for path in store.files()]
    assert all(name.endswith(".json.gz") for name in names)
    assert store.file(identity()).stat().st_size < size / 2
    assert Store(tmp_path).all() == store.all() == plain
    content = store.file(identity()).read_bytes()
    store.pack()
    assert store.file(identity()).read_bytes() == content

    # One file a cell: what is written anew takes the place of what was packed.
    store.write(cell([0, 0, 0, 0]))
    assert sorted(path.suffix for path in store.files()) == [".gz", ".json"]
    assert len(list(store.folder.iterdir())) == 2
    assert [found.accuracy[0]["value"] for found in Store(tmp_path).all()] == [0.0, 0.75]
    store.pack()
    damaged = store.file(identity())
    for content in (damaged.read_bytes()[:-9], b"no archive"):
        damaged.write_bytes(content)
        assert [found.identity["seed"] for found in Store(tmp_path).all()] == [1]
    assert capsys.readouterr().err.count("counts as absent") == 2


def test_killed_writer_leaves_the_old_cell_and_a_leftover_that_goes(tmp_path):
    store = Store(tmp_path)
    store.write(cell([1, 1, 1, 1]))
    script = f"""
        import os, signal
        from cells import cell
        from dyndepth.cells.store import Store
        os.fsync = lambda handle: os.kill(os.getpid(), signal.SIGKILL)
        Store({str(tmp_path)!r}).write(cell([0, 0, 0, 0]))
    """
    here = Path(__file__).parents[1] / "helpers"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], cwd=here, check=False)
    assert done.returncode == -9
    leftovers = list(store.folder.glob(".writing-*"))
    assert len(leftovers) == 1
    assert [found.accuracy[0]["value"] for found in Store(tmp_path).all()] == [1.0]
    store.sweep_up()
    assert not list(store.folder.glob(".writing-*"))


def test_failed_write_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "file", "text")
    assert list(tmp_path.iterdir()) == []


def test_plain_unwraps_and_drops_what_is_no_number():
    values = {"a": np.float32(0.5), "b": np.int64(3), "c": (math.nan, math.inf), "d": np.bool_(1)}
    assert plain(values) == {"a": 0.5, "b": 3, "c": [None, None], "d": True}


@pytest.mark.parametrize(
    ("status", "evaluated", "level", "asked", "lacks"),
    [
        ("done", True, "quick", "quick", "nothing"),
        ("done", True, "full", "quick", "nothing"),
        ("done", True, "off", "off", "nothing"),
        ("done", True, "off", "quick", "timing"),
        ("done", True, "quick", "full", "timing"),
        ("error", False, "off", "off", "everything"),
        ("error", True, "off", "quick", "timing"),
        ("error", True, "off", "off", "timing"),
    ],
)
def test_what_a_cell_lacks(status, evaluated, level, asked, lacks):
    assert level in TIMING_LEVELS
    record = cell() if evaluated else Cell(identity())
    record.status, record.timing_level = status, level
    assert record.lacks(asked) == lacks


def test_tables_depend_on_cells_alone(tmp_path):
    cells = [cell(seed=seed, method=method) for seed in (2, 0, 1) for method in ("m", "dense")]
    for folder, given in (("a", cells), ("b", cells[::-1])):
        for one in given:
            Store(tmp_path / folder).write(one)
        write_tables(Store(tmp_path / folder).all(), tmp_path / folder)
    for name in NAMES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), name
    assert not list(tmp_path.glob("*/.writing-*"))


def test_tables_of_memory_and_of_disk_are_the_same_bytes(tmp_path):
    store = Store(tmp_path)
    one = cell()
    one.accuracy[0]["value"] = np.float32(1 / 3)
    one.accuracy[0]["stderr"] = math.nan
    store.write(one)
    write_tables(store.all(), tmp_path / "memory")
    write_tables(Store(tmp_path).all(), tmp_path / "disk")
    for name in NAMES:
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "disk" / name).read_bytes()


def test_every_row_carries_the_identity(tmp_path):
    import pandas

    failed = Cell(identity(method="m"), status="error", error="ValueError: no")
    write_tables(sorted([cell(), failed], key=order), tmp_path)
    for name in NAMES:
        path = tmp_path / name
        frame = pandas.read_parquet(path) if path.suffix == ".parquet" else pandas.read_csv(path)
        assert list(frame.columns[:2]) == ["cell", "model"]
        assert set(identity()) <= set(frame.columns)
    accuracy = pandas.read_csv(tmp_path / "accuracy.csv")
    assert accuracy.status.tolist() == ["done", "error"]
    assert accuracy.value.isna().tolist() == [False, True]
    assert accuracy.tasks.tolist() == ["one,two"] * 2
    assert accuracy.limit.tolist() == ["one=4,two=all"] * 2
    board = pandas.read_csv(tmp_path / "leaderboard.csv")
    assert board.error.tolist()[1] == "ValueError: no"


def test_csv_writes_numbers_the_same_way_everywhere():
    text = as_csv([{"value": 0.1 + 0.2, "n": 3, "task": None, "extra": True}], ("task", "value"))
    heading, line = csv.reader(io.StringIO(text))
    row = dict(zip(heading, line, strict=True))
    assert (row["value"], row["n"], row["task"], row["extra"]) == ("0.3", "3", "", "TRUE")
    assert heading[-4:] == ["task", "value", "extra", "n"]


def test_mixed_column_becomes_text_in_parquet(tmp_path):
    import pandas

    one = cell()
    one.samples[0]["target"] = 3
    one.samples[1]["target"] = "b"
    write_tables([one], tmp_path)
    frame = pandas.read_parquet(tmp_path / "samples.parquet")
    assert frame.target.tolist()[:2] == ["3", "b"]


def test_output_path_is_for_one_model(tmp_path):
    store = Store(tmp_path)
    store.write(cell(model_fingerprint="aaaa"))
    store.check_model("tiny")
    store.check_model("renamed", "aaaa")
    with pytest.raises(UserError, match="holds cells of the model tiny"):
        store.check_model("other")
    with pytest.raises(UserError, match=r"tiny \(bbbb\)"):
        store.check_model("tiny", "bbbb")


def test_second_sweep_on_one_path_is_refused(tmp_path):
    script = f"""
        import sys
        from dyndepth.cells.store import Store
        with Store({str(tmp_path)!r}).locked():
            print("held", flush=True)
            sys.stdin.read()
    """
    holder = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="another sweep is writing"):
            Store(tmp_path).check_free()
        with pytest.raises(UserError, match="another sweep is writing"), Store(tmp_path).locked():
            pass
    finally:
        holder.kill()
        holder.wait()
    Store(tmp_path).check_free()
    with Store(tmp_path).locked():
        pass


def test_data_are_the_same_as_far_as_tasks_are_shared():
    one, other = "aa+bbbbbbbbbbbb+gsm8k=01,piqa=02", "aa+bbbbbbbbbbbb+hellaswag=09,piqa=02"
    assert same_data(one, one)
    assert same_data(one, other)
    assert same_data("aa+bbbbbbbbbbbb", one), "recorded before there were digests of tasks"
    assert not same_data(one, other.replace("piqa=02", "piqa=03"))
    assert not same_data("aa", one)
    assert not same_data("", "aa")
    assert same_data("", "gsm8k=01")
