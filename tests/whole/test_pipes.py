"""A reader that leaves, as ``head`` does, ends no work and brings no traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from folders import tiny_folder
from test_bad_input import made_cell

from dyndepth.cells.store import Store
from dyndepth.results.tables import write_tables


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``model``, ``corpus.txt`` and a finished ``run``."""
    folder = tiny_folder(tmp_path_factory.mktemp("place"))
    store = Store(folder / "run")
    for cell in (made_cell(), made_cell([1, 0, 0, 1], method="uls")):
        store.write(cell)
    write_tables(store.all(), store.path)
    return folder


def unread(words: str, folder: Path, *, errors: bool = False) -> subprocess.CompletedProcess[str]:
    """``dyndepth words``, whose output (and errors, if told so) nobody reads."""
    reader, writer = os.pipe()
    os.close(reader)
    try:
        return subprocess.run(
            [sys.executable, "-m", "dyndepth", *words.split()],
            cwd=folder,
            stdout=writer,
            stderr=writer if errors else subprocess.PIPE,
            text=True,
            check=False,
        )
    finally:
        os.close(writer)


SWEEP = (
    "sweep --model model --corpus corpus.txt --methods uls --speedups 2 --tasks quartz --limit 2 "
    "--timing off"
)


@pytest.mark.parametrize(
    "words",
    [
        "--help",
        "--version",
        "sweep --help",
        "ls methods",
        "ls shapes",
        "leaderboard run",
        "compare run",
        "rerun run",
        "studies layer_selection --help",
        f"{SWEEP} --output_path dry --dry_run",
    ],
)
def test_nobody_reads(words, place):
    done = unread(words, place)
    # transformers shows how far it is with loading.
    told = [line for line in done.stderr.splitlines() if line and "Loading weights" not in line]
    assert (done.returncode, told) == (0, [])


def test_findings_are_counted_though_nobody_reads_them(place):
    done = unread("verify run --only_stored", place)
    assert (done.returncode, done.stderr) == (1, "")


def test_a_wrong_word_is_still_said(place):
    done = unread("leaderboard absent", place)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert unread("leaderboard absent", place, errors=True).returncode == 2


def test_what_was_to_be_written_is_written(place, tmp_path):
    done = unread(f"compare run --output_path {tmp_path}", place)
    assert (done.returncode, done.stderr) == (0, "")
    names = {path.name for path in tmp_path.iterdir()}
    assert {"comparison.csv", "curves.csv", "equal_flops.csv"} <= names


@pytest.mark.parametrize("executor", ["inline", pytest.param("processes", marks=pytest.mark.slow)])
def test_a_sweep_goes_on_to_its_end(executor, place, tmp_path):
    words = f"{SWEEP} --output_path {tmp_path / 'swept'} --executor {executor}"
    assert unread(words, place, errors=True).returncode == 0
    cells = [json.loads(path.read_text()) for path in (tmp_path / "swept" / "cells").glob("*.json")]
    assert {cell["identity"]["method"] for cell in cells} == {"dense", "uls"}
    assert (tmp_path / "swept" / "leaderboard.csv").is_file()
