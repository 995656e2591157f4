"""Pictures of the pages: drawn from the tables, drawn anew when their numbers move."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from dyndepth.common.errors import UserError
from dyndepth.pages import __main__ as door
from dyndepth.pages.blocks import Source
from dyndepth.pages.figures import Picture, figure

REPOSITORY = Path(__file__).resolve().parents[2]
RESULTS = Path("results/embedded")
SCORES = {
    "file": "docs/figures/scores.svg",
    "kind": "scores",
    "task": "wikipedia_bpb",
    "metric": "bits_per_byte",
    "labels": ["uls(spacing=even)", "random_mask"],
    "text": "Scores.",
}
ROUTES = {
    "file": "docs/figures/routes.svg",
    "kind": "routes",
    "target": 1.5,
    "labels": ["uls(spacing=even)", "random_mask"],
    "text": "Routes.",
}


@pytest.fixture
def source(tmp_path: Path) -> Source:
    """A repository with the tables that pictures are drawn from."""
    (tmp_path / RESULTS).mkdir(parents=True)
    for file in (REPOSITORY / RESULTS).glob("*.*"):
        if file.suffix in (".csv", ".parquet", ".json") and file.name != "samples.parquet":
            shutil.copy(file, tmp_path / RESULTS)
    return Source(tmp_path, RESULTS)


@pytest.mark.parametrize("options", [SCORES, ROUTES], ids=["scores", "routes"])
def test_drawn_once_for_the_same_numbers(source: Source, options: dict[str, Any]):
    picture = Picture(source, options)
    assert not picture.current(source.root)
    file = source.root / picture.path
    file.parent.mkdir(parents=True)
    file.write_text(picture.svg(), encoding="utf-8")
    assert Picture(source, options).current(source.root)
    assert Picture(source, options | {"text": "Other words."}).current(source.root)
    assert not Picture(source, options | {"labels": ["random_mask"]}).current(source.root)
    assert file.stat().st_size < 200_000
    assert figure(source, options) == f"![{options['text']}]({options['file']})"


def test_drawn_anew_when_a_number_moves(source: Source):
    before = Picture(source, ROUTES).digest, Picture(source, SCORES).digest
    file = source.root / RESULTS / "routing.parquet"
    routing = pd.read_parquet(file)
    moved = (routing["method"] == "random_mask") & (routing["target_speedup"] == 1.5)
    moved &= (routing["task"] == "all") & (routing["phase"] == "all")
    routing.loc[moved.idxmax(), "executed"] /= 2
    routing.to_parquet(file)
    assert Picture(source, ROUTES).digest != before[0]
    assert Picture(source, SCORES).digest == before[1]


def test_a_method_without_numbers_is_named(source: Source):
    with pytest.raises(UserError, match=r"no numbers of nobody for docs/figures/scores\.svg"):
        Picture(source, SCORES | {"labels": ["nobody"]})


def test_the_command_notices_a_picture_of_other_numbers(
    source: Source, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    shutil.copytree(REPOSITORY / "docs", source.root / "docs")
    for name in ("README.md", "results/README.md"):
        shutil.copy(REPOSITORY / name, source.root / name)
    for name in ("skipgpt", "layer_selection", "lossless", "relatives", "bounds"):
        shutil.copytree(
            REPOSITORY / "results" / name,
            source.root / "results" / name,
            ignore=shutil.ignore_patterns("cells"),
        )
    shutil.copy(REPOSITORY / "results" / "gpu_before.csv", source.root / "results")
    monkeypatch.setattr(door, "ROOT", source.root)
    file = source.root / "docs" / "figures" / "scores.svg"
    kept = file.read_text(encoding="utf-8")
    file.write_text(re.sub("numbers [0-9a-f]+", "numbers 0", kept), encoding="utf-8")
    assert door.main(["--check"]) == 1
    assert "docs/figures/scores.svg" in capsys.readouterr().out
    assert door.main([]) == 0
    assert "numbers 0<" not in file.read_text(encoding="utf-8")
    assert door.main(["--check"]) == 0
