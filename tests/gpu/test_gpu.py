"""Ten minutes of a GPU, on a CPU: its checks can fail, its parts keep to their time and resume, and
what it says of a run is what the run left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import DEVICE
from recording import StandIn

from dyndepth.bench.lines import NO_MEMORY, NO_TIME
from dyndepth.common.digests import PACKAGE
from dyndepth.common.errors import RunFailed
from dyndepth.gpu import __main__ as door
from dyndepth.gpu import checks, parts, report, training
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


def test_the_check_of_graphs_runs_with_a_recorder():
    """What only a GPU runs, by the stand-in."""
    bed = checks.Bed("cpu")
    bed.recorder = StandIn()
    checks.graphs(bed)
    assert bed.recorder.repeated > 0


def test_a_failed_check_is_the_exit_status(monkeypatch, tmp_path, capsys):
    def fails(bed):
        raise checks.NotHeld("two are three apart")

    monkeypatch.setattr(checks, "CHECKS", {"sums": fails})
    assert door.main(["checks", "--device", "cpu", "--output_path", str(tmp_path)]) == 1
    assert json.loads((tmp_path / "checks.json").read_text())["sums"]["status"] == "failed"
    assert "failed: sums" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "others"), [(3, 0), (checks.TOKENS - checks.PROMPT, 2)])
def test_steps_that_were_not_repeated_are_counted(steps, others):
    held = SimpleNamespace(steps=steps, others=others)
    with pytest.raises(checks.NotHeld, match=f"{steps} of 16 steps were repeated, {others} were"):
        checks._all_repeated("plan", held)
    checks._all_repeated("plan", SimpleNamespace(steps=16, others=0))


class Clock:
    """Time of which each step takes ``a_step`` seconds, and the first run a minute more."""

    def __init__(self, a_step: float) -> None:
        self.now, self.a_step, self.asked = 0.0, a_step, []

    def train(self, steps: int) -> None:
        self.now += self.a_step * steps + 60 * (not self.asked)
        self.asked.append(steps)

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("a_step", "asked"), [(0.5, [2, 2, 8]), (0.125, [2, 2, 8, 26]), (0.001, [2, 2, 8, 26, 98])]
)
def test_a_step_is_timed_without_the_start_and_long_enough(monkeypatch, a_step, asked):
    clock = Clock(a_step)
    monkeypatch.setattr(training, "time", clock)
    assert training.a_step(clock.train, 6, 1.0) == pytest.approx(a_step)
    assert clock.asked[: len(asked)] == asked
    assert clock.asked[-1] <= 2 + training.MOST_STEPS


def test_steps_that_take_no_time_are_no_measurement(monkeypatch):
    clock = Clock(0.0)
    monkeypatch.setattr(training, "time", clock)
    with pytest.raises(RunFailed, match="1024 more steps of training took no longer than 2"):
        training.a_step(clock.train, 6, 1.0)


def python(code: str):
    return lambda folder, device, seconds: ["-c", code]


parts_of = partial(parts.parts, methods="")


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


def test_a_bench_that_left_lines_out_is_cut_off_and_goes_on(monkeypatch, tmp_path):
    def says(left: dict) -> Part:
        text = json.dumps({"left": left})
        words = python(f"open({str(tmp_path / 'bench.json')!r}, 'w').write({text!r})")
        return Part("first", "measures", 0.9, 1, words, left=parts._left)

    given(monkeypatch, says({"a": NO_TIME, "b": NO_MEMORY}))
    first = run_three(tmp_path)["first"]
    assert (first["status"], first["why"]) == ("cut off", "lines that were not measured: 1")
    given(monkeypatch, says({"b": NO_MEMORY}))
    assert run_three(tmp_path)["first"]["status"] == "done"
    (bench,) = [part for part in parts_of(False) if part.name == "bench"]
    assert bench.left is parts._left


def test_a_part_has_the_device_and_its_log_is_named(monkeypatch, tmp_path, capsys):
    words = python("import os; print(os.environ['DYNDEPTH_TEST_DEVICE'])")
    given(monkeypatch, Part("first", "works", 0.9, 1, words))
    monkeypatch.setattr(parts, "about", lambda device: {"card": "", "code": "", "versions": ""})
    run_all(tmp_path, "cuda:1", 1.0, True, "", NAMES)
    assert (tmp_path / "first.txt").read_text() == "cuda:1\n"
    assert f"s; it writes {tmp_path / 'first.txt'}" in capsys.readouterr().out


def test_a_terminal_is_shown_the_seconds(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    given(monkeypatch, Part("first", "works", 0.9, 1, python("import time; time.sleep(1.3)")))
    run_three(tmp_path)
    assert "first: 1 of " in capsys.readouterr().err


@pytest.mark.parametrize("room", ["fitting", "bench", "gpu"])
def test_the_code_of_a_run_is_all_that_it_hangs_on(monkeypatch, room):
    from dyndepth.common import digests

    before = parts.code()
    stock = digests._placed
    monkeypatch.setattr(
        digests, "_placed", lambda places: stock([each for each in places if each != room])
    )
    digests.placed_code.cache_clear()
    after = parts.code()
    digests.placed_code.cache_clear()
    assert {key for key in before if before[key] != after[key]} == {room}


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
            "left": {
                "mask_50/decode_1/bfloat16": NO_TIME,
                "mask_75/decode_1/bfloat16": NO_TIME,
                "mask_50/decode_32x4096/bfloat16": NO_MEMORY,
            },
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
    for said in ("sweep (the embedded sweep, timed): no time", "check: graphs", "tests (",
                 f"mask_50/decode_1/bfloat16, mask_75/decode_1/bfloat16 ({NO_TIME})",
                 f"mask_50/decode_32x4096/bfloat16 ({NO_MEMORY})"):  # fmt: skip
        assert said in section(short, "Not run")
    assert "checks ran whole" in section(short, "Held")
    held = report.page(facts(speedup=0.99))
    assert "goal: all_execute/prefill_8x2048/bfloat16 speedup 0.990" in section(held, "Held")
    assert "| all_execute/prefill_8x2048/bfloat16 | 0.900 [0.900, 0.900] |" in short
    assert len(report.failures(facts())) == 2
    wide = facts(speedup=1.0)
    (measured,) = wide["bench"]["bench"].values()
    measured |= {"low": 0.7, "high": 1.3, "suspect": True, "peak_ratio": None}
    assert "1.000 [0.700, 1.300] suspect, noisy, undecided |" in report.page(wide)
    assert "noisy: the interval is wider" in section(report.page(wide), "Speed")


def test_a_small_run_names_its_own_model():
    own = {part.name: part.what for part in parts.parts(True, "")}
    assert parts.TRIAL in own["bench"]
    assert parts.MODEL not in report.page(facts(small=True) | {"bench": None})
    large = report.page(facts() | {"parts": {}})
    assert f"speed on {parts.MODEL}, eager and by graphs" in large


def test_the_pages_tell_whether_the_present_code_was_run(tmp_path):
    source = Source(tmp_path, Path("results/embedded"))
    assert "The present code has not been run on a GPU" in status_page(source)
    assert "has not been run on a GPU yet ([what" in sentence(source, {"page": "p.md"})
    folder = tmp_path / "results" / "gpu-card"
    folder.mkdir(parents=True)
    whole = facts() | {"card": "NVIDIA H200"}
    (folder / "gpu.json").write_text(json.dumps(whole))
    assert "has not been run" not in sentence(source, {"page": "p.md"})
    told = "(nothing was checked, 1 part cut off: bench, 3 parts not run: training, sweep, tests)"
    assert f"{told}; see" in sentence(source, {"page": "p.md"})
    (folder / "checks.json").write_text(json.dumps(whole["checks"]))
    assert "(1 check failed, 1 part cut off: bench, " in sentence(source, {"page": "p.md"})
    well = {name: {"status": "held", "why": ""} for name in whole["checks"]}
    done = {name: {"status": "done", "why": "", "seconds": 1.0} for name in door.PARTS}
    held = whole | {"checks": well, "parts": done}
    (folder / "checks.json").write_text(json.dumps(well))
    (folder / "gpu.json").write_text(json.dumps(held))
    assert "was run on NVIDIA H200 (all checks held); see" in sentence(source, {"page": "p.md"})
    assert "From `results/gpu-card/`.\n" in status_page(source)
    whole["code"]["timing"] = "older"
    (folder / "gpu.json").write_text(json.dumps(whole))
    assert "has not been run on a GPU yet" in sentence(source, {"page": "p.md"})
    assert "From `results/gpu-card/`. It is of older code." in status_page(source)
    (folder / "gpu.json").write_text(json.dumps(whole | {"small": True}))
    assert "results/gpu-card" not in status_page(source)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "spread"], "this command measures one device; name it in place of"),
        (["--small", "--device", "cpu", "--output_path", "/etc/passwd"], "can't be a folder"),
        (["--small", "--device", "cpu", "--output_path", "/proc/zz"], "cannot be written"),
        (["checks", "--device", "cpu", "--output_path", "/etc/passwd"], "can't be a folder"),
        (["training", "--device", "cpu", "--output_path", "/proc/zz"], "cannot be written"),
        (["checks", "--device", "cuda:99"], "device 'cuda:99' is not usable here"),
        (["checks", "--device", "spread"], "this command measures one device"),
        (["--device", "cpu"], "no GPU is here to be measured; --small --device cpu shows"),
        (["--minutes", "0"], "--minutes takes a number above 0, not '0'"),
        (["all"], "there is no gpu 'all'; say checks or training, or give flags alone"),
    ],
)
def test_wrong_inputs_fail_before_any_work(monkeypatch, capsys, words, told):
    monkeypatch.setattr(checks, "run", None)
    monkeypatch.setattr(training, "measure", None)
    monkeypatch.setattr(parts, "run_all", None)
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


def test_earlier_numbers_are_those_of_the_committed_table():
    """Each with the commit that it was measured on, and with the word that there is no interval."""
    source = Source(PACKAGE.parent, Path("results/embedded"))
    rows = source.rows("results", "gpu_before.csv")
    text = status_page(source).partition("## Earlier: ")[2]
    assert "commit b50ac88" in text.splitlines()[0]
    assert "No intervals were kept" in text
    assert not any(row["interval"] for row in rows)
    for row in rows:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| {row['work']} |")]
        assert row["figure"] in line
        assert (row["unit"] == "speedup") is ("no interval" in line)
    assert "no interval" not in status_page(Source(PACKAGE / "none", Path("results/embedded")))
