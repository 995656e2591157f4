"""Methods that speculate on the clock: what is timed, and what is said of drafts; no speeds."""

from __future__ import annotations

import io
import json
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from conftest import make_tiny
from recording import StandIn
from rich.console import Console
from toys import Drafting

from dyndepth.cells.cell import Cell
from dyndepth.common import commands, registry
from dyndepth.common.errors import UserError
from dyndepth.evaluation.scoring import Group, score
from dyndepth.method import DynamicDepthMethod
from dyndepth.results.columns import IDENTITY, TIMING
from dyndepth.results.schema import validate
from dyndepth.runtime import graphs as recordings
from dyndepth.runtime.acceptance import Round
from dyndepth.runtime.attach import attach
from dyndepth.runtime.draft_costs import DraftCosts, by_bytes, predicted_speedup, step_bytes
from dyndepth.sweep.grid import timeable, wanted
from dyndepth.sweep.settings import Settings
from dyndepth.timing import __main__ as door
from dyndepth.timing import drafted as module
from dyndepth.timing import rounds
from dyndepth.timing.console import show_timing
from dyndepth.timing.drafted import Drafted, predicted, read_costs
from dyndepth.timing.levels import LEVELS, STEPS, Level, Shape
from dyndepth.timing.measure import measure
from dyndepth.timing.passes import Side, decode, first_token

ONE = Level((Shape(1, 12, 11),), 2, 6, 6, 1, 0.0, 0.0)


def windows(count: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


def timed(model, method, level=ONE, **changes):
    return measure(model, method, windows(), level=level, progress=False, **changes)


def written(side: Side) -> list[int]:
    """The tokens of one pass of a side that drafts, after its first."""
    with torch.no_grad(), side.around():
        side.run()
    return [token for each in side.rounds[-1] for token in each.tokens]


def test_a_row_of_the_prompt_and_one_of_decode_at_each_temperature(tiny):
    rows = timed(tiny(), Drafting(without=None))
    assert [(r["phase"], r["temperature"], r["new_tokens"]) for r in rows] == [
        ("prefill", 0.0, 0),
        ("decode", 0.0, 11),
        ("decode", 1.0, 11),
    ]
    prompt, *steps = rows
    assert {prompt[key] for key in ("acceptance", "draft_ms", "predicted_speedup")} == {None}
    assert prompt["wall_efficiency"] is not None
    for row in steps:
        # The whole model drafts 4, 4 and 0 tokens: 5 + 5 + 1 are written.
        assert row["acceptance"] == 1.0
        assert row["tokens_per_verify"] == pytest.approx(11 / 3)
        assert row["predicted_speedup"] == pytest.approx(1.0)
        assert row["predicted_by_times"] == pytest.approx(
            11 * 1000 * row["dense_median_s"] / (8 * row["draft_ms"] + 3 * row["verify_ms"])
        )
        assert row["wall_efficiency"] is None
        assert row["block_speedup"] == 1.0
        assert row["total_speedup"] < 0.7  # drafts are billed and save nothing
        assert row["fit_s"] is None
        assert row["dense_cache_bytes"] == row["method_cache_bytes"] > 0
        assert row["method_peak_above_bytes"] > 0
    json.dumps(rows, allow_nan=False)
    assert len({tuple(sorted(row)) for row in rows}) == 1
    assert set(rows[0]) <= set(TIMING.columns)


def test_rows_of_both_temperatures_have_a_place_in_the_table(tiny):
    rows = timed(tiny(), Drafting())
    leading = {
        key: {"number": 1.0, "integer": 0, "boolean": False, "any": 1}.get(each.dtype, "x")
        for key, each in IDENTITY.items()
    }
    validate("timing.csv", [leading | row for row in rows])
    with pytest.raises(UserError, match="stand twice"):
        validate("timing.csv", [leading | row for row in [*rows, rows[-1]]])
    before = [{k: v for k, v in (leading | r).items() if k != "temperature"} for r in rows[:2]]
    assert validate("timing.csv", before)["temperature"].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("without", [None, 1])
def test_as_many_tokens_as_dense_and_greedily_the_same(tiny, without):
    model = tiny()
    model.generation_config.eos_token_id = list(range(90))  # which stops nothing
    side = Drafted(model, Drafting(without=without, length=3), list(windows().split(1)), 10)
    for text in windows().split(1):
        with torch.no_grad():
            token, past = first_token(model, text)
            own = []
            for _ in range(10):
                token = decode(model, past, token, 1)
                own.append(int(token))
        assert written(side) == own
    assert side.kept[0]["decode"] == sum(
        each.numel() * 4 for layer in past.layers for each in (layer.keys, layer.values)
    )


def test_what_is_drawn_of_a_text_is_drawn_again(tiny):
    model, texts = tiny(), list(windows().split(1))
    side = Drafted(model, Drafting(), texts, 10, sample=True)
    first, second, again, _ = (written(side) for _ in range(4))
    assert first == again
    assert first != second
    assert len(first) == 10
    dense, drawn = Side(model, None, texts, 10, sample=True), []
    handle = model.register_forward_pre_hook(lambda m, args: drawn.append(args[0]))
    with torch.no_grad():
        for _ in range(3):
            with dense.around():
                dense.run()
    handle.remove()
    one, other, anew = (torch.cat(drawn[k : k + 11], 1).tolist() for k in (0, 11, 22))
    assert one == anew != other
    with torch.no_grad():
        likeliest = Side(model, None, texts, 10)
        with likeliest.around():
            assert likeliest._choose is not dense._choose


def test_other_batches_are_left_out_with_one_warning(tiny, monkeypatch):
    level = Level((Shape(1, 12, 2), Shape(2, 6, 2), Shape(2, 12, 0)), 1, 6, 6, 0, 0.0, 0.0)
    with pytest.warns(UserWarning, match="one sequence after another") as warned:
        rows = timed(tiny(), Drafting(), level=level)
    assert len(warned) == 1
    assert {(row["batch"], row["new_tokens"]) for row in rows} == {(1, 0), (1, 2)}
    with pytest.raises(UserError, match="no shape has a batch of 1; add one, such as 1x512"):
        timed(tiny(), Drafting(), level=Level(level.shapes[1:], 1, 6, 6, 0, 0.0, 0.0))
    monkeypatch.setitem(LEVELS, "quick", Level((Shape(1, 12, 2),), 1, 6, 6, 0, 0.0, 0.0))
    assert timed(tiny(), Drafting(), level="quick")[-1]["new_tokens"] == STEPS


def test_the_command_s_warnings_are_sentences(tiny, capsys, monkeypatch):
    monkeypatch.setattr(door, "PACKAGE", Path(__file__).parent)  # whose lines called
    level = Level((Shape(1, 12, 2), Shape(2, 6, 2)), 1, 6, 6, 0, 0.0, 0.0)
    with warnings.catch_warnings(record=True) as others, door.own_warnings_as_sentences():
        warnings.simplefilter("always")
        timed(tiny(), Drafting(), level=level)
        warnings.warn_explicit("of others", UserWarning, "elsewhere.py", 1)
    assert "of others" in [str(each.message) for each in others]
    own = "timing 2 x 6 + 2 is left out: drafting drafts for one sequence after another\n"
    assert capsys.readouterr().err == "dyndepth.timing: " + own


def test_likelihoods_are_dense_s(tiny):
    model, (text, *_) = tiny(), windows().tolist()
    with attach(model, Drafting(without=None)) as trace:
        ((_, ((found, *_), *_)),) = score(model, trace, [Group("d0", text[:7], [text[7:]])], 1)
    check = [(text[:7], text[7:], found[0] if isinstance(found, tuple) else found, "d0")]
    rows = timed(model, Drafting(), check=check)
    assert {row["reproduces_scores"] for row in rows} == {True}


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_bytes_that_are_read_are_those_of_the_plan(family):
    model = make_tiny(family)
    plan = torch.ones(4, 2, dtype=torch.bool)
    assert read_costs(model, Drafting(without=None), [5, 6, 7], 11) == DraftCosts(1.0, 1.0)
    plan[1] = False
    found = read_costs(model, Drafting(), [5, 6, 7], 11)
    assert found.draft == pytest.approx(by_bytes(model, plan).draft, rel=0.005)
    assert found.draft < 1
    assert read_costs(model, Drafting(length=0), [5, 6, 7], 4).draft == 0.0
    assert not any(each._forward_pre_hooks for each in model.modules())


def test_blocks_that_are_run_again_are_read_by_verifications(tiny):
    class Trying(Drafting):
        reads_states = True

        def verified(self, verdict):
            for layer in (0, 2):
                verdict.rerun(layer, verdict.states[:3])

    model, plan = tiny(), torch.ones(4, 2, dtype=torch.bool)
    plan[1] = False
    # Rounds of the whole model's own drafts: 4, 4 and 0 tokens; after the last nothing is run.
    again = float(step_bytes(model).blocks[[0, 2]].sum()) / step_bytes(model).step
    found = read_costs(model, Trying(without=None), [5, 6, 7], 11)
    assert found.draft == 1.0
    assert found.verify == pytest.approx(1 + 2 / 3 * again, rel=0.005)
    thinned = read_costs(model, Trying(), [5, 6, 7], 11)
    assert thinned.draft == pytest.approx(by_bytes(model, plan).draft, rel=0.005)


def test_a_prediction_is_the_cost_model_s():
    drafts = [Round((7,) * 4, accepted, (7,) * (accepted + 1)) for accepted in (4, 1, 0, 3, 4)]
    costs = DraftCosts(0.3, 1.2)
    acceptance = 12 / (12 + 3)
    assert predicted(drafts, costs) == pytest.approx(predicted_speedup(acceptance, 4, costs))
    # A round without a draft costs a verification and writes one token.
    tokens = sum(acceptance**k for k in range(5)) * 5 + 1
    assert predicted([*drafts, Round((), 0, (7,))], costs) == pytest.approx(
        tokens / (5 * (4 * 0.3 + 1.2) + 1.2)
    )
    assert predicted([Round((), 0, (7,))], costs) is None


@pytest.mark.parametrize(("seconds", "suspect"), [(3.0, False), (4.5, True)])
def test_faster_than_flops_is_no_fault_and_faster_than_its_rounds_is(
    tiny, monkeypatch, seconds, suspect
):
    def run(self):
        Side.run(self)
        self.watch.host["decode"][-1] = 1.0

    class Dense(Side):
        def run(self):
            super().run()
            self.watch.host["decode"][-1] = seconds

    monkeypatch.setattr(Drafted, "run", run, raising=False)
    monkeypatch.setattr(rounds.passes, "Side", Dense)
    row = timed(tiny(), Drafting(without=None))[1]
    assert row["wall_speedup"] == seconds
    assert row["suspect"] is suspect


def test_the_seconds_of_a_fit_stand_apart(tiny):
    method = Drafting()
    method.fit_seconds = 12.0
    assert timed(tiny(), method)[-1]["fit_s"] == 12.0


def test_on_a_gpu_the_clock_of_a_lap_waits_for_it(tiny, monkeypatch):
    side = Drafted(tiny(), Drafting(), [windows(1)], 10)
    before = written(side)
    drained = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda place: drained.append(str(place)))
    side.place = torch.device("cuda:1")
    with torch.no_grad():
        found = side.laps(1)
    assert len(side.rounds) == 1 + module.LAPS
    assert [token for each in found for token in each.tokens] == before * module.LAPS
    assert drained == ["cuda:1"] * len(drained)
    assert len(drained) >= 3 * len(found)
    calls = len(drained)
    written(side)  # timed passes do not wait
    assert len(drained) == calls


def test_by_graphs_drafts_are_repeated_and_verifications_run_as_ever(tiny, monkeypatch):
    class Graphs(recordings.Graphs):
        def __init__(self):
            super().__init__(StandIn())

    monkeypatch.setattr(recordings, "Graphs", Graphs)
    rows = timed(tiny(), Drafting(without=None), mode="graphs")
    assert [(row["phase"], row["temperature"]) for row in rows] == [
        ("decode", 0.0),
        ("decode", 1.0),
    ]
    assert {row["acceptance"] for row in rows} == {1.0}
    assert {row["method_peak_above_bytes"] for row in rows} == {None}


def test_by_graphs_steps_that_could_not_be_repeated_are_refused(tiny, monkeypatch):
    @dataclass(kw_only=True)
    class Substituting(Drafting):
        """Graphs hold no update in the place of a skipped one, unless the method is capturable."""

        def instead(self, layer, sublayer, rows):
            return rows * 0.0

    class Graphs(recordings.Graphs):
        def __init__(self):
            super().__init__(StandIn())

    monkeypatch.setattr(recordings, "Graphs", Graphs)
    with pytest.raises(UserError, match="take mode='eager'"):
        timed(tiny(), Substituting(), mode="graphs")
    with Graphs() as graphs:
        graphs.others, graphs.steps = 3, 5
        rounds.check_repeated(Drafting(), {"mode": graphs}, steps=True, verified=3)
        with pytest.raises(UserError, match="1 decode steps could not be repeated"):
            rounds.check_repeated(Drafting(), {"mode": graphs}, steps=True, verified=2)


def test_the_console_tells_of_drafts_in_80_columns(tiny, monkeypatch):
    terminal = Console(force_terminal=True, no_color=True, width=80, file=io.StringIO())
    monkeypatch.setattr(commands, "console", lambda: terminal)
    show_timing("drafting", timed(tiny(), Drafting(without=None)))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", terminal.file.getvalue())
    lines = plain[plain.index("Drafts, verified") :].splitlines()
    assert max(map(len, lines)) <= 80
    told = [line.split() for line in lines if "100%" in line]
    assert [line[:4] for line in told] == [["1x12+11", t, "100%", "3.67"] for t in ("0", "1")]
    assert [line[-2] for line in told] == ["1.000"] * 2  # predicted by bytes


def test_methods_that_draft_nothing_say_nothing_of_drafts(tiny):
    from gating import GivenPlan, plan_without

    rows = timed(tiny(), GivenPlan(plan=plan_without(4, (1, 0))))
    assert {row["temperature"] for row in rows} == {0.0}
    for key in module.no_columns().keys() - {"temperature"}:
        assert {row[key] for row in rows} == {None}


def test_a_sweep_wants_times_of_one_sequence_alone(monkeypatch):
    both, several = (Shape(1, 64, 4), Shape(8, 64, 4)), (Shape(8, 64, 4),)
    known = {"drafting": Drafting, "dense": DynamicDepthMethod}
    monkeypatch.setattr(registry, "methods", lambda: known)
    monkeypatch.setattr(registry, "method_class", known.__getitem__)
    assert timeable(both, "drafting") == both[:1]
    assert timeable(several, "drafting") == ()
    assert timeable(both, "dense") == timeable(both, None) == timeable(both, "gone") == both
    cell = Cell({"device": "cpu", "method": "drafting"})
    for shapes, lacking in ((both, both[:1]), (several, several), ((), ())):
        settings = Settings(timing_shapes=shapes)
        assert cell.untimed(wanted(settings, cell)) == {"eager": lacking}
