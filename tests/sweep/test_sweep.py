"""Settings, the grid, and the loop over cells, with methods and a bench made by hand."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import threading
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pandas
import pytest
from cells import FakeBench, cell, identity

from dyndepth.cells.cell import CellSpec, method_identity
from dyndepth.cells.recipe import Recipe
from dyndepth.cells.store import Store
from dyndepth.cells.times import Shape
from dyndepth.common import commands, digests, provenance, registry
from dyndepth.common.errors import UserError
from dyndepth.evaluation.evaluate import Evaluation
from dyndepth.sweep import __main__ as door
from dyndepth.sweep import run as sweep
from dyndepth.sweep import settings as options
from dyndepth.sweep.driver import Driver, Tally, needed, skipped_nothing
from dyndepth.sweep.executors import Inline
from dyndepth.sweep.grid import asked_level, limits, modes, plans
from dyndepth.sweep.progress.people import Lines
from dyndepth.sweep.settings import DEFAULT_LIMIT, Settings, read
from dyndepth.sweep.workbench import Workbench
from dyndepth.sweep.worker import Worker
from dyndepth.timing.levels import level_of

CELLS = [CellSpec("dense"), CellSpec("a", 1.5), CellSpec("b", 2.0)]


@pytest.fixture
def fake_methods(monkeypatch):
    """A registry of dense, steps and fixed."""
    entries = {
        name: EntryPoint(name, f"fakes:{cls}", registry.GROUP)
        for name, cls in (("dense", "Dense"), ("steps", "Steps"), ("fixed", "Fixed"))
    }
    monkeypatch.setattr(registry, "methods", lambda: entries)


def _settings(tmp_path, **changes):
    return Settings(**{"output_path": tmp_path / "run", "timing": "off"} | changes)


def _sweep(cells, bench, settings) -> int:
    """The status of a sweep whose cells ``bench`` computes."""
    executor, store = Inline(lambda: Worker(bench, settings)), Store(settings.output_path)
    executor.start()
    return sweep.run(cells, executor, store, settings, Lines(), bench.identity)


def _run(cells, bench, settings) -> Tally:
    """What became of its cells."""
    with pytest.MonkeyPatch.context() as patch:
        drivers = []
        init = Driver.__init__

        def keep(self, *arguments):
            drivers.append(self)
            init(self, *arguments)

        patch.setattr(Driver, "__init__", keep)
        _sweep(cells, bench, settings)
    return drivers[0].tally


def _table(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".parquet":
        return pandas.read_parquet(path).to_dict("records")
    with path.open() as file:
        return list(csv.DictReader(file))


class TestSettings:
    def test_dashes_and_underscores_are_the_same(self):
        dashed = ["--batch-size", "4", "--num-fewshot=2", "--output-path", "a-b", "--dry-run"]
        scored = [word.replace("-", "_") if word.startswith("--") else word for word in dashed]
        scored = [word.replace("__", "--", 1) for word in scored]
        assert scored[0] == "--batch_size"
        found = read(dashed)
        assert found == read(scored)
        assert (found.batch_size, found.num_fewshot, found.dry_run) == (4, 2, True)
        assert found.output_path == Path("a-b")

    def test_lists_by_commas_and_words(self):
        found = read(["--speedups", "1.25,1.5", "2", "--seed", "0,1", "1", "--tasks", "a", "b,c"])
        assert found.speedups == (1.25, 1.5, 2.0)
        assert found.seed == (0, 1)
        assert found.tasks == ("a", "b", "c")

    def test_defaults_depend_on_the_model(self, tmp_path):
        assert read([]).limit is DEFAULT_LIMIT["embedded"]
        assert read([]).output_path == Path("runs/embedded")
        hub = read(["--model", "org/name"])
        assert (hub.limit, hub.output_path) == ({"*": None}, Path("runs/org--name"))
        assert read(["--model", str(tmp_path)]).output_path == Path("runs") / tmp_path.name

    @pytest.mark.parametrize(
        ("text", "limit"),
        [
            ("none", {"*": None}),
            ("32", {"*": 32}),
            ("32,title=8,other=none", {"*": 32, "title": 8, "other": None}),
            ("title=8", {"*": None, "title": 8}),
        ],
    )
    def test_limit_by_task(self, tmp_path, text, limit):
        assert read(["--limit", text]).limit == limit
        config = tmp_path / "run.yaml"
        config.write_text(f"limit: {json.dumps(limit)}")
        assert read(["--config", str(config)]).limit == limit
        tasks = ["title", "other", "third"]
        expected = [limit.get(task, limit["*"]) for task in tasks]
        assert list(limits(Settings(limit=limit), tasks).values()) == expected

    def test_limit_of_a_task_that_is_not_scored(self):
        with pytest.raises(UserError, match="'quartz', which is not scored"):
            limits(Settings(limit={"*": 3, "quartz": 2}), ["title"])
        assert limits(read([]), ["quartz"]) == {"quartz": DEFAULT_LIMIT["embedded"]["*"]}

    def test_flags_override_the_file(self, tmp_path):
        config = tmp_path / "run.yaml"
        config.write_text(
            "batch-size: 3\nlimit: 7\ntiming: off\nspeedups: [1.5, 2]\nseed: 4\n"
            "methods:\n  steps: {rule: odd, keep: 2}\n  fixed:\n"
        )
        found = read(["--config", str(config), "--limit", "9"])
        assert (found.batch_size, found.limit, found.timing) == (3, {"*": 9}, "off")
        assert (found.speedups, found.seed) == ((1.5, 2.0), (4,))
        assert found.methods == "steps(rule=odd, keep=2),fixed"

    def test_methods_split_by_the_shell_are_joined(self):
        assert read(["--methods", "steps(rule=odd,", "keep=2)", "fixed"]).methods == (
            "steps(rule=odd,keep=2),fixed"
        )

    @pytest.mark.parametrize(
        "text",
        [
            "recovery: [none, 'lora(rank=8, steps=3)']",
            "recovery:\n  none:\n  lora: {steps: 3, rank: 8}",
            "recovery: none,lora(rank=8,steps=3)",
            "recovery: [null, {lora: {rank: 8, steps: 3}}]",
        ],
    )
    def test_recoveries_are_canonical_however_they_are_written(self, tmp_path, text):
        config = tmp_path / "run.yaml"
        config.write_text(text)
        expected = ("none", str(Recipe(rank=8, steps=3)))
        assert read(["--config", str(config)]).recovery == expected
        assert read(["--recovery", "none", "lora(rank=8,", "steps=3)"]).recovery == expected
        assert read([]).recovery == ("none",)

    @pytest.mark.parametrize(
        ("arguments", "says"),
        [
            (["--speedups", "0.9"], "at least 1"),
            (["--speedups", "-1"], "at least 1"),
            (["--speedups", "fast"], "not a number"),
            (["--speedups", "nan"], "not a number"),
            (["--speedups", "inf"], "finite"),
            (["--speedups", ","], "empty"),
            (["--limit", "-3"], "--limit takes a whole number"),
            (["--limit", "many"], "--limit takes a whole number"),
            (["--seed", "1.5"], "--seed takes a whole number"),
            (["--batch_size", "0"], "--batch_size takes a whole number"),
            (["--timing", "slow"], "off, quick, full"),
            (["--mode", "fast"], "eager, graphs, both"),
            (["--timing_shapes", "512"], "takes BATCHxLENGTH or .*, not '512'"),
            (["--timing_shapes", ","], "--timing_shapes is empty"),
            (["--timing_shapes", "1x8+2", "1x8+3"], "has 1x8 twice, with 2 and with 3 new tokens"),
            (["--timing", "off", "--timing_shapes", "1x8"], "leave it or --timing_shapes out"),
            (["--timing", "off", "--compiled_dense"], "leave it or --compiled_dense out"),
            (["--resume", "yes"], "only-missing, always, never"),
            (["--phases", "prompt"], "both, generation, published"),
            (["--dtype", "float8"], "float32, bfloat16"),
            (["--recovery", "lorra"], "did you mean lora"),
            (["--recovery", "lora(ranc=3)"], "did you mean rank"),
            (["--recovery", "none", "lora(steps=0)"], "steps must be at least 1"),
            (["--recovery", "joint(steps=3)"], "no parameter 'steps'"),
            (["--recovery", "lora,,none"], "empty entry"),
            (["--recovery", ""], "empty"),
            (["--surprise", "1"], "no flag --surprise"),
            (["--limi", "1"], "no flag --limi; did you mean --limit"),
            (["--config", "no/such.yaml"], "no/such.yaml cannot be read"),
            (["--include_path", "no/such"], "no folder"),
            (["--output_path", __file__], "is a file"),
        ],
    )
    def test_wrong_values_get_a_sentence(self, arguments, says):
        with pytest.raises(UserError, match=says) as fault:
            read(arguments)
        assert "\n" not in str(fault.value)

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("bogus: 1", "unknown key 'bogus'"),
            ("- a\n- b", "not be a list"),
            ("a: [", "not valid YAML"),
            ("tasks: [1, 2]", "takes names"),
            ("debug: 3", "true or false"),
            ("methods: 3", "takes names"),
            ("recovery: 3", "takes names"),
            ("recovery: {lora: 3}", "must map parameters"),
            ("methods: {steps: 3}", "must map parameters"),
            ("speedups: [true]", "not a number"),
            ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ],
    )
    def test_wrong_files_get_a_sentence(self, tmp_path, text, says):
        config = tmp_path / "run.yaml"
        config.write_text(text)
        with pytest.raises(UserError, match=says) as fault:
            read(["--config", str(config)])
        assert "\n" not in str(fault.value)

    def test_every_setting_has_help_and_a_flag(self):
        text = options.parser().format_help()
        for name in Settings.__dataclass_fields__:
            assert commands.HELP[name]
            assert f"--{name}" in text


@pytest.mark.usefixtures("fake_methods")
class TestGrid:
    def test_dense_comes_first_and_once(self):
        found = plans(Settings(methods="steps,dense,fixed", speedups=(1.5, 2.0), seed=(0, 1)), 8)
        assert found[0] == CellSpec("dense")
        assert [plan.method for plan in found].count("dense") == 1
        assert [(p.method, p.target_speedup, p.seed) for p in found[1:5]] == [
            ("steps", 1.5, 0),
            ("steps", 1.5, 1),
            ("steps", 2.0, 0),
            ("steps", 2.0, 1),
        ]
        assert len(found) == 9

    def test_each_recovery_makes_cells_of_every_method_dense_included(self):
        lora = str(Recipe())
        given = Settings(methods="steps", speedups=(1.5,), seed=(0, 1), recovery=("none", lora))
        found = plans(given, 8)
        assert [(p.method, p.target_speedup, p.seed, p.recovery) for p in found] == [
            ("dense", 1.0, 0, "none"),
            ("dense", 1.0, 0, lora),
            ("dense", 1.0, 1, lora),
            ("steps", 1.5, 0, "none"),
            ("steps", 1.5, 1, "none"),
            ("steps", 1.5, 0, lora),
            ("steps", 1.5, 1, lora),
        ]
        assert found[-1].describe().endswith("at 1.5x, seed 1, lora")
        assert len({(plan.method, plan.seed, plan.recovery) for plan in found}) == 7

    def test_joint_is_for_methods_that_train(self, monkeypatch):
        import fakes

        joint = str(Recipe(kind="joint"))
        with pytest.raises(UserError, match="steps trains nothing; use lora"):
            plans(Settings(methods="steps", recovery=("none", joint)), 8)
        monkeypatch.setattr(fakes.Steps, "needs_training", True)
        found = plans(Settings(methods="steps", speedups=(2.0,), recovery=("none", joint)), 8)
        assert [(plan.method, plan.recovery) for plan in found] == [
            ("dense", "none"),
            ("steps", "none"),
            ("steps", joint),
        ]

    def test_equal_cells_are_one(self):
        found = plans(Settings(methods="steps,steps(rule=even),steps(rule=odd)"), 8)
        assert len(found) == 1 + 3 + 3

    @pytest.mark.parametrize(
        ("phases", "spec", "expected"),
        [
            ("both", "steps", "both"),
            ("generation", "steps", "generation"),
            ("published", "steps", "generation"),
            ("both", "steps(phases=generation)", "generation"),
            ("generation", "fixed", "both"),
        ],
    )
    def test_phases_are_set_where_there_is_a_choice(self, phases, spec, expected):
        plan = plans(Settings(methods=spec, phases=phases), 8)[1]
        assert plan.build().phases == expected

    @pytest.mark.parametrize(
        ("changes", "says"),
        [
            ({"methods": "step"}, "did you mean steps"),
            ({"methods": "steps(rulle=odd)"}, "no parameter 'rulle'"),
            ({"methods": "steps(keep=many)"}, "must be an integer"),
            ({"methods": "steps(keep=-1)"}, "must not be negative"),
            ({"methods": "steps(target_speedup=2)"}, "--speedups"),
            ({"methods": "steps(seed=2)"}, "--seed"),
            ({"methods": "steps", "speedups": (2.0, 5.0)}, "at most 4x on a model of 8 blocks"),
        ],
    )
    def test_wrong_methods_get_a_sentence(self, changes, says):
        with pytest.raises(UserError, match=says):
            plans(Settings(**changes), 8)

    def test_identity_of_a_method_has_each_fact_in_one_column(self):
        plan = plans(Settings(methods="steps(rule=odd)", speedups=(1.5,), seed=(3,)), 8)[1]
        found = method_identity(plan.build())
        assert found["parameters"] == "rule='odd', keep=1"
        assert (found["phases"], found["target_speedup"], found["seed"]) == ("both", 1.5, 3)


class TestRun:
    def test_tables_and_order(self, tmp_path):
        bench, settings = FakeBench(), _settings(tmp_path, timing="quick")
        tally = _run(CELLS, bench, settings)
        assert (tally.done, tally.reused, tally.failed) == (3, 0, 0)
        assert [kind for kind, _ in bench.calls] == ["evaluate", "measure"] * 3
        board = _table(settings.output_path / "leaderboard.csv")
        assert {row["method"]: row["retained"] for row in board} == {
            "dense": "1",
            "a": "0.6666666667",
            "b": "0.6666666667",
        }
        assert {row["wall_decode_speedup"] for row in board} == {"2.1"}
        assert len(_table(settings.output_path / "timing.csv")) == 12

    def test_a_cell_that_skipped_nothing_is_told_once(self, tmp_path, capsys):
        class Idle(FakeBench):
            def evaluate(self, plan):
                found = super().evaluate(plan)
                if plan.method != "b":
                    found.compute[0]["block_speedup"] = 1.0
                return found

        settings = _settings(tmp_path, timing="quick")
        assert _sweep(CELLS, Idle(), settings) == 0
        assert _sweep(CELLS, Idle(), settings) == 0
        captured = capsys.readouterr()
        told = [line for line in captured.err.splitlines() if "skipped nothing" in line]
        assert len(told) == 1
        assert told[0].startswith("warning: a at 1.5x, seed 0 skipped nothing: every token")

    @pytest.mark.parametrize(
        ("speedups", "said"),
        [
            ((1.0, 1.0), "every token of every task executed every block, so its scores and"),
            ((1.0, 1.3), "every token of one executed every block, so its scores on it are"),
            ((1.2, 1.3), ""),
        ],
    )
    def test_tasks_without_anything_skipped_are_named(self, speedups, said):
        found = cell(target_speedup=1.5)
        rows = zip(("one", "other"), speedups, strict=True)
        found.compute = [{"task": t, "phase": "all", "block_speedup": s} for t, s in rows]
        assert skipped_nothing(found).startswith(said)
        assert bool(skipped_nothing(found)) == bool(said)

    def test_failing_cell_leaves_a_row_and_the_sweep_goes_on(self, tmp_path, capsys):
        settings = _settings(tmp_path)
        assert _sweep(CELLS, FakeBench(broken=("a",)), settings) == 1
        board = {row["method"]: row for row in _table(settings.output_path / "leaderboard.csv")}
        assert board["a"]["status"] == "error"
        assert board["a"]["error"] == "ValueError: no such layer"
        assert board["b"]["status"] == "done"
        accuracy = _table(settings.output_path / "accuracy.csv")
        assert ("a", "error", "") in {(r["method"], r["status"], r["value"]) for r in accuracy}
        captured = capsys.readouterr()
        assert "a at 1.5x, seed 0: failed: ValueError: no such layer" in captured.err
        assert "a(phases=x) FAILED" in captured.out
        summary = json.loads(captured.out.splitlines()[-1])["sweep"]
        assert (summary["cells"], summary["done"], summary["failed"]) == (3, 2, 1)
        assert Path(summary["leaderboard"]).is_file()

    @pytest.mark.parametrize(
        ("resume", "again"),
        [("only-missing", ["a"]), ("always", []), ("never", ["dense", "a", "b"])],
    )
    def test_resume(self, tmp_path, resume, again):
        settings = _settings(tmp_path)
        _run(CELLS, FakeBench(broken=("a",)), settings)
        bench = FakeBench()
        settings = _settings(tmp_path, resume=resume)
        tally = _run(CELLS, bench, settings)
        assert [what.split()[0] for _, what in bench.calls] == again
        assert tally.failed == (1 if resume == "always" else 0)
        assert tally.done == len(again)
        assert len(tally.keys) == 3

    def test_timing_is_added_without_scoring_again(self, tmp_path):
        settings = _settings(tmp_path)
        _run(CELLS, FakeBench(), settings)
        before = (settings.output_path / "accuracy.csv").read_bytes()
        bench, settings = FakeBench(), _settings(tmp_path, timing="quick")
        _run(CELLS, bench, settings)
        assert [kind for kind, _ in bench.calls] == ["measure"] * 3
        assert (settings.output_path / "accuracy.csv").read_bytes() == before
        assert len(_table(settings.output_path / "timing.csv")) == 12

    def test_a_cell_is_timed_again_for_a_mode_that_it_lacks(self, tmp_path):
        base = {"phase": "decode", "batch": 1, "length": 8, "wall_speedup": 1.1}
        one = cell(device="cuda")
        one.timing, one.timing_level = [base], "full"  # from before there were modes
        eager, both, default = (
            {"timing": "full", "mode": mode} for mode in ("eager", "both", None)
        )
        assert needed(one, _settings(tmp_path, **eager)) == "nothing"
        assert needed(one, _settings(tmp_path, **both)) == "timing"
        assert needed(one, _settings(tmp_path, **default)) == "nothing"  # as it was begun
        assert needed(one, _settings(tmp_path, timing="quick")) == "nothing"
        assert needed(one, _settings(tmp_path, mode="both")) == "nothing"  # timing is off
        one.timing.append(base | {"mode": "graphs"})
        assert needed(one, _settings(tmp_path, **both)) == "nothing"
        one.timing = []  # it foresees: it has no times, whatever is asked for
        assert needed(one, _settings(tmp_path, **both)) == "nothing"

    def test_times_that_are_there_stay_and_only_what_is_missing_is_taken(self, tmp_path):
        """Resumed in another mode or at a lower level, what was timed better is kept."""
        plan, on_cuda = CELLS[:1], FakeBench()
        on_cuda.identity = lambda plan: identity(method=plan.method, device="cuda")
        settings = _settings(tmp_path, timing="full", mode="eager")
        _run(plan, on_cuda, settings)
        store = Store(settings.output_path)
        (before,) = store.all()
        assert (before.timing_level, on_cuda.modes) == ("full", ["eager"])

        def again(**changes):
            on_cuda.modes.clear()
            _run(plan, on_cuda, _settings(tmp_path, **changes))
            (found,) = store.all()
            levels = {(row["mode"], row["level"]) for row in found.timing}
            return on_cuda.modes[:], found.timing_level, levels

        eager, quick = ("eager", "full"), ("graphs", "quick")
        # The least of the modes' levels: a run that names no mode and asks for more goes on there.
        both = (["graphs"], "quick", {eager, quick})
        assert again(timing="quick", mode="graphs") == both
        (after,) = store.all()
        assert after.timing[: len(before.timing)] == before.timing
        assert again(timing="quick", mode="both") == ([], "quick", {eager, quick})
        assert again(timing="full", mode="eager") == ([], "quick", {eager, quick})
        assert again(timing="quick") == ([], "quick", {eager, quick})
        full = {eager, ("graphs", "full")}
        assert again(timing="full") == (["graphs"], "full", full)
        assert again(timing="quick", mode="both") == ([], "full", full)
        assert [call for call, _ in on_cuda.calls].count("evaluate") == 1

    def test_shapes_that_are_asked_for_are_added_without_scoring_or_timing_others(self, tmp_path):
        bench = FakeBench()
        _run(CELLS[:1], bench, _settings(tmp_path, timing="quick"))
        store = Store(_settings(tmp_path).output_path)

        def again(**changes):
            bench.calls.clear()
            bench.shapes.clear()
            _run(CELLS[:1], bench, _settings(tmp_path, timing="quick", **changes))
            (found,) = store.all()
            shapes = sorted({(row["batch"], row["length"]) for row in found.timing})
            return [kind for kind, _ in bench.calls], bench.shapes[:], shapes

        asked, own = (Shape(1, 512, 4), Shape(4, 64, 0)), [(1, 8), (8, 8)]
        everything = sorted([*own, (1, 512), (4, 64)])
        told = ["1 x 512 + 4", "4 x 64"]
        assert again(timing_shapes=asked) == (["measure"], [told], everything)
        assert again(timing_shapes=asked) == ([], [], everything)
        assert again() == ([], [], everything)
        assert again(timing_shapes=(Shape(1, 8, 2),)) == ([], [], everything)  # the level has it
        more = (*asked, Shape(2, 16, 0))
        whole = sorted([*everything, (2, 16)])
        assert again(timing_shapes=more) == (["measure"], [["2 x 16"]], whole)
        # The bench says nothing of compiled dense: it is taken of all that is asked for.
        assert again(timing_shapes=asked, compiled_dense=True) == (["measure"], [told], whole)
        assert again(compiled_dense=True) == (["measure"], [[]], whole)

    def test_a_cell_of_asked_shapes_alone_gets_those_of_its_level_when_it_is_asked(self, tmp_path):
        bench, asked = FakeBench(), (Shape(1, 512, 4),)
        _run(CELLS[:1], bench, _settings(tmp_path, timing="quick", timing_shapes=asked))
        _run(CELLS[:1], bench, _settings(tmp_path, timing="quick"))
        assert bench.shapes == [["1 x 512 + 4"], []]
        assert [kind for kind, _ in bench.calls] == ["evaluate", "measure", "measure"]
        (found,) = Store(_settings(tmp_path).output_path).all()
        assert {(row["batch"], row["length"]) for row in found.timing} == {(1, 512), (1, 8), (8, 8)}

    def test_a_mode_that_fails_costs_no_times_of_another(self, tmp_path):
        bench = FakeBench()
        bench.identity = lambda plan: identity(method=plan.method, device="cuda")
        bench.no_modes = ("graphs",)
        settings = _settings(tmp_path, timing="quick", mode="both")
        _run(CELLS[:1], bench, settings)
        (found,) = Store(settings.output_path).all()
        assert (found.status, found.timing_level) == ("error", "quick")
        assert {row["mode"] for row in found.timing} == {"eager"}
        bench.no_modes = ()
        bench.modes.clear()
        _run(CELLS[:1], bench, settings)
        (found,) = Store(settings.output_path).all()
        assert (bench.modes, found.status) == (["graphs"], "done")
        assert {row["mode"] for row in found.timing} == {"eager", "graphs"}

    def test_a_cell_whose_timing_failed_is_done_where_no_times_are_asked_for(self, tmp_path):
        bench = FakeBench()
        bench.timing_fails = True
        _run(CELLS[:1], bench, _settings(tmp_path, timing="quick"))
        bench = FakeBench()
        _run(CELLS[:1], bench, _settings(tmp_path))
        (found,) = Store(tmp_path / "run").all()
        assert (bench.calls, found.status, found.timing) == ([], "done", [])

    def test_a_mode_that_cannot_be_recorded_is_refused_before_anything_is_scored(
        self, tmp_path, monkeypatch, tiny
    ):
        monkeypatch.setattr("dyndepth.runtime.graphs.obstacle", lambda parts: "it has a window")
        bench = Workbench.__new__(Workbench)
        bench.model, bench.device = tiny(), "cuda"
        for mode in ("both", "graphs"):
            bench.settings = _settings(tmp_path, timing="quick", mode=mode)
            with pytest.raises(UserError, match="recorded: it has a window; take --mode eager"):
                bench._check_modes()
        for other in ({"timing": "full"}, {"timing": "off", "mode": "both"}):
            bench.settings = _settings(tmp_path, **other)
            bench._check_modes()
        bench.device, bench.settings = "cpu", _settings(tmp_path, timing="quick", mode="both")
        with pytest.raises(UserError, match="graphs need a CUDA device"):
            bench._check_modes()

    def test_modes_follow_the_device(self, tmp_path):
        full = _settings(tmp_path, timing="full")
        assert modes(full, "cuda:1") == ("eager", "graphs")
        assert modes(full, "cpu") == ("eager",)
        assert modes(_settings(tmp_path, timing="full", device="spread"), "cuda") == ("eager",)
        with pytest.raises(UserError, match="graphs need a CUDA device"):
            modes(_settings(tmp_path, timing="quick", mode="both"), "cpu")

    def test_shapes_by_words_commas_or_the_file_are_the_same(self, tmp_path):
        config = tmp_path / "run.yaml"
        config.write_text("timing_shapes: [1x512+4, 4x64]\ncompiled_dense: true\n")
        asked = (Shape(1, 512, 4), Shape(4, 64, 16))
        found = read(["--config", str(config)])
        assert (found.timing_shapes, found.compiled_dense) == (asked, True)
        assert read(["--timing_shapes", "1x512+4,4x64"]).timing_shapes == asked
        assert read(["--timing_shapes", "1x512+4", "4x64"]).timing_shapes == asked
        assert read([]).timing_shapes == ()

    def test_asked_shapes_stand_in_place_of_the_level_s_and_keep_its_care(self, tmp_path):
        asked = (Shape(1, 512, 4), Shape(4, 64, 0))
        plain = _settings(tmp_path, timing="full")
        chosen = _settings(tmp_path, timing="full", timing_shapes=asked)
        assert asked_level(plain, "cpu") == "full"
        full = level_of("full", "cuda")
        assert asked_level(chosen, "cuda:0") == dataclasses.replace(full, shapes=asked)
        assert asked_level(chosen, "cpu", asked[:1]).shapes == asked[:1]
        with pytest.raises(UserError, match="no shape has any; take --mode eager"):
            modes(
                _settings(tmp_path, timing="full", mode="graphs", timing_shapes=asked[1:]), "cuda"
            )

    def test_the_mode_may_stand_in_the_file(self, tmp_path):
        config = tmp_path / "run.yaml"
        config.write_text("timing: full\nmode: graphs\n")
        assert read(["--config", str(config)]).mode == "graphs"
        assert read(["--config", str(config), "--mode", "eager"]).mode == "eager"
        assert read([]).mode is None

    def test_failed_timing_keeps_the_scores(self, tmp_path):
        settings = _settings(tmp_path, timing="quick")
        bench = FakeBench()
        bench.timing_fails = True
        _run(CELLS[:1], bench, settings)
        (row,) = _table(settings.output_path / "leaderboard.csv")
        assert (row["status"], row["mean_acc"]) == ("error", "0.75")
        bench = FakeBench()
        _run(CELLS[:1], bench, settings)
        assert [kind for kind, _ in bench.calls] == ["measure"]
        (row,) = _table(settings.output_path / "leaderboard.csv")
        assert (row["status"], row["error"]) == ("done", "")

    def test_recovered_dense_is_the_control_and_not_the_yardstick(self, tmp_path, capsys):
        settings = _settings(tmp_path)
        lora = str(Recipe())
        cells = [
            CellSpec("dense"),
            CellSpec("dense", recovery=lora),
            CellSpec("a", 1.5, recovery=lora),
        ]
        assert _sweep(cells, FakeBench(), settings) == 0
        rows = _table(settings.output_path / "leaderboard.csv")
        assert [(row["method"], row["recovery"]) for row in rows] == [
            ("a", lora),
            ("dense", "none"),
            ("dense", lora),
        ]
        said = capsys.readouterr().out
        assert "a at 1.5x, seed 0, lora" in said
        assert "a(phases=x) + lora" in said
        for name in ("accuracy.csv", "compute.csv", "routing.parquet"):
            found = {row["recovery"] for row in _table(settings.output_path / name)}
            assert found == {"none", lora}

    @pytest.mark.parametrize("where", [1, 2, 3])
    def test_interrupted_and_resumed_equals_undisturbed(self, tmp_path, capsys, where):
        calm = _settings(tmp_path / "calm")
        _run(CELLS, FakeBench(), calm)
        settings = _settings(tmp_path / "stormy")
        bench = FakeBench(interrupt_at=where)
        assert _sweep(CELLS, bench, settings) == commands.INTERRUPTED
        said = capsys.readouterr().err
        assert f"interrupted with {where - 1} of 3 cells" in said
        assert "the same command resumes" in said
        table = settings.output_path / "accuracy.csv"
        assert (len(_table(table)) if table.exists() else 0) == where - 1
        _run(CELLS, FakeBench(), settings)
        for name in ("accuracy.csv", "compute.csv", "routing.parquet", "samples.parquet"):
            one, other = (run.output_path / name for run in (calm, settings))
            assert one.read_bytes() == other.read_bytes(), name

    def test_termination_is_taken_as_an_interruption(self, tmp_path):
        old = signal.getsignal(signal.SIGTERM)
        signal.signal(signal.SIGTERM, door._interrupt)
        settings, bench = _settings(tmp_path), FakeBench()
        waiting = threading.Event()
        ended = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM))
        bench.provenance = lambda plan: ended.start() or waiting.wait(20)
        try:
            assert _sweep(CELLS, bench, settings) == commands.INTERRUPTED
        finally:
            signal.signal(signal.SIGTERM, old)


class TestProvenance:
    def test_code_of_a_method_is_that_of_its_own_file(self):
        import fakes

        codes = {digests.method_code(cls) for cls in (fakes.Dense, fakes.Steps)}
        assert len(codes) == 1
        assert digests.method_code(Tally) not in codes

    def test_commit_is_of_the_projects_own_repository_only(self, tmp_path, monkeypatch):
        commit = provenance.git_commit.__wrapped__
        inside = tmp_path / "somewhere" / "site-packages" / "dyndepth"
        inside.mkdir(parents=True)
        monkeypatch.setattr(digests, "PACKAGE", inside)
        answers = {"rev-parse": str(tmp_path / "somewhere")}
        monkeypatch.setattr(provenance, "_git", lambda *words, at=inside: answers.get(words[0], ""))
        assert commit() == ""
        monkeypatch.setattr(digests, "PACKAGE", tmp_path / "somewhere" / "dyndepth")
        assert commit() == str(tmp_path / "somewhere")


def test_evaluations_of_different_tasks_become_one():
    def one(tokens, executed):
        row = {"task": "all", "phase": "all", "layer": 0, "sublayer": "mlp", "executed": executed}
        return Evaluation([{}], [{"phase": "all", "tokens": tokens}], [row], [{}, {}])

    found = Evaluation.joined([one(100, 1.0), one(300, 0.5)])
    assert [len(getattr(found, name)) for name in ("accuracy", "compute", "samples")] == [2, 2, 4]
    assert [row["executed"] for row in found.routing] == [(100 + 150) / 400]
