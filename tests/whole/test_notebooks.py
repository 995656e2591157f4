"""The notebooks run from top to bottom, open with a question and end with what was found."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path
from typing import Any

import nbformat
import pandas
import pytest
from nbclient import NotebookClient
from test_curves import make_run

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
PATHS = sorted(NOTEBOOKS.glob("*.ipynb"))
RUN = NOTEBOOKS.parent / "results" / "embedded"
LIMIT = 300_000
"""Bytes that a notebook may have in the repository."""

FOUND = {
    "03": ("block FLOPs, no competitor loses less than", "By prefill time", "By decode time"),
    "04": ("wall efficiency", "Under all timed conditions saved arithmetic becomes time for"),
    "05": ("is ahead by", "Not shown to be behind"),
    "06": ("without recovery", "its interval overlaps"),
}
"""What the findings of a notebook that reads a run say, whatever the run."""

names = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


@cache
def read(path: Path) -> Any:
    return nbformat.read(path, as_version=4)


def reads_a_run(path: Path) -> bool:
    return any("DYNDEPTH_RUN" in cell.source for cell in read(path).cells)


def execute(path: Path, run: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The notebook as it is after all its cells ran over ``run`` in quick mode, in its folder."""
    settings = {"DYNDEPTH_QUICK": "1", "DYNDEPTH_RUN": str(run), "OMP_NUM_THREADS": "1"}
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=place).execute()
    return notebook


def outputs(notebook: Any) -> list[Any]:
    return [each for cell in notebook.cells if cell.cell_type == "code" for each in cell.outputs]


def check(notebook: Any) -> None:
    kinds = {kind for each in outputs(notebook) for kind in each.get("data", ())}
    assert "image/png" in kinds, "no figure was shown"
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    printed = "".join(each.get("text", "") for each in last.outputs).strip()
    assert len(printed.split()) > 5, "the last cell says nothing of what was found"
    assert printed.endswith(".")
    errors = [each for each in outputs(notebook) if each.get("name") == "stderr"]
    assert not [each.text for each in errors if "Warning" in each.text]


def test_there_are_eight():
    assert [path.stem[:2] for path in PATHS] == [f"{number:02d}" for number in range(1, 9)]


@names
def test_opens_with_a_question_and_ends_with_what_was_found(path):
    cells = read(path).cells
    assert cells[0].cell_type == "markdown"
    assert cells[0].source.startswith("# ")
    assert "**Question: " in cells[0].source
    assert "?**" in cells[0].source
    assert cells[-3].source == "## What was found"
    assert cells[-2].cell_type == "code"
    assert "print(" in cells[-2].source
    assert cells[-1].source.startswith("**What it does not show.** ")


@names
def test_is_small_and_valid_and_draws_nothing_itself(path):
    assert path.stat().st_size < LIMIT
    nbformat.validate(read(path))
    code = "\n".join(cell.source for cell in read(path).cells if cell.cell_type == "code")
    for word in ("pyplot", "seaborn", "import matplotlib", ".savefig"):
        assert word not in code


@pytest.mark.parametrize(
    "path", [path for path in PATHS if reads_a_run(path)], ids=lambda path: path.stem
)
def test_reads_a_run(path, tmp_path, monkeypatch):
    notebook = execute(path, make_run(tmp_path / "run", methods=3), monkeypatch)
    check(notebook)
    printed = "".join(each.get("text", "") for each in notebook.cells[-2].outputs)
    for words in FOUND[path.stem[:2]]:
        assert words in printed


@pytest.mark.parametrize("modes", [("graphs",), ("eager", "graphs")])
def test_modes_are_apart(modes, tmp_path, monkeypatch):
    """Each has its figures and findings, also where a run was timed in one of them alone."""
    run = make_run(tmp_path / "run", methods=2)
    timing = pandas.read_csv(run / "timing.csv", keep_default_na=False)
    parts = [
        timing[(timing["phase"] == "decode") | (mode == "eager")].assign(mode=mode)
        for mode in modes
    ]
    pandas.concat(parts).to_csv(run / "timing.csv", index=False)
    (path,) = (path for path in PATHS if path.stem.startswith("04"))
    notebook = execute(path, run, monkeypatch)
    check(notebook)
    drawn = [each for each in outputs(notebook) if "image/png" in each.get("data", ())]
    assert len(drawn) == 2 * len(modes)  # one a batch and mode
    printed = "".join(each.get("text", "") for each in notebook.cells[-2].outputs)
    found = {mode: printed.count(f"tokens, {mode}: a wall efficiency") for mode in modes}
    assert found == {mode: {"eager": 4, "graphs": 2}[mode] for mode in modes}
    assert "wall 1.00x [0.88, 1.25] noisy, undecided)" in printed
    assert "noisy: the interval is wider" in "".join(o.get("text", "") for o in outputs(notebook))


@pytest.mark.slow
@pytest.mark.parametrize(
    "path", [path for path in PATHS if reads_a_run(path)], ids=lambda path: path.stem
)
def test_reads_the_committed_run(path, monkeypatch):
    check(execute(path, RUN, monkeypatch))


@pytest.mark.parametrize("path", PATHS[:1], ids=lambda path: path.stem)
def test_runs_with_the_embedded_model(path, monkeypatch):
    notebook = execute(path, RUN, monkeypatch)
    check(notebook)
    assert os.environ["DYNDEPTH_QUICK"] == "1"


@pytest.mark.slow
@pytest.mark.parametrize("path", [PATHS[1], *PATHS[6:]], ids=lambda path: path.stem)
def test_runs_with_the_embedded_model_for_longer(path, monkeypatch):
    notebook = execute(path, RUN, monkeypatch)
    check(notebook)
    if path == PATHS[6]:
        printed = "".join(each.get("text", "") for each in outputs(notebook))
        assert " passed" in printed
        assert " failed" not in printed
        assert "every_other at 1.2" in printed
    if path == PATHS[7]:
        printed = "".join(each.get("text", "") for each in notebook.cells[-2].outputs)
        assert "spread 3 of 3." in printed
        assert "drafted tokens stand" in printed


def test_runs_without_timing_or_bounds_are_told(tmp_path, monkeypatch):
    run = make_run(tmp_path / "bare", bounds=0)
    (run / "timing.csv").write_text((run / "timing.csv").read_text().splitlines()[0] + "\n")
    for stem, said in (("04", "This run was not timed"), ("05", "This run holds no bound")):
        (path,) = (path for path in PATHS if path.stem.startswith(stem))
        notebook = execute(path, run, monkeypatch)
        assert notebook.cells[-2].outputs[0]["text"].strip().endswith(".")
        assert said in "".join(each.get("text", "") for each in outputs(notebook))
