"""Experiment trackers: which there are, what they are told, and what happens when one fails."""

from __future__ import annotations

import struct
import sys
from pathlib import Path
from typing import Any

import cells
import pytest
from accelerate import PartialState, tracking
from accelerate.tracking import GeneralTracker

from dyndepth.common.errors import UserError
from dyndepth.sweep.progress.choice import listener_for
from dyndepth.sweep.progress.interface import Job
from dyndepth.sweep.progress.trackers import Trackers, check
from dyndepth.sweep.settings import Settings

LEADERBOARD = "cell,method,mean_acc\na,dense,0.5\nb,fast,\n"


class Fake(GeneralTracker):
    """Keeps what it is told in ``told``; breaks at what ``broken`` names."""

    name = "fake"
    requires_logging_directory = False
    told: list[Any] = []
    broken = ""

    def __init__(self, run_name: str) -> None:
        super().__init__()
        self.told.append(("made", run_name))

    @property
    def tracker(self):
        return self

    def _do(self, what: str, *values: Any) -> None:
        if what == self.broken:
            raise ConnectionError("no\nroute")
        # The real ones write to accelerate's log, which needs this.
        assert PartialState._shared_state != {}
        self.told.append((what, *values))

    @tracking.on_main_process
    def start(self):
        self._do("start")

    @tracking.on_main_process
    def store_init_configuration(self, values):
        self._do("configuration", values)

    @tracking.on_main_process
    def log(self, values, step=None):
        self._do("log", step, values)

    @tracking.on_main_process
    def finish(self):
        self._do("finish")


class WithTable(Fake):
    name = "with_table"

    def log_table(self, name, dataframe, step):
        self._do("table", name, step, list(dataframe.columns), dataframe.values.tolist())


class WithFile(Fake):
    name = "with_file"

    def log_artifact(self, path):
        self._do("file", Path(path).read_text())


@pytest.fixture
def told(monkeypatch):
    """What the fake trackers, registered with accelerate, were told."""
    kept: list[Any] = []
    for cls in (Fake, WithTable, WithFile):
        monkeypatch.setitem(tracking.LOGGER_TYPE_TO_CLASS, cls.name, cls)
    monkeypatch.setattr(Fake, "told", kept)
    return kept


def play(names, folder: Path, timed: bool = True) -> list[str]:
    """A sweep of three cells, the second kept, the third failed; returns what was warned of."""
    warnings: list[str] = []
    trackers = Trackers(names, warnings.append)
    trackers.start(3, Settings(output_path=folder, seed=(0, 1), limit={"*": None, "one": 4}))
    done = cells.cell(method="fast", parameters="", phases="both", target_speedup=1.5)
    done.timing = [
        {"phase": phase, "batch": 1, "length": 8, "wall_speedup": speedup}
        for phase, speedup in (("prefill", 1.3), ("decode", 0.9))
        if timed
    ]
    done.accuracy.append(done.accuracy[0] | {"metric": "a,b", "value": float("nan")})
    done.accuracy.append(done.accuracy[0] | {"filter": "other", "value": 0.0})
    failed = cells.cell(seed=1, phases="both")
    failed.status, failed.accuracy, failed.compute = "error", [], []
    trackers.kept(Job(1, "a"), cells.cell())
    trackers.began(Job(3, "c"))
    trackers.scored(Job(2, "b"), done, 30.0)
    trackers.ended(Job(3, "c"), failed, 1.0)
    trackers.ended(Job(2, "b"), done, 34.0)
    trackers.note("two workers")
    (folder / "leaderboard.csv").write_text(LEADERBOARD)
    trackers.close({"leaderboard": str(folder / "leaderboard.csv")})
    return warnings


class TestCheck:
    def test_each_once_in_the_order_given(self, told):
        assert check(["with_file", "fake", "with_file"]) == ("with_file", "fake")
        assert check([]) == ()

    def test_unknown(self):
        with pytest.raises(UserError) as fault:
            check(["wandd"])
        said = str(fault.value)
        assert said.startswith("--trackers names 'wandd', which is none; did you mean wandb")
        assert all(name in said for name in ("aim", "mlflow", "tensorboard"))

    def test_not_installed(self, monkeypatch):
        monkeypatch.setattr(tracking, "get_available_trackers", lambda: [])
        with pytest.raises(UserError, match="^--trackers comet_ml .*: pip install comet-ml$"):
            check(["comet_ml"])

    def test_asked_for_by_the_settings(self, told):
        with pytest.raises(UserError, match="names 'none_such'"):
            listener_for(Settings(trackers=("none_such",)), False)
        first, last = listener_for(Settings(trackers=("fake",)), False).listeners
        assert (first.names, type(last).__name__) == (("fake",), "Lines")


class TestTrackers:
    def test_what_they_are_told(self, told, tmp_path):
        assert play(["fake"], tmp_path) == []
        order = ["made", "start", "configuration", "log", "log", "finish"]
        assert [entry[0] for entry in told] == order
        assert told[0] == ("made", "dyndepth")
        configuration = told[2][1]
        assert configuration["output_path"] == str(tmp_path)
        assert (configuration["seed"], configuration["limit"]) == ("0,1", "*=all,one=4")
        assert (configuration["debug"], configuration["batch_size"]) == (False, 32)
        assert "revision" not in configuration
        # Steps rise in the order in which cells ended.
        same = {"seed": 1, "target_speedup": 1.0, "method": "dense"}
        assert told[3] == ("log", 1, {"index": 3, "seconds": 1.0, "failed": 1} | same)
        assert told[4] == (
            "log",
            2,
            {
                "index": 2,
                "method": "fast",
                "target_speedup": 1.5,
                "seed": 0,
                "seconds": 34.0,
                "failed": 0,
                "block_speedup": pytest.approx(1.5),
                "total_speedup": pytest.approx(1.2),
                "wall_prefill_speedup": 1.3,
                "wall_decode_speedup": 0.9,
                "one/acc": 0.75,
            },
        )

    def test_the_leaderboard_goes_where_it_can(self, told, tmp_path):
        assert play(["with_table", "with_file", "fake"], tmp_path) == []
        (table,) = [entry for entry in told if entry[0] == "table"]
        assert table[1:4] == ("leaderboard", 2, ["cell", "method", "mean_acc"])
        assert table[4][0] == ["a", "dense", 0.5]
        assert [entry for entry in told if entry[0] == "file"] == [("file", LEADERBOARD)]
        assert told.count(("finish",)) == 3

    def test_an_interrupted_sweep_has_no_leaderboard(self, told, tmp_path):
        warnings: list[str] = []
        trackers = Trackers(["with_table"], warnings.append)
        trackers.start(1, Settings(output_path=tmp_path))
        trackers.close({})
        assert (told[-1], warnings) == (("finish",), [])

    @pytest.mark.parametrize("broken", ["log", "file", "finish"])
    def test_one_that_fails_is_dropped_with_one_warning(self, told, tmp_path, monkeypatch, broken):
        monkeypatch.setattr(WithFile, "broken", broken)
        warnings = play(["with_file", "fake"], tmp_path)
        assert warnings == [
            "the tracker with_file failed and is left out: ConnectionError: no route"
        ]
        # The other one is told everything.
        assert sum(entry[0] == "log" for entry in told) == (2 if broken == "log" else 4)
        assert told[-1] == ("finish",)

    def test_one_that_does_not_start_is_refused_and_the_others_finish(
        self, told, tmp_path, monkeypatch
    ):
        monkeypatch.setattr(WithFile, "broken", "start")
        with pytest.raises(UserError, match="^--trackers with_file cannot be started, .*no route$"):
            play(["fake", "with_file"], tmp_path)
        assert told[-1] == ("finish",)

    def test_one_that_wants_numbers_gets_numbers(self, told, tmp_path, monkeypatch):
        monkeypatch.setattr("dyndepth.sweep.progress.trackers.NUMBERS_ONLY", frozenset({"fake"}))
        monkeypatch.setattr(
            "dyndepth.sweep.progress.trackers.PARAMETERS_ANY_TIME", frozenset({"fake"})
        )
        play(["fake"], tmp_path)
        assert ("configuration", {"method/2": "fast"}) in told
        logged = [entry[2] for entry in told if entry[0] == "log"]
        assert not any(isinstance(value, str) for values in logged for value in values.values())

    def test_the_environments_project(self, told, tmp_path, monkeypatch):
        monkeypatch.setattr(
            "dyndepth.sweep.progress.trackers.PROJECT_VARIABLES", {"fake": "FAKE_PROJECT"}
        )
        monkeypatch.setenv("FAKE_PROJECT", "mine")
        play(["fake"], tmp_path)
        assert told[0] == ("made", "mine")

    @pytest.mark.parametrize("before", [False, True])
    def test_accelerates_state_is_left_as_it_was(self, told, tmp_path, monkeypatch, before):
        PartialState._reset_state()
        if before:
            PartialState(cpu=True)
        found = dict(PartialState._shared_state)
        assert play(["fake"], tmp_path) == []
        assert dict(PartialState._shared_state) == found
        PartialState._reset_state()


def _events(folder: Path) -> list[Any]:
    """The events of a TensorBoard log, decoded: records of length, its checksum, data, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in folder.rglob("events.out.tfevents.*"):
        content, at = path.read_bytes(), 0
        while at < len(content):
            (length,) = struct.unpack_from("<Q", content, at)
            found.append(Event.FromString(content[at + 12 : at + 12 + length]))
            at += 12 + length + 4
    return found


def test_tensorboard_reads_the_same_numbers(tmp_path, monkeypatch):
    pytest.importorskip("tensorboardX")
    # Whichever writer is installed besides, this one is taken.
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert check(["tensorboard"]) == ("tensorboard",)
    assert play(["tensorboard"], tmp_path) == []
    (run,) = (tmp_path / "trackers").iterdir()
    values = {
        (value.tag, event.step): value
        for event in _events(run)
        for value in event.summary.value
        if event.step
    }
    assert values["one/acc", 2].simple_value == pytest.approx(0.75)
    assert values["block_speedup", 2].simple_value == pytest.approx(1.5)
    assert values["wall_decode_speedup", 2].simple_value == pytest.approx(0.9)
    assert (values["failed", 1].simple_value, values["failed", 2].simple_value) == (1.0, 0.0)
    (text,) = [value for (tag, step), value in values.items() if "method" in tag and step == 2]
    assert text.tensor.string_val == [b"fast"]
    assert "output_path" in next(run.rglob("hparams.yml")).read_text()
