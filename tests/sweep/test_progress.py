"""What a sweep says while it runs: lines, the live view, JSON, and the time left."""

from __future__ import annotations

import io
import json
import os
import re
import sys
from dataclasses import fields
from datetime import datetime
from types import SimpleNamespace

import cells
import pytest
from rich.console import Console

from dyndepth.cells.cell import readable_name
from dyndepth.common.errors import UserError
from dyndepth.sweep.progress import json_log
from dyndepth.sweep.progress.choice import Several, listener_for
from dyndepth.sweep.progress.interface import Job, Listener
from dyndepth.sweep.progress.json_log import JsonLog
from dyndepth.sweep.progress.people import Countdown, Lines, Live, in_words
from dyndepth.sweep.settings import Settings

ESCAPE = "\x1b"
DONE = cells.cell(phases="both")
KEPT = cells.cell(seed=1)
FAILED = cells.cell(seed=2)
FAILED.status, FAILED.error, FAILED.traceback = "error", "ValueError: no such layer", "Traceback: x"


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only when a test says so."""
    now = SimpleNamespace(seconds=0.0)
    monkeypatch.setattr(Countdown.__init__, "__defaults__", (False, lambda: now.seconds))
    return now


def play(
    listener: Listener, clock=None, settings: Settings | None = None, worker: str = ""
) -> None:
    """One kept cell, one that is done after 34 s, one that fails after 3, one that runs."""
    clock = clock or SimpleNamespace(seconds=0.0)
    a, b, c, d = (
        Job(index, f"method(x=[{index}]) at 1.5x", worker=worker) for index in range(1, 5)
    )
    listener.start(5, settings or Settings(timing="off"))
    listener.kept(a, KEPT)
    listener.began(b)
    clock.seconds += 34
    listener.ended(b, DONE, 34.0)
    listener.began(c)
    clock.seconds += 3
    listener.ended(c, FAILED, 3.0)
    listener.note("a worker died; its cell is tried again", "warning")
    listener.note("two workers")
    listener.began(d)


class Recorder(Listener):
    """Writes down what it is told, under its name, into a list that several may share."""

    def __init__(self, name: str, told: list[str], refuses: bool = False) -> None:
        self.name, self.told, self.refuses = name, told, refuses

    def start(self, total, settings):
        if self.refuses:
            raise UserError("no")
        self.told.append(f"{self.name} start {total}")

    def kept(self, job, cell):
        self.told.append(f"{self.name} kept {job.index}")

    def began(self, job):
        self.told.append(f"{self.name} began {job.index}")

    def scored(self, job, cell, seconds):
        self.told.append(f"{self.name} scored {job.index} {seconds}")

    def ended(self, job, cell, seconds):
        self.told.append(f"{self.name} ended {job.index} {cell.status} {seconds}")

    def note(self, text, level="info"):
        self.told.append(f"{self.name} {level}: {text}")

    def close(self, summary):
        self.told.append(f"{self.name} close {summary}")
        if self.refuses:
            raise RuntimeError("stuck")


class TestLines:
    def test_text(self, clock, capsys):
        lines = Lines()
        play(lines, clock)
        lines.close({})
        said = capsys.readouterr()
        assert said.out.splitlines() == [
            "[1/5] method(x=[1]) at 1.5x: kept (done)",
            "[2/5] method(x=[2]) at 1.5x: running (0 s)",
            "[2/5] method(x=[2]) at 1.5x: done in 34 s; about 2 min left",
            "[3/5] method(x=[3]) at 1.5x: running (34 s)",
            "[3/5] method(x=[3]) at 1.5x: failed after 3 s; about 68 s left",
            "two workers",
            "[4/5] method(x=[4]) at 1.5x: running (37 s)",
        ]
        assert said.err.splitlines() == [
            "[3/5] method(x=[3]) at 1.5x: failed: ValueError: no such layer",
            f"  its traceback is in cells/{readable_name(FAILED.identity)}-{FAILED.key}.json of "
            "the output path; --debug prints it",
            "warning: a worker died; its cell is tried again",
        ]
        assert ESCAPE not in said.out + said.err

    def test_debug_shows_the_traceback(self, capsys):
        play(Lines(), settings=Settings(timing="off", debug=True))
        assert "failed: ValueError: no such layer\nTraceback: x\n" in capsys.readouterr().err

    def test_workers_are_named(self, clock, capsys):
        play(Lines(), clock, worker="worker 2")
        assert "running (34 s, worker 2)\n" in capsys.readouterr().out

    def test_nothing_is_left_after_the_last(self, clock, capsys):
        lines = Lines()
        lines.start(1, Settings(timing="off"))
        lines.began(Job(1, "one"))
        lines.ended(Job(1, "one"), DONE, 5.0)
        assert capsys.readouterr().out.splitlines()[1:] == ["[1/1] one: done in 5 s"]

    def test_scored_first_and_timed_later(self, clock, capsys):
        lines = Lines()
        lines.start(2, Settings())
        for what, tell, seconds in (
            ("running", lines.scored, 20.0),
            ("timing", lines.ended, 25.0),
        ):
            lines.began(Job(1, "one", what))
            clock.seconds = seconds
            tell(Job(1, "one", what), DONE, seconds)
        assert capsys.readouterr().out.splitlines() == [
            "[1/2] one: running (0 s)",
            "[1/2] one: scored in 20 s",
            "[1/2] one: timing (20 s)",
            "[1/2] one: done in 25 s; about 25 s left",
        ]


class TestTimeLeft:
    def _turn(self, count, clock, index, seconds, what="running", then="end", cell=DONE):
        """One turn that no other runs beside."""
        count.begin(Job(index, "x", what))
        clock.seconds += seconds
        count.score(Job(index, "x", what)) if then == "score" else count.end(Job(index, "x"), cell)

    def test_unknown_until_a_cell_is_done(self, clock):
        count = Countdown(4)
        assert count.left() is None
        count.kept += 1
        self._turn(count, clock, 2, 1.0, cell=FAILED)
        assert count.left() is None
        assert count.left_in_words() == ""

    def test_kept_and_failed_cells_do_not_count_as_fast_ones(self, clock):
        count = Countdown(10)
        count.kept += 4
        self._turn(count, clock, 5, 10.0)
        self._turn(count, clock, 6, 30.0)
        self._turn(count, clock, 7, 0.5, cell=FAILED)
        assert count.left() == pytest.approx(3 * 20)

    def test_what_runs_is_partly_over(self, clock):
        count = Countdown(3)
        self._turn(count, clock, 1, 20.0)
        count.begin(Job(2, "x"))
        clock.seconds += 15
        assert count.left() == pytest.approx(5 + 20)
        clock.seconds += 100
        assert count.left() == pytest.approx(20)

    def test_divided_by_how_many_ran_at_once(self, clock):
        count = Countdown(13)
        for index in range(1, 5):
            count.begin(Job(index, "x", worker=f"{index}"))
        clock.seconds += 8
        count.end(Job(1, "x"), DONE)
        # 9 wait, 3 are about to end, 4 at once.
        assert count.left() == pytest.approx(9 * 8 / 4)

    def test_fewer_cells_than_workers(self, clock):
        count = Countdown(5)
        for index in range(1, 5):
            count.begin(Job(index, "x"))
        clock.seconds += 8
        for index in range(1, 5):
            count.end(Job(index, "x"), DONE)
        assert count.left() == pytest.approx(8)

    def test_a_cell_that_begins_again_runs_once(self, clock):
        count = Countdown(2)
        count.begin(Job(1, "x", worker="a"))
        clock.seconds += 50
        count.begin(Job(1, "x", worker="b"))
        assert [job.worker for job, _ in count.running.values()] == ["b"]
        clock.seconds += 6
        count.end(Job(1, "x", worker="b"), DONE)
        assert count.left() == pytest.approx(6)

    def test_one_worker_times_each_cell_when_it_is_scored(self, clock):
        count = Countdown(3, timed=True)
        self._turn(count, clock, 1, 10.0, then="score")
        assert count.left_in_words() == ""
        self._turn(count, clock, 1, 4.0, what="timing")
        assert count.left() == pytest.approx(2 * (10 + 4))
        self._turn(count, clock, 2, 10.0, then="score")
        assert count.left() == pytest.approx(4 + 10 + 4)
        assert count.share == pytest.approx(3 / 6)

    def test_several_workers_time_last_and_one_by_one(self, clock):
        count = Countdown(4, timed=True)
        for index in (1, 2):
            count.begin(Job(index, "x"))
        clock.seconds += 10
        count.score(Job(1, "x"))
        count.score(Job(2, "x"))
        assert count.left_in_words() == "about 10 s left, then timing"
        for index in (3, 4):
            count.begin(Job(index, "x"))
        clock.seconds += 10
        count.score(Job(3, "x"))
        count.score(Job(4, "x"))
        assert count.left_in_words() == ""
        assert count.share == pytest.approx(4 / 8)
        self._turn(count, clock, 1, 5.0, what="timing")
        assert count.left_in_words() == "about 15 s left"

    def test_a_cell_that_an_earlier_run_scored_is_only_timed(self, clock):
        count = Countdown(2, timed=True)
        self._turn(count, clock, 1, 5.0, what="timing")
        count.begin(Job(2, "x", "timing"))
        assert count.left() == pytest.approx(5)

    @pytest.mark.parametrize(
        ("seconds", "text"),
        [(0.2, "0 s"), (99.4, "99 s"), (99.6, "2 min"), (5900, "98 min"), (7500, "2 h 5 min")],
    )
    def test_in_words(self, seconds, text):
        assert in_words(seconds) == text


class TestLive:
    @pytest.fixture(autouse=True)
    def terminal(self, monkeypatch):
        """One that has colours and moves its cursor, whatever this one is."""
        monkeypatch.setenv("TERM", "xterm")
        monkeypatch.delenv("NO_COLOR", raising=False)

    def _console(self, width=100):
        return Console(file=io.StringIO(), record=True, force_terminal=True, width=width)

    def test_view(self, clock):
        console = self._console()
        live = Live(console)
        play(live, clock, worker="worker 2")
        clock.seconds += 5
        live.close({})
        above = console.export_text()
        console.print(live.view())
        view = [line.rstrip() for line in console.export_text().splitlines()]
        bar = "━" * 20
        assert re.sub("[╸╺]", "━", view[0]) == (
            f"3 of 5 cells {bar} 1 done, 1 failed, 1 kept, about 63 s left"
        )
        assert view[1:] == ["[4/5] method(x=[4]) at 1.5x  running  5 s  worker 2"]
        assert "[3/5] method(x=[3]) at 1.5x: failed: ValueError: no such layer\n" in above
        assert "warning: a worker died; its cell is tried again\n" in above
        assert "two workers\n" in above

    def test_cells_that_wait_for_being_timed(self, clock):
        console = self._console()
        live = Live(console)
        live.start(4, Settings())
        for index in (1, 2):
            live.began(Job(index, "x", worker=f"worker {index}"))
        clock.seconds += 10
        live.scored(Job(1, "x"), DONE, 10.0)
        live.close({})
        console.export_text()
        console.print(live.view())
        head, row = (line.rstrip() for line in console.export_text().splitlines())
        assert head.startswith("0 of 4 cells ")
        assert head.endswith(" 1 scored, 0 done, 0 failed, 0 kept, about 10 s left, then timing")
        assert row == "[2/4] x  running  10 s  worker 2"

    def test_debug_shows_the_traceback(self, clock):
        console = self._console()
        live = Live(console)
        play(live, clock, Settings(timing="off", debug=True))
        live.close({})
        assert "no such layer\nTraceback: x\n" in console.export_text()

    def test_a_long_failure_is_not_folded(self, clock):
        console = self._console(width=30)
        live = Live(console)
        play(live, clock)
        live.close({})
        assert "method(x=[3]) at 1.5x: failed: ValueError: no such layer\n" in console.export_text()

    def test_close_gives_the_terminal_back(self, clock, monkeypatch):
        monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: True))
        before = (sys.stdout, sys.stderr)
        console = self._console()
        live = Live(console)
        live.start(3, Settings())
        assert sys.stdout is not before[0]
        live.close({})
        assert (sys.stdout, sys.stderr) == before
        shown = console.file.getvalue()
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")

    def test_what_goes_to_a_file_goes_there_still(self, clock, monkeypatch):
        file = io.StringIO()
        monkeypatch.setattr(sys, "stdout", file)
        live = Live(self._console())
        live.start(3, Settings())
        print("result")
        live.close({})
        assert file.getvalue() == "result\n"

    def test_notes_before_the_start_and_a_close_without_one(self):
        console = self._console()
        live = Live(console)
        live.note("early")
        live.close({})
        assert console.export_text() == "early\n"


class TestJsonLog:
    KEYS = {
        "start": {"cells", "settings"},
        "note": {"level", "text"},
        "close": {"summary"},
    }
    JOB = {"index", "name", "what", "worker"}
    CELL = {"cell", "method", "target_speedup", "seed", "recovery", "status", "error"} | {
        "block_speedup",
        "total_speedup",
        "scores",
    }

    def _played(self, target, tmp_path):
        warnings: list[str] = []
        log = JsonLog(target, warnings.append)
        play(log, settings=Settings(output_path=tmp_path), worker="w")
        log.scored(Job(4, "d"), DONE, 5.0)
        log.close({"cells": 5, "bad": float("nan")})
        assert warnings == []

    def test_lines_have_the_documented_keys(self, tmp_path):
        path = tmp_path / "new" / "log.jsonl"
        self._played(str(path), tmp_path)
        events = [json.loads(line) for line in path.read_text().splitlines()]
        keys = self.KEYS | {"began": self.JOB, "kept": self.JOB | self.CELL}
        keys["ended"] = keys["scored"] = keys["kept"] | {"seconds"}
        names = "start kept began ended began ended note note began scored close"
        assert [event["event"] for event in events] == names.split()
        for event in events:
            assert set(event) == keys[event["event"]] | {"time", "event"}
            assert datetime.fromisoformat(event["time"]).utcoffset().total_seconds() == 0
            documented = keys[event["event"]] - self.JOB
            assert all(f"``{key}``" in json_log.__doc__ for key in documented | self.JOB)

        start, ended, failed, warning = events[0], events[3], events[5], events[6]
        assert start["cells"] == 5
        assert set(start["settings"]) == {field.name for field in fields(Settings)}
        assert start["settings"]["output_path"] == str(tmp_path)
        assert ended["scores"] == [
            {"task": "one", "metric": "acc", "filter": "none", "value": 0.75, "stderr": 0.1}
        ]
        assert (ended["cell"], ended["method"]) == (DONE.key, "dense")
        assert (ended["status"], ended["error"], ended["seconds"]) == ("done", "", 34.0)
        assert (ended["block_speedup"], ended["total_speedup"]) == (pytest.approx(1.5), 1.2)
        assert (ended["index"], ended["what"], ended["worker"]) == (2, "running", "w")
        assert (failed["status"], failed["error"]) == ("error", "ValueError: no such layer")
        assert warning["level"] == "warning"
        assert events[-1]["summary"] == {"cells": 5, "bad": None}

    def test_appends_after_half_a_line(self, tmp_path):
        path = tmp_path / "log.jsonl"
        path.write_text('{"time": "2')
        for _ in range(2):
            self._played(str(path), tmp_path)
        torn, *lines = path.read_text().splitlines()
        assert torn == '{"time": "2'
        assert [json.loads(line)["event"] for line in lines].count("start") == 2

    def test_each_line_is_there_at_once(self, tmp_path):
        path = tmp_path / "log.jsonl"
        log = JsonLog(str(path), print)
        log.note("so far")
        assert json.loads(path.read_text())["text"] == "so far"
        log.close({})

    def test_stderr(self, tmp_path, capsys):
        from tqdm.auto import tqdm

        log = JsonLog("-", print)
        log.start(1, Settings())
        list(tqdm(range(3), desc="inside", disable=False))
        log.close({})
        said = capsys.readouterr()
        assert [json.loads(line)["event"] for line in said.err.splitlines()] == ["start", "close"]
        assert said.out == ""
        list(tqdm(range(3), desc="after", disable=False))
        assert "after" in capsys.readouterr().err

    def test_a_path_that_cannot_be_written_is_refused_at_once(self, tmp_path):
        with pytest.raises(UserError, match=f"--log_json {tmp_path} cannot be written: Is a dir"):
            JsonLog(str(tmp_path), print)

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is full")
    def test_a_full_disk_costs_one_warning(self):
        warnings: list[str] = []
        log = JsonLog("/dev/full", warnings.append)
        play(log)
        log.close({})
        assert len(warnings) == 1
        assert "--log_json /dev/full cannot be written any more" in warnings[0]
        assert "No space left" in warnings[0]


class TestSeveral:
    def test_tells_all_and_closes_in_the_opposite_order(self):
        told: list[str] = []
        both = Several([Recorder("a", told), Recorder("b", told)])
        play(both)
        both.scored(Job(4, "d"), DONE, 5.0)
        both.close({"cells": 5})
        assert told[-4:-2] == ["a scored 4 5.0", "b scored 4 5.0"]
        assert told[:4] == ["a start 5", "b start 5", "a kept 1", "b kept 1"]
        assert told[6:8] == ["a ended 2 done 34.0", "b ended 2 done 34.0"]
        assert "b warning: a worker died; its cell is tried again" in told
        assert told[-2:] == ["b close {'cells': 5}", "a close {'cells': 5}"]

    def test_a_refusal_closes_those_before(self):
        told: list[str] = []
        with pytest.raises(UserError):
            Several([Recorder("a", told), Recorder("b", told, refuses=True)]).start(2, Settings())
        assert told == ["a start 2", "a close {}"]

    def test_one_that_cannot_close_keeps_no_other_from_it(self):
        told: list[str] = []
        with pytest.raises(RuntimeError, match="stuck"):
            Several([Recorder("a", told), Recorder("b", told, refuses=True)]).close({})
        assert told == ["b close {}", "a close {}"]


class TestChoice:
    @pytest.mark.parametrize(
        ("terminal", "several", "kind"),
        [(True, True, Live), (True, False, Lines), (False, True, Lines)],
    )
    def test_for_people(self, monkeypatch, terminal, several, kind):
        monkeypatch.setenv("TERM", "xterm")
        for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            monkeypatch.delenv(name, raising=False)
        error = io.StringIO()
        error.isatty = lambda: terminal
        monkeypatch.setattr(sys, "stderr", error)
        (only,) = listener_for(Settings(), several).listeners
        assert type(only) is kind

    def test_a_file_beside_the_lines_and_stderr_in_place_of_them(self, tmp_path):
        path = tmp_path / "log.jsonl"
        both = listener_for(Settings(log_json=str(path)), False).listeners
        assert [type(one) for one in both] == [JsonLog, Lines]
        assert [type(one) for one in listener_for(Settings(log_json="-"), False).listeners] == [
            JsonLog
        ]

    def test_a_log_that_breaks_is_told_to_people(self, capsys):
        if not os.path.exists("/dev/full"):
            pytest.skip("needs a device that is full")
        several = listener_for(Settings(log_json="/dev/full"), False)
        play(several)
        several.close({})
        assert capsys.readouterr().err.count("warning: --log_json /dev/full") == 1
