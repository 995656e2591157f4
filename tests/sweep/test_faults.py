"""Faults on purpose, in real sweeps: after each of them the same command ends with the tables of an
undisturbed run, and no cell that was whole on the disk is computed again.

``make faults`` runs them; they take minutes and print what they did at the end.
"""

from __future__ import annotations

import csv
import json
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import faulting
import pytest
import sweeping
from cells import cell
from folders import tiny_folder
from test_executors import SCORES, _children

from dyndepth.cells.store import Store
from dyndepth.common.files import cache_root
from dyndepth.sweep.driver import TRIES, _Tables
from dyndepth.verify import __main__ as door

pytestmark = pytest.mark.faults

KILLS = 50
KILLS_A_CHAIN = 6
"""So often a sweep is killed before it may come to its end."""
CELLS = 5
GRID = ("--methods", "uls,static_pruning", "--speedups", "1.3,2")
TWO = ("--executor", "processes", "--workers", "2")
RESUMES = "the same command resumes"

Whole = dict[str, tuple[bytes, int]]


@pytest.fixture(scope="module")
def figures(request) -> Iterator[Counter[str]]:
    """What the tests count; it is printed at the end."""
    counted: Counter[str] = Counter()
    began = time.monotonic()
    yield counted
    capture = request.config.pluginmanager.getplugin("capturemanager")
    with capture.global_and_fixture_disabled():
        print()
        for name, number in counted.items():
            print(f"{name}: {number:.4g}")
        print(f"seconds in all: {time.monotonic() - began:.0f}")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, figures) -> Path:
    """A folder with ``model``, ``corpus.txt``, a cache and ``calm/run``, an undisturbed run."""
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    (folder / "cache").mkdir()
    for part in ("assets", "models", "wheels"):
        if (cache_root() / part).is_dir():
            (folder / "cache" / part).symlink_to(cache_root() / part)
    calm = start(folder / "calm", folder)
    assert calm.wait() == 0, calm.err
    assert len(whole(folder / "calm/run")) == CELLS
    return folder


@pytest.fixture(scope="module")
def faulty(tmp_path_factory) -> str:
    """A folder with a distribution of methods that misbehave."""
    return str(faulting.faulty_distribution(tmp_path_factory.mktemp("faulty")))


def start(folder: Path, tiny: Path, *more: str, **options: Any) -> sweeping.Sweep:
    """A sweep into ``folder/run``, unless ``more`` says otherwise."""
    base = ("--model", str(tiny / "model"), "--corpus", str(tiny / "corpus.txt"), *GRID)
    base += ("--tasks", "quartz,last_word", "--limit", "3", "--timing", "off")
    base += ("--output_path", "run")
    options = {"DYNDEPTH_CACHE": str(tiny / "cache"), "OMP_NUM_THREADS": "1"} | options
    return sweeping.start(folder, *base, *more, **options)


def whole(run: Path) -> Whole:
    """The cells that are finished and whole on the disk: bytes and time of change by file."""
    found = {}
    for path in run.glob("cells/*.json"):
        content = path.read_bytes()
        assert json.loads(content)["format"] == 1
        if json.loads(content)["status"] == "done":
            found[path.name] = (content, path.stat().st_mtime_ns)
    return found


def unchanged(before: Whole, run: Path) -> None:
    """No cell of ``before`` was written again."""
    after = whole(run)
    again = [name for name in before if after.get(name) != before[name]]
    assert not again, f"computed twice: {again}"


def summary(run: sweeping.Sweep) -> dict[str, Any]:
    """The last line of its output."""
    found: dict[str, Any] = json.loads(run.out.splitlines()[-1])["sweep"]
    return found


def resumes(folder: Path, tiny: Path, *more: str, path: str = "run") -> sweeping.Sweep:
    """The same command comes to its end: the tables of the undisturbed run, nothing twice."""
    run = folder / path
    before = whole(run)
    last = start(folder, tiny, *more, "--output_path", path)
    assert last.wait(240) == 0, last.err
    unchanged(before, run)
    told = summary(last)
    assert (told["reused"], told["done"]) == (len(before), CELLS - len(before))
    equal(run, tiny)
    if "--shard" not in more:
        assert not [*run.glob(".writing-*"), *run.glob("cells/.writing-*")]
    return last


def equal(run: Path, tiny: Path) -> None:
    """The tables of a run are those of the undisturbed one, byte for byte."""
    assert len(whole(run)) == CELLS
    for name in SCORES:
        assert (run / name).read_bytes() == (tiny / "calm/run" / name).read_bytes(), name


def sentence(run: sweeping.Sweep, status: int) -> str:
    """The one sentence with which it ended; ``status`` is what it ended with."""
    assert run.wait() == status, run.err
    assert "Traceback" not in run.err
    said = [line for line in run.err.splitlines() if line.startswith("dyndepth.sweep: ")]
    assert said == run.err.splitlines()[-1:], run.err
    return said[0]


def failures(run: Path) -> dict[str, str]:
    """Error by method of the cells that failed."""
    cells = Store(run).all()
    return {cell.identity["method"]: cell.error for cell in cells if cell.status == "error"}


def lines(run: sweeping.Sweep) -> int:
    """Lines of progress that it has printed."""
    return sum(line.startswith("[") for line in run.out.splitlines())


def wait_for_lines(run: sweeping.Sweep, number: int) -> None:
    """Return when it has printed so many lines of progress, or has ended."""
    wait_until(run, lambda: lines(run) >= number)


def wait_until(run: sweeping.Sweep, true: Callable[[], bool]) -> None:
    """Return when ``true`` says so, or the sweep has ended."""
    until = time.monotonic() + 120
    while not true() and run.process.is_alive():
        assert time.monotonic() < until, run.out + run.err
        time.sleep(0.005)


# --- the process is killed ------------------------------------------------------------------------


def moment(log: Path) -> str:
    """What the sweep that wrote ``log`` was about when it was killed."""
    events = [line.split(" ") for line in log.read_text().splitlines()]
    recorded = sum(event == "end" and name.endswith(".json") for event, name in events)
    cut = [name for event, name in events if event == "cut"]
    if events and events[-1][0] == "begin":
        cut.append(events[-1][1])
    if any(name.endswith(".json") for name in cut):
        return "during the record of a cell"
    if cut:
        return "during the tables"
    return "after the record of a cell" if recorded else "before the first record"


def test_killed_at_random_moments(tiny, tmp_path, figures):
    draw = random.Random(20)
    kills = chain = 0
    while kills < KILLS:
        chain += 1
        folder, began = tmp_path / str(chain), kills
        run, more = folder / "run", TWO if chain % 5 == 2 else ()
        log = folder / "log"
        disk = partial(faulting.slow_disk, str(log), 0.05)
        while kills < KILLS and kills - began < KILLS_A_CHAIN and len(whole(run)) < CELLS:
            before = whole(run)
            log.parent.mkdir(exist_ok=True)
            log.write_text("")
            hit = start(folder, tiny, *more, before=disk)
            todo = CELLS - len(before)
            aim = draw.choice(("a line", "a line", "a line", ".json", ".csv"))
            if aim == "a line":
                wait_for_lines(hit, len(before) + draw.randint(1, 2 * todo))
                time.sleep(draw.choice((0.0, draw.uniform(0, 0.1), draw.uniform(0, 0.6))))
            else:
                wait_until(hit, lambda log=log, aim=aim: f"{aim}\n" in log.read_text())
                time.sleep(draw.uniform(0, 0.1))
            number = draw.choice((signal.SIGKILL, signal.SIGTERM))
            late = len(whole(run)) == CELLS
            if hit.process.is_alive():
                os.kill(hit.process.pid, number)
            else:
                late = True  # it came to its end meanwhile
            status = hit.wait()
            unchanged(before, run)
            figures["times that a whole cell was found and left as it was"] += len(before)
            figures["cells recorded by killed sweeps"] += len(whole(run)) - len(before)
            figures["cells begun by killed sweeps"] += hit.out.count(": running (")
            if status == 0:
                assert late, "the signal was swallowed"
                figures["sweeps that ended before they were hit"] += 1
                continue
            assert status == (-signal.SIGKILL if number == signal.SIGKILL else 130), hit.err
            if number == signal.SIGTERM:
                assert RESUMES in hit.err
            assert "Traceback" not in hit.err
            kills += 1
            figures[f"kills by {number.name}"] += 1
            figures[f"kills of {'two workers' if more else 'inline'}"] += 1
            figures[f"kills {moment(log)}"] += 1
        left = CELLS - len(whole(run))
        figures["times that a whole cell was found and left as it was"] += CELLS - left
        resumes(folder, tiny, *more)
        figures["cells computed by the sweeps that came to their end"] += left
        figures["sweeps brought to their end"] += 1
        shutil.rmtree(folder)
    figures["kills"] = kills
    assert kills == KILLS
    assert figures["kills during the record of a cell"] > 0
    assert figures["kills before the first record"] > 0


@pytest.mark.parametrize("executor", ["inline", "processes"])
def test_ctrl_c_ends_it_within_seconds(tiny, tmp_path, figures, executor):
    for number in (1, 2, 4):
        run = start(tmp_path, tiny, "--executor", executor)
        wait_for_lines(run, number + len(whole(tmp_path / "run")))
        before, began = whole(tmp_path / "run"), time.monotonic()
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait() == 130
        seconds = time.monotonic() - began
        name = f"most seconds from Ctrl-C to the end, {executor}"
        figures[name] = max(figures[name], seconds)
        assert seconds < 5
        assert RESUMES in run.err.splitlines()[-1]
        assert "Traceback" not in run.err
        unchanged(before, tmp_path / "run")
    resumes(tmp_path, tiny, "--executor", executor)


# --- the disk -------------------------------------------------------------------------------------


def size(run: Path) -> int:
    """Bytes of a run on a disk of pages of 4 KiB."""
    return sum(-(-path.stat().st_size // 4096) * 4096 for path in run.rglob("*") if path.is_file())


def mounted(folder: Path, *options: str) -> None:
    """Mount what ``options`` of mount(8) say at ``folder``; skips where that may not be done."""
    folder.mkdir()
    try:
        done = subprocess.run(["mount", *options, str(folder)], capture_output=True, text=True)
    except OSError as fault:
        pytest.skip(f"nothing can be mounted: {fault}")
    if done.returncode:
        pytest.skip(f"nothing can be mounted: {done.stderr.strip()}")


@pytest.mark.parametrize("share", [0.15, 0.4, 0.7, 0.95])
def test_a_disk_that_is_full(tiny, tmp_path, share):
    disk, room = tmp_path / "disk", int(share * size(tiny / "calm/run"))
    mounted(disk, "-t", "tmpfs", "-o", f"size={room}", "tmpfs")
    try:
        run = start(tmp_path, tiny, "--output_path", "disk/run")
        said = sentence(run, 1)
        assert f"No space left on device); what was finished is kept, and {RESUMES}" in said
        assert len(whole(disk / "run")) < CELLS or share > 0.5
        assert not [*disk.rglob(".writing-*")]
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        resumes(tmp_path, tiny, path="disk/run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_files_that_may_not_grow(tiny, tmp_path):
    pytest.importorskip("resource")
    sizes = [path.stat().st_size for path in (tiny / "calm/run/cells").iterdir()]
    for most in (min(sizes) - 1, max(sizes) - 1):
        run = start(tmp_path, tiny, before=partial(faulting.small_files, most))
        assert f"File too large); what was finished is kept, and {RESUMES}" in sentence(run, 1)
        assert len(whole(tmp_path / "run")) < CELLS
        assert not [*tmp_path.rglob(".writing-*")]
    resumes(tmp_path, tiny)


@pytest.mark.parametrize("path", ["/proc/dyndepth/run", "/sys/dyndepth/run"])
def test_a_path_where_nothing_can_be_written(tiny, tmp_path, path):
    run = start(tmp_path, tiny, "--output_path", path)
    said = sentence(run, 2)
    assert path in said or "output_path" in said
    assert not Path(path).exists()


def test_a_run_on_a_disk_that_was_made_read_only(tiny, tmp_path):
    disk = tmp_path / "disk"
    mounted(disk, "-t", "tmpfs", "tmpfs")
    try:
        run = start(tmp_path, tiny, "--output_path", "disk/run")
        run.wait_for("[3/5]")
        os.kill(run.process.pid, signal.SIGKILL)
        run.wait()
        before = whole(disk / "run")
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        run = start(tmp_path, tiny, "--output_path", "disk/run")
        assert "disk/run" in sentence(run, 2)
        unchanged(before, disk / "run")
        subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
        resumes(tmp_path, tiny, path="disk/run")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


# --- the files of cells ---------------------------------------------------------------------------


def test_spoilt_cells_are_computed_again(tiny, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny / "calm/run", run)
    paths = sorted(run.glob("cells/*.json"))
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[: len(content) // 2])
    paths[1].write_bytes(random.Random(0).randbytes(3000))
    for path, change in ((paths[2], ("identity", "seed")), (paths[3], ("format",))):
        body = json.loads(path.read_text())
        place = body
        for key in change[:-1]:
            place = place[key]
        place[change[-1]] += 1
        path.write_text(json.dumps(body))
    sound = {paths[4].name: (paths[4].read_bytes(), paths[4].stat().st_mtime_ns)}
    resumed = start(tmp_path, tiny)
    assert resumed.wait() == 0, resumed.err
    assert (summary(resumed)["reused"], summary(resumed)["done"]) == (1, 4)
    warnings = [line for line in resumed.err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 4
    for path, line, why in zip(
        paths, sorted(warnings), ("", "", "does not match its hash", "format 2"), strict=False
    ):
        assert path.name in line
        assert "counts as absent" in line
        assert why in line
    unchanged(sound, run)
    equal(run, tiny)


def test_a_value_changed_by_hand_is_found_by_verification_alone(tiny, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(tiny / "calm/run", run)
    assert door.main([str(run), "--only_stored"]) == 0
    path = sorted(run.glob("cells/*.json"))[2]
    body = json.loads(path.read_text())
    body["accuracy"][0]["value"] += 0.25
    path.write_text(json.dumps(body))
    before = whole(run)
    again = start(tmp_path, tiny)
    assert again.wait() == 0, again.err
    assert summary(again)["reused"] == CELLS
    unchanged(before, run)
    capsys.readouterr()
    assert door.main([str(run), "--only_stored"]) == 1
    assert body["cell"] in capsys.readouterr().out
    path.unlink()
    resumes(tmp_path, tiny)


def test_times_of_files_are_no_matter(tiny, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(tiny / "calm/run", run)
    paths = sorted(run.glob("cells/*.json"))
    paths[0].unlink()
    for path, when in zip([*paths[1:], run / "accuracy.csv"], (0, 4e9, 1, 5e9, 6e9), strict=True):
        os.utime(path, (when, when))
    resumes(tmp_path, tiny)


# --- several sweeps at once -----------------------------------------------------------------------


def test_a_second_sweep_is_refused_and_the_first_undisturbed(tiny, tmp_path):
    path = str(tmp_path / "run")
    disk = partial(faulting.slow_disk, str(tmp_path / "log"), 0.2)
    first = start(tmp_path / "first", tiny, "--output_path", path, before=disk)
    first.wait_for("[1/5]")
    for more in ((), ("--shard", "1/2")):
        second = start(tmp_path / "second", tiny, "--output_path", path, *more)
        assert "another sweep is writing to" in sentence(second, 2)
        assert first.process.is_alive()
    assert first.wait() == 0, first.err
    equal(tmp_path / "run", tiny)


def test_of_two_that_start_together_one_is_refused(tiny, tmp_path):
    path = str(tmp_path / "run")
    disk = partial(faulting.slow_disk, str(tmp_path / "log"), 0.2)
    tmp_path.joinpath("log").touch()
    runs = [start(tmp_path / n, tiny, "--output_path", path, before=disk) for n in "ab"]
    statuses = {run.wait(): run for run in runs}
    assert sorted(statuses) == [0, 2]
    assert "another sweep is writing to" in sentence(statuses[2], 2)
    equal(tmp_path / "run", tiny)


def test_a_killed_shard_resumes_beside_the_other(tiny, tmp_path):
    path = str(tmp_path / "run")
    disk = partial(faulting.slow_disk, str(tmp_path / "log"), 0.05)
    one, two = (("--shard", f"{which}/2", "--output_path", path) for which in (1, 2))
    killed = start(tmp_path / "one", tiny, *one, before=disk)
    other = start(tmp_path / "two", tiny, *two, before=disk)
    killed.wait_for("[2/3]")
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.wait()
    before = whole(tmp_path / "run")
    again = start(tmp_path / "one", tiny, *one, before=disk)
    assert [again.wait(), other.wait()] == [0, 0], again.err + other.err
    unchanged(before, tmp_path / "run")
    equal(tmp_path / "run", tiny)
    # The whole sweep finds nothing to do, and clears away what the killed shard left.
    resumes(tmp_path, tiny)


def test_tables_of_a_shard_that_had_to_wait_hold_what_the_other_wrote(tmp_path):
    store = Store(tmp_path, (1, 2))
    store.write(cell())
    _Tables(store).write()  # What it imports is then here, and the thread reads at once.
    waiting = threading.Thread(target=_Tables(store).write)
    with store.tables():
        waiting.start()
        time.sleep(0.3)
        late = Store(tmp_path, (2, 2)).write(cell(method="late"))
    waiting.join(30)
    assert late.key in (tmp_path / "accuracy.csv").read_text()


# --- workers and methods --------------------------------------------------------------------------


def test_workers_killed_at_random_moments(tiny, tmp_path, figures):
    draw = random.Random(3)
    for chain in range(3):
        folder = tmp_path / str(chain)
        run = start(folder, tiny, *TWO)
        for number in sorted(draw.sample(range(1, 2 * CELLS - 1), 2)):
            wait_for_lines(run, number)
            time.sleep(draw.uniform(0, 0.3))
            victims = _children(run.process.pid)
            if victims:
                os.kill(draw.choice(victims), signal.SIGKILL)
                figures["workers killed"] += 1
        assert run.wait(240) == 0, run.out + run.err
        equal(folder / "run", tiny)
    assert figures["workers killed"] >= 3


BAD = {
    "raising": "LookupError: no such layer (",
    "misshapen": "misshapen: a gate must be a bool, or a bool tensor [batch, tokens]",
    "misplanned": "misplanned: a plan must be bool [layers, 2]",
    "not_a_number": "not_a_number: a gate must be a bool, or a bool tensor",
    "hanging": "given up after {} s (--cell_timeout)",
}
WORSE = {
    "deaf": "given up after {} s (--cell_timeout)",
    "deadly": f"its worker process ended by exit status 3, {TRIES} times",
}
"""These leave their process no way out, so it has to be a worker."""


@pytest.mark.parametrize(
    ("executor", "bad", "limit"), [("inline", BAD, 6), ("processes", BAD | WORSE, 20)]
)
def test_methods_that_misbehave(tiny, tmp_path, faulty, executor, bad, limit):
    methods = ["uls", *bad, "static_pruning"]
    more = ["--methods", ",".join(methods), "--speedups", "2", "--cell_timeout", str(limit)]
    more += ["--executor", executor]
    before = partial(
        faulting.both,
        partial(faulting.with_distribution, faulty),
        partial(faulting.short_grace, 20),
    )
    run = start(tmp_path, tiny, *more, before=before)
    assert run.wait(360) == 1, run.err
    told = summary(run)
    assert (told["done"], told["failed"]) == (3, len(bad))
    found = failures(tmp_path / "run")
    assert found.keys() == bad.keys()
    for method, says in bad.items():
        assert says.format(limit) in found[method]
        assert "\n" not in found[method]
        assert f"{method} at 2x, seed 0: failed: {found[method]}" in run.err
    assert "Traceback" not in run.err
    kept = whole(tmp_path / "run")
    again = start(tmp_path, tiny, *more, "--resume", "always", before=before)
    assert again.wait() == 1, again.err
    assert summary(again)["reused"] == 3
    unchanged(kept, tmp_path / "run")
    for name in ("accuracy.csv", "compute.csv"):
        rows = by_method(tmp_path / "run" / name)
        calm = [
            row for row in by_method(tiny / "calm/run" / name) if row["target_speedup"] != "1.3"
        ]
        assert [row for row in rows if row["method"] not in bad] == calm


def by_method(path: Path) -> list[dict[str, str]]:
    """Rows of a table."""
    with path.open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("task", ["quartz", "title_generation"])
def test_a_model_of_which_a_weight_is_no_number(tiny, tmp_path, task):
    import torch
    from transformers import AutoModelForCausalLM

    broken = tmp_path / "broken"
    shutil.copytree(tiny / "model", broken)
    model = AutoModelForCausalLM.from_pretrained(broken)
    with torch.no_grad():
        model.lm_head.weight[5, 3] = float("nan")
    model.save_pretrained(broken)
    run = start(tmp_path, tiny, "--model", str(broken), "--methods", "uls", "--tasks", task)
    assert run.wait() == 1, run.out
    assert summary(run)["done"] == 0
    assert run.err.count(": failed: ") == summary(run)["failed"] == 3
    for error in failures(tmp_path / "run").values():
        assert "not a number" in error
    for row in by_method(tmp_path / "run/leaderboard.csv"):
        assert row["status"] == "error"
        assert not row["mean_acc"]
        assert not row.get("rougeL")


# --- clocks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [1, 2])
def test_clocks_that_jump(tiny, tmp_path, seed):
    run = start(tmp_path, tiny, before=partial(faulting.jumping_clock, seed))
    run.wait_for("[3/5]")
    os.kill(run.process.pid, signal.SIGKILL)
    run.wait()
    before = whole(tmp_path / "run")
    run = start(tmp_path, tiny, before=partial(faulting.jumping_clock, seed + 10))
    assert run.wait() == 0, run.err
    unchanged(before, tmp_path / "run")
    equal(tmp_path / "run", tiny)


def test_a_wall_clock_set_forward_ends_no_cell(tiny, tmp_path):
    """Time limits are of seconds that passed, not of what the wall clock shows."""
    more, flag = (*TWO, "--cell_timeout", "60"), tmp_path / "flag"
    run = start(
        tmp_path, tiny, *more, before=partial(faulting.wall_clock_set_forward, 1e6, str(flag))
    )
    run.wait_for(": running (")
    flag.touch()
    assert run.wait(240) == 0, run.err
    equal(tmp_path / "run", tiny)
