"""Latency, throughput and memory of timed passes: what follows from what, and bytes by hand."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from gating import Evicted, GivenPlan, RandomMask, plan_without

from dyndepth.results.columns import TIMING
from dyndepth.timing import compiled
from dyndepth.timing.console import show_timing
from dyndepth.timing.latency import speeds
from dyndepth.timing.levels import Level, Shape
from dyndepth.timing.measure import measure
from dyndepth.timing.memory import Peak, cache_bytes, peaks
from dyndepth.timing.pairing import median
from dyndepth.timing.passes import Side

BATCH, LENGTH, STEPS = 2, 6, 3
LAYERS = 4
ONCE = Level((Shape(BATCH, LENGTH, STEPS),), 3, 6, 6, 1, 0.0, 0.0)
WITHOUT_TWO = plan_without(LAYERS, (1, 0), (1, 1), (2, 0), (2, 1))


def windows() -> torch.Tensor:
    return torch.randint(3, 90, (6, LENGTH), generator=torch.Generator().manual_seed(0))


def timed(model, method, **changes):
    rows = measure(model, method, windows(), level=ONCE, progress=False, **changes)
    return {row["phase"]: row for row in rows}


def a_token(model) -> int:
    """Bytes of keys and values of one token in one layer, by hand."""
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    return 2 * config.num_key_value_heads * head * 4  # float32


@dataclass(kw_only=True)
class Projecting(RandomMask):
    kv_policy = "project"


@pytest.mark.parametrize(
    ("method", "prompt", "steps"),
    [
        # Blocks that are dropped in both phases keep nothing at all.
        (GivenPlan(plan=WITHOUT_TWO), LAYERS - 2, LAYERS - 2),
        # In the generation alone: the prompt's stay, and are not extended.
        (GivenPlan(plan=WITHOUT_TWO, phases="generation"), LAYERS, LAYERS - 2),
        # Tokens that skip are projected all the same.
        (Projecting(), LAYERS, LAYERS),
    ],
    ids=["drop", "prompt_only", "project"],
)
def test_cache_bytes_are_those_of_the_kept_tokens(tiny, method, prompt, steps):
    model = tiny()
    found, one = timed(model, method), a_token(model)
    dense = LAYERS * BATCH * one
    assert found["prefill"]["dense_cache_bytes"] == dense * LENGTH
    assert found["decode"]["dense_cache_bytes"] == dense * (LENGTH + STEPS)
    assert found["prefill"]["method_cache_bytes"] == prompt * BATCH * one * LENGTH
    kept = prompt * LENGTH + steps * STEPS
    assert found["decode"]["method_cache_bytes"] == kept * BATCH * one


def test_cache_bytes_of_who_evicts_are_those_of_the_executed_tokens(tiny):
    model, method = tiny(), Evicted()
    found, one = timed(model, method), a_token(model)
    for phase, tokens in (("prefill", LENGTH), ("decode", LENGTH + STEPS)):
        executed = int(method.table[:tokens, :, 0].sum())
        assert found[phase]["method_cache_bytes"] == executed * BATCH * one


def test_of_a_buffer_the_filled_part_counts_and_an_unknown_cache_has_no_bytes():
    class Layer:
        keys = torch.zeros(1, 2, 64, 8)[:, :, :5]
        values = None

    class Cache:
        layers = (Layer(), object())

    assert cache_bytes(Cache()) == 2 * 5 * 8 * 4
    assert cache_bytes(object()) is None


def test_latency_and_throughput_follow_from_the_medians(tiny):
    found = timed(tiny(), GivenPlan(plan=WITHOUT_TWO))
    for side in ("dense", "method"):
        prompt, step = found["prefill"], found["decode"]
        assert prompt[f"{side}_ttft_ms"] == pytest.approx(1000 * prompt[f"{side}_median_s"])
        assert step[f"{side}_tpot_ms"] == pytest.approx(1000 * step[f"{side}_median_s"])
        rates = BATCH * LENGTH / prompt[f"{side}_median_s"], BATCH / step[f"{side}_median_s"]
        assert prompt[f"{side}_tokens_per_s"] == pytest.approx(rates[0])
        assert step[f"{side}_tokens_per_s"] == pytest.approx(rates[1])
        assert prompt[f"{side}_tpot_ms"] is step[f"{side}_ttft_ms"] is None
        for row, name in ((prompt, "ttft_ms"), (step, "tpot_ms"), (step, "tokens_per_s")):
            low, value, high = (row[f"{side}_{name}{end}"] for end in ("_low", "", "_high"))
            assert 0 < low <= value <= high
    assert set(found["decode"]) <= set(TIMING.columns)
    assert found["decode"]["compiled_error"] is found["decode"]["compiled_tpot_ms"] is None


def test_the_interval_of_a_rate_is_that_of_the_time_turned_over():
    seconds = [0.5, 0.4, 0.8, 0.5, 0.6, 0.5]
    found = speeds("dense", "decode", Shape(4, 8, 10), seconds)
    assert [found[f"dense_tpot_ms{end}"] for end in ("_low", "", "_high")] == [40.0, 50.0, 80.0]
    rates = [found[f"dense_tokens_per_s{end}"] for end in ("_low", "", "_high")]
    assert rates == pytest.approx([50.0, 80.0, 100.0])
    assert found["dense_ttft_ms"] is None
    one = speeds("dense", "prefill", Shape(4, 8, 10), [0.5])
    assert (one["dense_ttft_ms"], one["dense_ttft_ms_low"]) == (500.0, None)  # of too few
    assert median(seconds).median == 0.5


def test_the_first_token_s_choice_is_in_the_first_lap(tiny, monkeypatch):
    """As one who waits for it has it."""
    side, laps = Side(tiny(), None, [windows()[:1]], 1), []
    argmax = torch.Tensor.argmax

    def watched(*args, **how):
        laps.append(dict.fromkeys(side.watch.host))
        return argmax(*args, **how)

    monkeypatch.setattr(torch.Tensor, "argmax", watched)
    with torch.no_grad(), side.around():
        side.run()
    assert [list(done) for done in laps] == [[], ["prefill"]]


def test_peak_memory_is_above_what_was_held_before_the_prompt(tiny):
    model = tiny()
    found = timed(model, GivenPlan(plan=WITHOUT_TWO))
    for row in found.values():
        assert row["dense_peak_bytes"] is row["method_peak_bytes"] is None  # on a CPU
        for side in ("dense", "method"):
            assert row[f"{side}_peak_above_bytes"] >= row[f"{side}_cache_bytes"] > 0
        assert row["method_peak_above_bytes"] < row["dense_peak_above_bytes"]


def test_a_later_part_holds_what_an_earlier_one_left():
    kept = []

    def small():
        kept.append(torch.empty(1024))

    def large():
        kept.append(torch.empty(2048))
        torch.empty(4096)

    found = peaks({"first": small, "second": large}, [torch.device("cpu")])
    assert found == {"first": Peak(4 * 1024, None), "second": Peak(4 * (1024 + 2048 + 4096), None)}
    assert peaks({"first": small}, [torch.device("meta")]) == {}


def test_gpus_tell_their_own_peaks_in_sum(monkeypatch):
    held = {"cuda:0": 100, "cuda:1": 10}
    monkeypatch.setattr(torch.cuda, "synchronize", lambda place: None)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda place: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda place: held[str(place)])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda place: held[str(place)] + 5)
    found = peaks({"all": lambda: None}, [torch.device("cuda:0"), torch.device("cuda:1")])
    assert found == {"all": Peak(above=10, whole=120)}


# --- compiled dense -------------------------------------------------------------------------------


@pytest.fixture
def by_eager(monkeypatch):
    """Compiling without a compiler: graphs are found, and run as they are."""
    monkeypatch.setattr(compiled, "BACKEND", "eager")


def test_compiled_dense_stands_beside_the_eager_pairing(tiny, by_eager, capsys):
    model = tiny()
    found = timed(model, GivenPlan(plan=WITHOUT_TWO), compiled_dense=True)
    for row in found.values():
        assert row["compiled_error"] is None
        low, value, high = (row[f"speedup_over_compiled{end}"] for end in ("_low", "", "_high"))
        assert 0 < low <= value <= high
        assert row["wall_speedup"] > 0
        assert row["total_speedup"] > 1  # dense is the stock model, as ever
    assert found["prefill"]["compiled_ttft_ms"] > 0
    assert found["decode"]["compiled_tokens_per_s"] > 0
    assert not hasattr(model, "_orig_mod")
    show_timing("one", list(found.values()))
    printed = capsys.readouterr().out
    assert "compiled dense" in printed
    assert "no times" not in printed


def test_what_does_not_compile_says_why_and_costs_no_other_time(tiny, monkeypatch, capsys):
    def broken(graph, inputs):
        raise RuntimeError("no C++ compiler\nand more")

    monkeypatch.setattr(compiled, "BACKEND", broken)
    found = timed(tiny(), GivenPlan(plan=WITHOUT_TWO), compiled_dense=True)
    for row in found.values():
        assert "no C++ compiler" in row["compiled_error"]
        assert "\n" not in row["compiled_error"]
        assert row["speedup_over_compiled"] is row["compiled_tokens_per_s"] is None
        assert row["wall_speedup"] > 0
    show_timing("one", list(found.values()))
    assert "dense under torch.compile has no times:" in capsys.readouterr().out


def test_compiling_while_it_is_timed_is_no_time_of_it(tiny, by_eager, monkeypatch):
    counted = iter(range(100))
    side = compiled.CompiledDense(tiny(), [windows()[:1]], 1)
    monkeypatch.setattr(compiled, "_graphs", lambda: next(counted))
    with side.watched():
        pass
    assert side.fault == "torch.compile compiled anew while it was timed"
    other = compiled.CompiledDense(tiny(), [windows()[:1]], 1)
    monkeypatch.setattr(other, "run", lambda: None)
    other.settle()
    assert other.fault == "torch.compile was not done after 4 passes"


# --- what is printed ------------------------------------------------------------------------------


def test_no_time_is_printed_without_its_interval(tiny, capsys, monkeypatch):
    from dyndepth.common import commands

    monkeypatch.setattr(commands, "PIPE_WIDTH", 200)
    rows = timed(tiny(), GivenPlan(plan=WITHOUT_TWO))
    show_timing("one", list(rows.values()))
    lines = capsys.readouterr().out.splitlines()
    table = lines[next(n for n, line in enumerate(lines) if "Latency" in line) :]
    for what in ("TTFT ms", "TPOT ms", "tokens/s"):
        (line,) = (line for line in table if f" {what} " in line)
        assert line.count("[") == 3  # dense, method, ratio
    assert (
        sum("cache MB" in line for line in table) == sum("peak MB" in line for line in table) == 1
    )
