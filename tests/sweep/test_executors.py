"""Executors: the same tables wherever cells are computed; workers that die, hang or lack memory."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import sweeping
from cells import FakeBench, identity
from folders import tiny_folder

from dyndepth.cells.cell import Cell, CellSpec
from dyndepth.cells.mirror import mirrored
from dyndepth.cells.store import Store
from dyndepth.results.tables import NAMES
from dyndepth.sweep.driver import TRIES, Driver
from dyndepth.sweep.executors import Inline, WorkerDied, shares
from dyndepth.sweep.progress.people import Lines
from dyndepth.sweep.settings import Settings
from dyndepth.sweep.worker import TimeIsUp, Work, Worker, deadline

GRID = ("--methods", "uls,static_pruning", "--speedups", "1.3,2")
SCORES = tuple(name for name in NAMES if name != "timing.csv")
CELLS = [CellSpec("dense"), CellSpec("a", 1.5), CellSpec("b", 2.0), CellSpec("c", 2.0)]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A folder with ``model``, ``corpus.txt`` and ``inline``, an undisturbed run without times."""
    folder = tiny_folder(tmp_path_factory.mktemp("tiny"))
    run = _start(folder, folder, "--output_path", "inline")
    assert run.wait() == 0, run.err
    return folder


def _start(folder: Path, tiny: Path, *more: str) -> sweeping.Sweep:
    base = ("--model", str(tiny / "model"), "--corpus", str(tiny / "corpus.txt"), *GRID)
    base += ("--tasks", "quartz,last_word", "--limit", "3", "--timing", "off")
    cache = {"DYNDEPTH_CACHE": os.environ.get("DYNDEPTH_CACHE", "")}
    return sweeping.start(
        folder, *base, *more, OMP_NUM_THREADS="1", **{k: v for k, v in cache.items() if v}
    )


def _summary(run: sweeping.Sweep) -> dict[str, Any]:
    return json.loads(run.out.splitlines()[-1])["sweep"]


def _equal(one: Path, other: Path, names: tuple[str, ...] = SCORES) -> None:
    for name in names:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name


class TestProcesses:
    def test_tables_are_those_of_inline(self, tiny, tmp_path):
        run = _start(tmp_path, tiny, "--executor", "processes", "--workers", "2")
        assert run.wait() == 0, run.err
        folder = Path(_summary(run)["output_path"])
        _equal(tmp_path / folder, tiny / "inline")
        # Both workers had work, and their bars stayed out of the lines.
        assert "worker 1" in run.out
        assert "worker 2" in run.out
        assert "it/s" not in run.err

    def test_times_come_last_and_alone(self, tiny, tmp_path):
        more = (
            "--executor",
            "processes",
            "--workers",
            "2",
            "--timing",
            "quick",
            "--methods",
            "uls",
        )
        run = _start(tmp_path, tiny, *more, "--output_path", "timed")
        assert run.wait() == 0, run.err
        lines = [line for line in run.out.splitlines() if line.startswith("[")]
        first = next(number for number, line in enumerate(lines) if ": timing (" in line)
        assert not [line for line in lines[first:] if ": running (" in line]
        timed = lines[first:]
        # One after the other: each begins when the one before has ended.
        assert [": timing (" in line for line in timed[:6]] == [True, False] * 3
        assert (tmp_path / "timed" / "timing.csv").read_text().count("\n") > 3

    def test_a_killed_worker_costs_one_cell_one_more_try(self, tiny, tmp_path):
        more = ("--executor", "processes", "--workers", "2", "--output_path", "run")
        run = _start(tmp_path, tiny, *more)
        run.wait_for("[2/5]")
        victims = _children(run.process.pid)
        os.kill(victims[0], signal.SIGKILL)
        assert run.wait() == 0, run.err
        _equal(tmp_path / "run", tiny / "inline")

    def test_workers_end_with_their_sweep(self, tiny, tmp_path):
        run = _start(tmp_path, tiny, "--executor", "processes", "--output_path", "run")
        run.wait_for("[1/5]")
        workers = _children(run.process.pid)
        assert workers
        os.kill(run.process.pid, signal.SIGKILL)
        run.wait()
        until = time.monotonic() + 20
        while any(map(_alive, workers)):
            assert time.monotonic() < until
            time.sleep(0.1)

    def test_interrupt_ends_it_soon(self, tiny, tmp_path):
        run = _start(tmp_path, tiny, "--executor", "processes", "--output_path", "run")
        run.wait_for("[1/5]")
        os.kill(run.process.pid, signal.SIGINT)
        assert run.wait() == 130
        assert len(list((tmp_path / "run" / "cells").glob("*.json"))) < 5
        assert "the same command resumes" in run.err

    def test_a_model_that_cannot_be_loaded_is_one_sentence(self, tiny, tmp_path):
        broken = tmp_path / "broken"
        broken.mkdir()
        for file in (tiny / "model").iterdir():
            (broken / file.name).write_bytes(file.read_bytes())
        (broken / "model.safetensors").write_bytes(b"nothing")
        run = _start(tmp_path, tiny, "--executor", "processes", "--model", str(broken))
        assert run.wait() == 2
        assert "can't be loaded" in run.err.splitlines()[-1]
        assert "Traceback" not in run.err


def _children(process: int) -> list[int]:
    """Worker processes of a sweep; the resource tracker is none."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
            command = (entry / "cmdline").read_text()
        except OSError:
            continue
        if int(stat[1]) == process and "spawn_main" in command:
            found.append(int(entry.name))
    return found


def _alive(process: int) -> bool:
    try:
        return (Path("/proc") / str(process) / "stat").read_text().rpartition(")")[2].split()[
            0
        ] != "Z"
    except OSError:
        return False


class TestShards:
    def test_shards_together_are_the_whole(self, tiny, tmp_path):
        runs = [
            _start(tmp_path / str(which), tiny, "--shard", f"{which}/2", "--output_path", "../run")
            for which in (1, 2)
        ]
        assert [run.wait() for run in runs] == [0, 0], [run.err for run in runs]
        assert sorted(_summary(run)["cells"] for run in runs) == [2, 3]
        _equal(tmp_path / "run", tiny / "inline")

    def test_a_whole_sweep_and_a_shard_exclude_each_other(self, tmp_path):
        from dyndepth.common.errors import UserError

        whole, first = Store(tmp_path), Store(tmp_path, (1, 2))
        second, other = Store(tmp_path, (2, 2)), Store(tmp_path, (1, 3))
        with first.locked(), second.locked():
            for store in (whole, other, Store(tmp_path, (1, 2))):
                with pytest.raises(UserError, match="another sweep"):
                    store.check_free()
                with pytest.raises(UserError, match="another sweep"), store.locked():
                    pass
        with whole.locked(), pytest.raises(UserError, match="another sweep"), first.locked():
            pass
        with whole.locked():
            pass


class Fragile(Inline):
    """An executor whose worker dies over a method, so many times."""

    slots = 2

    def __init__(self, bench: FakeBench, settings: Settings, deaths: dict[str, int]) -> None:
        super().__init__(lambda: Worker(bench, settings))
        self.deaths = deaths

    def submit(self, work: Work) -> Future[Cell]:
        if self.deaths.get(work.plan.method, 0):
            self.deaths[work.plan.method] -= 1
            done: Future[Cell] = Future()
            done.set_exception(WorkerDied("its worker process ended by signal 9"))
            return done
        return super().submit(work)


def _drive(executor: Inline, bench: FakeBench, settings: Settings) -> Driver:
    executor.start()
    listener = Lines()
    listener.start(len(CELLS), settings)
    store = Store(settings.output_path)
    driver = Driver(CELLS, executor, store, settings, listener, bench.identity)
    driver.run()
    return driver


class TestDriver:
    @pytest.mark.parametrize(("deaths", "failed"), [(1, 0), (TRIES - 1, 0), (TRIES, 1)])
    def test_a_cell_whose_worker_dies_is_tried_again(self, tmp_path, capsys, deaths, failed):
        settings = Settings(output_path=tmp_path, timing="off")
        bench = FakeBench()
        driver = _drive(Fragile(bench, settings, {"a": deaths}), bench, settings)
        assert (driver.tally.done, driver.tally.failed) == (len(CELLS) - failed, failed)
        said = capsys.readouterr().err
        assert said.count("trying again") == min(deaths, TRIES - 1)
        if failed:
            (cell,) = [c for c in Store(tmp_path).all() if c.status == "error"]
            assert cell.error == f"its worker process ended by signal 9, {TRIES} times"

    def test_a_worker_with_other_code_computes_nothing(self, tmp_path):
        settings = Settings(output_path=tmp_path, timing="off")
        bench = FakeBench()
        cell = Worker(bench, settings).do(Work(CELLS[1], identity(method="a", harness_code="old")))
        assert (cell.status, bench.calls) == ("error", [])
        assert "another harness_code" in cell.error

    def test_a_cell_that_hangs_is_given_up(self, tmp_path):
        # A second, of which the other cells need little on any machine.
        settings = Settings(output_path=tmp_path, timing="off", cell_timeout=1.0)
        bench = FakeBench()
        evaluate = bench.evaluate

        def slow(plan: CellSpec) -> Any:
            while plan.method == "a":
                try:
                    time.sleep(0.01)
                except Exception:  # noqa: BLE001, S112 - what survives everything must end too
                    continue
            return evaluate(plan)

        bench.evaluate = slow
        driver = _drive(Inline(lambda: Worker(bench, settings)), bench, settings)
        assert (driver.tally.done, driver.tally.failed) == (3, 1)
        (cell,) = [c for c in Store(tmp_path).all() if c.status == "error"]
        assert cell.error == "given up after 1 s (--cell_timeout)"

    def test_a_full_disk_ends_the_run_with_a_sentence(self, tmp_path, monkeypatch):
        from dyndepth.cells import store as stores
        from dyndepth.common.errors import RunFailed

        def full(path: Path, data: Any) -> None:
            raise OSError(28, "No space left on device")

        settings = Settings(output_path=tmp_path, timing="off")
        bench = FakeBench()
        monkeypatch.setattr(stores, "write_atomically", full)
        with pytest.raises(RunFailed, match="No space left on device.*the same command resumes"):
            _drive(Inline(lambda: Worker(bench, settings)), bench, settings)


def _spin(seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        time.sleep(0.001)


class TestDeadline:
    def test_ends_python_code_and_restores_the_handler(self):
        before = signal.getsignal(signal.SIGALRM)
        with pytest.raises(TimeIsUp), deadline(0.05):
            _spin(10)
        assert signal.getsignal(signal.SIGALRM) is before
        with deadline(0.3):
            pass
        time.sleep(0.4)

    def test_none_is_no_limit(self):
        with deadline(None):
            time.sleep(0.01)


def test_shares_of_the_cores():
    cores = len(os.sched_getaffinity(0))
    settings = Settings(device="cpu")
    assert shares(settings, 9, 0) == (min(2, cores), max(1, cores // min(2, cores)))
    assert shares(Settings(workers=3), 9, 0) == (3, max(1, cores // 3))
    assert shares(Settings(workers=8), 2, 0)[0] == 2
    assert shares(Settings(), 9, 4)[0] == 4
    assert shares(Settings(cpus_per_cell=1), 9, 0) == (cores, 1)


def test_memory_that_runs_out_halves_the_batch_and_leaves_the_scores(tiny):
    import torch

    from dyndepth.sweep import settings as options
    from dyndepth.sweep.workbench import Workbench

    settings = options.settings(
        {
            "model": str(tiny / "model"),
            "corpus": str(tiny / "corpus.txt"),
            "tasks": ["quartz"],
            "limit": 8,
            "timing": "off",
        }
    )
    bench = Workbench(settings, {"quartz": 8})
    plan = CellSpec("dense")
    sizes: list[tuple[int, ...]] = []
    room = 10**9

    def narrow(module: Any, inputs: tuple[Any, ...]) -> None:
        sizes.append(tuple(inputs[0].shape))
        if inputs[0].numel() > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    bench.model.get_input_embeddings().register_forward_pre_hook(narrow)
    calm = bench.evaluate(plan)
    assert bench.provenance(plan)["batch_size_used"] == 32
    # Room for the longest document, but not for all at once.
    room = max(length for _, length in sizes)
    assert room < max(rows * length for rows, length in sizes)
    again = bench.evaluate(plan)
    assert bench.provenance(plan)["batch_size_used"] < 32
    assert [row["value"] for row in again.accuracy] == [row["value"] for row in calm.accuracy]
    for one, other in zip(calm.samples, again.samples, strict=True):
        assert json.loads(one["outcomes"]) == pytest.approx(json.loads(other["outcomes"]), abs=1e-4)


def test_a_model_laid_out_by_accelerate_scores_the_same(tiny, tmp_path):
    run = _start(tmp_path, tiny, "--device", "spread", "--output_path", "run")
    assert run.wait() == 0, run.err
    _equal(tmp_path / "run", tiny / "inline")


class TestMirror:
    def test_a_run_behind_a_url_is_resumed_from_another_machine(self, tiny, tmp_path):
        url = f"file://{tmp_path}/far/run"
        first = _start(tmp_path, tiny, "--output_path", url, "--shard", "1/2")
        assert first.wait() == 0, first.err
        assert len(list((tmp_path / "far/run/cells").glob("*.json"))) == 3
        # Another machine knows the fits, but has no copy of the run.
        shutil.rmtree(mirrored(url))
        second = _start(tmp_path, tiny, "--output_path", url)
        assert second.wait() == 0, second.err
        assert (_summary(second)["reused"], _summary(second)["done"]) == (3, 2)
        _equal(tmp_path / "far/run", tiny / "inline")
        assert not list((tmp_path / "far/run").rglob("*.writing"))

    def test_no_such_protocol_is_one_sentence(self, tiny, tmp_path):
        run = _start(tmp_path, tiny, "--output_path", "gopher://hole/run")
        assert run.wait() == 2
        assert "--output_path gopher://hole/run cannot be used" in run.err
        assert run.err.count("\n") == 1
