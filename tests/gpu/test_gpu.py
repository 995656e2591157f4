"""Ten minutes of a GPU, on a CPU: its checks can fail, its parts keep to their time and resume, and
what it says of a run is what the run left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEVICE

from dyndepth.bench.goals import GPU_GOALS
from dyndepth.gpu import __main__ as door
from dyndepth.gpu import checks, parts, report
from dyndepth.gpu.parts import Part, run_all
from dyndepth.pages.blocks import Source
from dyndepth.pages.gpus import sentence, status_page

NAMES = ("first", "second", "third")


def test_every_check_holds_here():
    found = checks.run(str(DEVICE), say=lambda line: None)
    assert {each["status"] for each in found.values()} <= {"held", "not here"}
    here = [name for name, each in found.items() if each["status"] == "held"]
    assert len(here) >= 7 or DEVICE.type != "cpu"


@pytest.mark.parametrize(
    ("place", "name", "caught"),
    [
        ("dyndepth.models.selection.Selection", "put", "whole is exact"),
        ("dyndepth.models.blocks.Block", "mlp_branch", "same as cpu"),
    ],
)
def test_a_wrong_runtime_is_caught(monkeypatch, place, name, caught):
    """A tenth more of what a sublayer says, on the device alone or in one of two ways."""
    from importlib import import_module

    module, _, cls = place.rpartition(".")
    owner = getattr(import_module(module), cls)
    stock, calls = getattr(owner, name), []

    def wrong(self, *args):
        calls.append(1)
        return stock(self, *args) * (1.1 if len(calls) % 3 == 1 else 1.0)

    monkeypatch.setattr(owner, name, wrong)
    found = checks.run("cpu", say=lambda line: None)
    assert found[caught]["status"] == "failed"
    assert "apart" in found[caught]["why"]


def test_a_failed_check_is_the_exit_status(monkeypatch, tmp_path, capsys):
    def fails(bed):
        raise checks.NotHeld("two are three apart")

    monkeypatch.setattr(checks, "CHECKS", {"sums": fails})
    assert door.main(["checks", "--device", "cpu", "--output_path", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "checks.json").read_text())["sums"]["status"] == "failed"
    assert "failed: sums" in capsys.readouterr().err


def python(code: str):
    return lambda folder, device, seconds: ["-c", code]


def given(monkeypatch, *three: Part) -> None:
    monkeypatch.setattr(parts, "parts", lambda small, methods: list(three))


def run_three(folder: Path, minutes: float = 1.0):
    return run_all(folder, "cpu", minutes, True, "", NAMES)["parts"]


def test_parts_fail_alone_keep_to_their_time_and_resume(monkeypatch, tmp_path):
    slow = "import time; print('on it', flush=True); time.sleep(60)"
    given(
        monkeypatch,
        Part("first", "fails", 0.5, 1, python("import sys; sys.exit('no such card')")),
        Part("second", "hangs", 0.01, 0.5, python(slow)),
        Part("third", "works", 0.9, 1, python("print('all well')")),
    )
    found = run_three(tmp_path)
    assert [found[name]["status"] for name in NAMES] == ["failed", "cut off", "done"]
    assert found["first"]["why"] == "no such card"
    assert (tmp_path / "third.txt").read_text() == "all well\n"
    again = [Part(name, "works", 0.9, 1, python("print('again')")) for name in NAMES]
    given(monkeypatch, *again)
    found = run_three(tmp_path)
    assert [found[name]["status"] for name in NAMES] == ["done"] * 3
    assert (tmp_path / "first.txt").read_text() == "again\n"
    assert (tmp_path / "third.txt").read_text() == "all well\n"  # it was done


def test_the_least_important_is_dropped_first(monkeypatch, tmp_path):
    given(
        monkeypatch,
        Part("first", "works", 0.9, 1, python("print(1)")),
        Part("second", "is long", 0.9, 600, python("print(2)")),
        Part("third", "needs what is not here", 0.9, 1, python("print(3)"), lambda: "no network"),
    )
    found = run_three(tmp_path)
    assert found["first"]["status"] == "done"
    assert found["second"]["why"].startswith("no time was left")
    assert found["third"] == {"status": "not run", "why": "no network", "seconds": 0.0}


def test_another_code_begins_anew(monkeypatch, tmp_path):
    given(monkeypatch, Part("first", "works", 0.9, 1, python("print(1)")))
    run_three(tmp_path)
    (tmp_path / "bench.json").write_text("{}")
    monkeypatch.setattr(parts, "harness_code", lambda: "another")
    found = run_all(tmp_path, "cpu", 0.0, True, "", NAMES)
    assert found["parts"]["first"]["status"] == "not run"
    assert not (tmp_path / "bench.json").exists()


def facts(small: bool = False, speedup: float = 1.0) -> dict:
    line = {"speedup": speedup, "low": speedup, "high": speedup, "flop_ideal": 1.0}
    line |= {"byte_ideal": 1.0, "efficiency": speedup, "peak_ratio": 1.0}
    return parts.about("cpu") | {
        "small": small,
        "parts": {
            "checks": {"status": "done", "why": "", "seconds": 3.0},
            "bench": {"status": "cut off", "why": "not done within 9 s", "seconds": 9.0},
            "sweep": {"status": "not run", "why": "no time was left (3 s)", "seconds": 0.0},
        },
        "checks": {
            "graphs": {"status": "not here", "why": "graphs are CUDA's", "seconds": 0.0},
            "waits": {"status": "failed", "why": "NotHeld: masks", "seconds": 0.0},
        },
        "bench": {
            "about": {"model": parts.MODEL},
            "bench": {"all_execute/prefill_8x2048/bfloat16": line},
        },
        "training": {"model": "m", "dtype": "bfloat16", "tokens_a_second": 149_000.0},
    }


def test_the_page_sorts_what_held_from_what_fell_short():
    def section(text: str, title: str) -> str:
        return text.split(f"## {title}\n")[1].split("\n## ")[0]

    short = report.page(facts(speedup=0.9))
    for said in ("bench: cut off, not done within 9 s", "check 'waits': NotHeld: masks",
                 "0.900 >= 0.98 missed", "149,000 tokens a second of m in bfloat16"):  # fmt: skip
        assert said in section(short, "Fell short")
    for said in ("sweep (the embedded sweep, timed): no time", "check: graphs", "tests ("):
        assert said in section(short, "Not run")
    assert "checks ran whole" in section(short, "Held")
    held = report.page(facts(speedup=0.99))
    assert "goal: all_execute/prefill_8x2048/bfloat16 speedup 0.990" in section(held, "Held")
    assert "| all_execute/prefill_8x2048/bfloat16 | 0.90 [0.90, 0.90] |" in short
    assert len(report.failures(facts())) == 2
    assert GPU_GOALS


def test_the_pages_tell_whether_the_present_code_was_run(tmp_path):
    source = Source(tmp_path, Path("results/embedded"))
    assert "The present code has not been run on a GPU" in status_page(source)
    assert "has not been run on a GPU yet ([what" in sentence(source, {"page": "p.md"})
    folder = tmp_path / "results" / "gpu-card"
    folder.mkdir(parents=True)
    whole = facts() | {"card": "NVIDIA H200"}
    (folder / "gpu.json").write_text(json.dumps(whole))
    assert "has not been run" not in sentence(source, {"page": "p.md"})
    assert "was run on NVIDIA H200" in sentence(source, {"page": "p.md"})
    assert "From `results/gpu-card/`.\n" in status_page(source)
    whole["code"]["harness"] = "older"
    (folder / "gpu.json").write_text(json.dumps(whole))
    assert "has not been run on a GPU yet" in sentence(source, {"page": "p.md"})
    assert "From `results/gpu-card/`. It is of older code." in status_page(source)
    (folder / "gpu.json").write_text(json.dumps(whole | {"small": True}))
    assert "results/gpu-card" not in status_page(source)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "cpu"], "no GPU is here to be measured; --small --device cpu shows"),
        (["--minutes", "0"], "--minutes takes a number above 0, not 0"),
        (["all"], "there is no gpu 'all'; say checks or training, or give flags alone"),
    ],
)
def test_wrong_inputs(capsys, words, told):
    assert door.main(words) == 2
    assert told in capsys.readouterr().err


def test_the_small_variant_runs_whole(tmp_path):
    """As a command, each part in a process of its own; the sweep is of the embedded model."""
    words = ["--small", "--device", "cpu", "--minutes", "9", "--methods", "uls"]
    done = subprocess.run(
        [sys.executable, "-m", "dyndepth.gpu", *words, "--output_path", str(tmp_path / "out")],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert {each["status"] for each in record["parts"].values()} == {"done"}
    assert list(record["parts"]) == list(door.PARTS)
    assert (tmp_path / "out" / "sweep" / "leaderboard.csv").is_file()
    assert "ran whole" in (tmp_path / "out" / "status.md").read_text()
