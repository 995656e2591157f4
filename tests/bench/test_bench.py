"""The bench: its shapes and goals on tiny models and given numbers; its routes: what is timed is
what the one-by-one scores are. No test asserts a speed."""

from __future__ import annotations

import argparse
import json
import math

import pytest
import torch

from dyndepth.bench import __main__ as door
from dyndepth.bench import lines as of_lines
from dyndepth.bench import plans as bench_routes
from dyndepth.bench import shapes
from dyndepth.bench.goals import GOALS, MET, MISSED, UNCERTAIN, Goal, check
from dyndepth.common.errors import UserError
from dyndepth.timing import jobs


def test_spaced_blocks_keep_both_ends():
    assert bench_routes.spaced(1, 6) == [0]
    assert bench_routes.spaced(6, 6) == list(range(6))
    assert bench_routes.spaced(4, 30) == [0, 10, 20, 29]
    for count in range(2, 31):
        kept = bench_routes.spaced(count, 30)
        assert len(set(kept)) == count
        assert {kept[0], kept[-1]} == {0, 29}


def test_plans_take_every_depth_three_times():
    plans = bench_routes.spaced_and_random(5)
    assert plans.shape == (15, 5, 2)
    assert plans[..., 0].sum(1).tolist() == [count for count in range(1, 6) for _ in range(3)]
    assert torch.equal(plans[..., 0], plans[..., 1])


def test_computed_counts_beginnings_once():
    plans = torch.zeros(2, 2, 2, dtype=torch.bool)
    plans[:, 0] = True
    plans[1, 1] = True
    assert bench_routes.computed(plans) == 4 / 6


def test_routes_agree_and_are_reported(tiny, tiny_corpus, monkeypatch, capsys):
    monkeypatch.setattr(bench_routes, "loaded", lambda *_, **__: tiny("llama", "sdpa"))
    options = argparse.Namespace(
        dtypes=["float32"],
        model="tiny",
        device="cpu",
        documents=bench_routes.BATCH + 2,
        skipping=["both", "generation"],
    )
    lines = bench_routes.routes(tiny_corpus, options)
    assert list(lines) == ["routes/both/float32", "routes/generation/float32"]
    for line in lines.values():
        assert line["difference"] < 1e-3
        assert line["together_s"] > 0
        assert 0 < line["computed"] < 1
    assert "12 plans on 10 documents" in capsys.readouterr().out


@pytest.mark.parametrize("flag", ["--limit", "--repeats", "--threads"])
def test_wrong_numbers_fail_with_a_sentence(flag, capsys):
    assert door.main(["--parts", "routes", flag, "0"]) == 2
    assert f"{flag} takes a whole number of at least 1, not 0" in capsys.readouterr().err


def test_prompts_kept_whole_are_timed_on_request_alone(monkeypatch):
    asked = []
    monkeypatch.setattr(door, "bench", asked.append)
    assert door.main([]) == door.main(["--skipping", "generation"]) == 0
    assert [options.skipping for options in asked] == [["both"], ["generation"]]


def test_shapes_are_measured_and_printed(tiny, tiny_corpus, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("dyndepth.models.loading.loaded", lambda *_: tiny("llama", "sdpa"))
    monkeypatch.setattr(shapes, "PHASES", {"prefill_1x512": (1, 24), "decode_8": (2, 12)})
    works = ["all_execute", "static_15", "mask_50", "mask_50_mlp", shapes.REFERENCE]
    works += ["mask_50_blocks", "mask_50_evicted"]
    options = argparse.Namespace(
        dtypes=["float32"],
        phases=["prefill_1x512", "decode_8"],
        modes=["eager"],
        seconds=None,
        output_path=tmp_path / "lines.json",
        works=works,
        model="tiny",
        device="cpu",
        repeats=6,
    )
    lines = shapes.shapes(tiny_corpus, options).lines
    assert list(lines) == [f"{work}/{phase}/float32" for phase in options.phases for work in works]
    for line in lines.values():
        assert line["low"] <= line["speedup"] <= line["high"]
        assert line["efficiency"] == pytest.approx(line["speedup"] / line["flop_ideal"])
        assert line["peak_ratio"] > 0
    ideals = {name: line["flop_ideal"] for name, line in lines.items()}
    assert ideals["all_execute/decode_8/float32"] == 1
    assert ideals[f"{shapes.REFERENCE}/prefill_1x512/float32"] == 1
    assert ideals["mask_50/decode_8/float32"] > ideals["mask_50_mlp/decode_8/float32"] > 1
    # Evicted keys are not computed, and cost no scores.
    assert ideals["mask_50_evicted/prefill_1x512/float32"] > (
        1.02 * ideals["mask_50_blocks/prefill_1x512/float32"]
    )
    assert lines["all_execute/prefill_1x512/float32"]["peak_ratio"] == pytest.approx(1, abs=0.05)
    out = capsys.readouterr().out
    assert out.count("/float32") == len(lines)
    for name, line in lines.items():
        assert f"{name:43}{of_lines.speed(line)}" in out
    assert "noisy: the interval is wider" in out
    monkeypatch.setattr("dyndepth.timing.jobs.peak_bytes", lambda *_, **__: None)
    options.works, options.phases, options.output_path = ["all_execute"], ["decode_8"], None
    (line,) = shapes.shapes(tiny_corpus, options).lines.values()
    assert math.isnan(line["peak_ratio"])


@pytest.mark.parametrize(("work", "whole"), [("mask_50_attention", 1), ("mask_50_mlp", 0)])
def test_masks_of_one_sublayer_leave_the_other_whole(work, whole, tiny):
    method = jobs.method(work, tiny(), 2, 50)
    method.start(argparse.Namespace(past_length=0, tokens=50, device="cpu"))
    gates = torch.stack([torch.stack(pair) for pair in method.masks])
    assert bool(gates[:, whole].all())
    assert 0.4 < gates[:, 1 - whole].double().mean() < 0.6
    assert work not in of_lines.WORKS


@pytest.fixture
def chosen(tiny, monkeypatch, tmp_path):
    """Options of a small bench."""
    monkeypatch.setattr("dyndepth.models.loading.loaded", lambda *_: tiny("llama", "sdpa"))
    monkeypatch.setattr(shapes, "PHASES", {"prefill_1x512": (1, 24), "decode_8": (2, 12)})
    return argparse.Namespace(
        dtypes=["float32"],
        phases=["prefill_1x512", "decode_8"],
        modes=["eager"],
        seconds=None,
        output_path=tmp_path / "lines.json",
        works=["static_15", "mask_50", shapes.REFERENCE],
        model="tiny",
        device="cpu",
        repeats=6,
    )


def test_lines_are_kept_and_not_measured_again(chosen, tiny_corpus, monkeypatch, capsys, tmp_path):
    """Also by graphs, of the stand-in: every step is repeated, and says what eager steps cost."""
    from recording import StandIn

    monkeypatch.setattr("dyndepth.runtime.graphs.CudaRecorder", lambda device: StandIn())
    options, works = chosen, chosen.works
    options.modes = ["eager", "graphs"]
    lines = shapes.shapes(tiny_corpus, options).lines
    assert len(lines) == 3 + 3 + 2
    for work in works[:2]:
        by_graphs = lines[f"{work}/decode_8/float32/graphs"]
        for ideal in ("flop_ideal", "byte_ideal"):
            assert by_graphs[ideal] == lines[f"{work}/decode_8/float32"][ideal]
    assert "mask_50/decode_8/float32/graphs" in capsys.readouterr().out
    monkeypatch.setattr(shapes, "_measure", None)
    assert repr(shapes.shapes(tiny_corpus, options).lines) == repr(lines)  # NaN is none
    assert capsys.readouterr().out.count("  kept\n") == len(lines)
    options.output_path, options.seconds = tmp_path / "other.json", 1
    monkeypatch.setattr(shapes.time, "monotonic", iter(range(0, 1000, 5)).__next__)
    record = shapes.shapes(tiny_corpus, options)
    assert record.lines == {}
    assert record.left == dict.fromkeys(lines, of_lines.NO_TIME)
    assert json.loads(options.output_path.read_text())["left"] == record.left
    assert "no time left for decode_8 by graphs" in capsys.readouterr().out
    for text in ("{", '{"about": {"model": "another", "code": "0"}, "bench": {}}'):
        options.output_path.write_text(text)
        with pytest.raises(UserError, match="name another"):
            shapes.shapes(tiny_corpus, options)


def test_lines_of_other_conditions_are_not_kept(chosen, tiny_corpus, monkeypatch):
    others = {
        "device_name": "another card",
        "threads": 77,
        "attn_implementation": "another",
        "revision": "another",
        "repeats": 7,
        "gather_limits": {"float32": "0 0 0"},
    }
    chosen.works, chosen.phases = ["static_15"], ["decode_8"]
    shapes.shapes(tiny_corpus, chosen)
    found = json.loads(chosen.output_path.read_text())
    monkeypatch.setattr(shapes, "_measure", None)
    for hint in ("load_average", "gpu", "dtype"):
        chosen.output_path.write_text(json.dumps(found | {"about": found["about"] | {hint: "x"}}))
        shapes.shapes(tiny_corpus, chosen)
    for key, value in others.items():
        chosen.output_path.write_text(json.dumps(found | {"about": found["about"] | {key: value}}))
        with pytest.raises(UserError, match=f"lines of another {key} .*; name another, or remove"):
            shapes.shapes(tiny_corpus, chosen)


def test_what_was_not_measured_is_null_in_json(chosen, tiny_corpus, monkeypatch):
    monkeypatch.setattr("dyndepth.timing.jobs.peak_bytes", lambda *_, **__: None)
    shapes.shapes(tiny_corpus, chosen)
    text = chosen.output_path.read_text()
    assert "NaN" not in text
    assert '"peak_ratio": null' in text
    again = shapes.shapes(tiny_corpus, chosen).lines
    assert all(math.isnan(line["peak_ratio"]) for line in again.values())


def test_a_phase_without_memory_is_left_out_alone(chosen, tiny_corpus, monkeypatch, capsys):
    stock = shapes._measure

    def short(model, shape, *rest):
        if "Prefill" in type(shape).__name__:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stock(model, shape, *rest)

    monkeypatch.setattr(shapes, "_measure", short)
    record = shapes.shapes(tiny_corpus, chosen)
    assert "prefill_1x512 by eager in float32 is left out" in capsys.readouterr().out
    assert set(record.lines) == {f"{work}/decode_8/float32" for work in chosen.works}
    assert record.left == {
        f"{work}/prefill_1x512/float32": of_lines.NO_MEMORY for work in chosen.works
    }


def test_rounds_are_shown_under_the_name_of_the_phase(chosen, tiny_corpus, monkeypatch):
    from tqdm import tqdm

    seen = []

    class Bar(tqdm):
        def __init__(self, **how):
            super().__init__(**how | {"disable": False})

        def update(self, n=1):
            seen.append((self.desc, self.n + n, self.total))
            return super().update(n)

    monkeypatch.setattr("tqdm.tqdm", Bar)
    shapes.shapes(tiny_corpus, chosen)
    first = [each for each in seen if each[0].startswith("prefill_1x512 by eager in float32")]
    assert [n for _, n, _ in first] == list(range(1, 7))
    assert {total for *_, total in seen} == {6}


def line(speedup=1.0, flop_ideal=1.0, high=None, peak_ratio=1.0):
    return {
        "speedup": speedup,
        "flop_ideal": flop_ideal,
        "efficiency": speedup / flop_ideal,
        "high": speedup if high is None else high,
        "peak_ratio": peak_ratio,
    }


def test_no_goal_speaks_of_what_was_not_measured():
    measured = {"all_execute/decode_1/float32": line(peak_ratio=float("nan"))}
    assert [each.goal.quantity for each in check(measured)] == ["speedup"]


@pytest.mark.parametrize(
    ("goal", "measured", "verdict"),
    [
        (Goal("*", "efficiency", 0.9), line(1.8, 2.0), MET),
        (Goal("*", "efficiency", 0.9), line(1.7, 2.0, high=1.82), UNCERTAIN),
        (Goal("*", "efficiency", 0.9), line(1.7, 2.0, high=1.75), MISSED),
        (Goal("*", "efficiency", 0.9), line(1.7, 2.0, high=float("nan")), MISSED),
        (Goal("*", "speedup", 0.98), line(0.97, high=0.99), UNCERTAIN),
        (Goal("*", "peak_ratio", 1.05, at_most=True), line(peak_ratio=1.05), MET),
        (Goal("*", "peak_ratio", 1.05, at_most=True), line(peak_ratio=1.06), MISSED),
        (Goal("*", "ratio", 1.05, at_most=True), {"ratio": 1.04, "low": 1.0}, MET),
        (Goal("*", "ratio", 1.05, at_most=True), {"ratio": 1.08, "low": 1.04}, UNCERTAIN),
        (Goal("*", "ratio", 1.05, at_most=True), {"ratio": 1.08, "low": 1.06}, MISSED),
        (Goal("*", "ratio", 1.05, at_most=True), {"ratio": 1.08, "low": math.nan}, MISSED),
    ],
)
def test_a_goal_is_met_missed_or_uncertain(goal, measured, verdict):
    (found,) = check({"mask_50/decode_1/float32": measured}, [goal])
    assert found.verdict == verdict
    assert str(found).endswith(verdict)


def test_every_goal_speaks_of_lines_that_there_are():
    names = [
        f"{work}/{phase}/{dtype}"
        for work in of_lines.WORKS + of_lines.MORE_WORKS
        for phase in shapes.PHASES
        for dtype in door.DTYPES
    ]
    checks = list(check({name: line() for name in names}))
    assert {each.goal for each in checks} == set(GOALS)
    assert not any(each.line.startswith(shapes.REFERENCE) for each in checks)
    spoken = {(each.line, each.goal.quantity) for each in checks}
    assert len(spoken) == len(checks)
    assert ("mask_50/decode_8/bfloat16", "speedup") in spoken
    assert ("mask_50_mlp/decode_8/bfloat16", "speedup") not in spoken


def test_missed_goals_fail_only_where_asked(monkeypatch, capsys):
    found = {"all_execute/decode_1/float32": line(0.5)}
    monkeypatch.setattr(door, "shapes", lambda *_: argparse.Namespace(lines=found, left={}))
    monkeypatch.setattr("dyndepth.models.loading.load_tokenizer", lambda *_: None)
    monkeypatch.setattr("dyndepth.data.corpus.load_corpus", lambda *_: None)
    monkeypatch.setattr("dyndepth.common.machine.steady_allocator", lambda: "")
    codes = [
        door.main(["--parts", "shapes", *more])
        for more in ([], ["--check"], ["--check", "print"], ["--check", "fail"])
    ]
    assert codes == [0, 0, 0, 1]
    assert capsys.readouterr().out.count("1 met, 0 missed within noise, 1 missed") == 3
    assert door.main(["--parts", "routes", "--check"]) == 2
    assert "add it to --parts" in capsys.readouterr().err


def test_a_shape_is_measured_on_random_tokens(tiny, tmp_path, monkeypatch, capsys):
    (tmp_path / "config.json").write_text(json.dumps(tiny().config.to_dict()))
    monkeypatch.setattr(shapes, "PHASES", {"prefill_1x512": (1, 24), "decode_8": (2, 12)})
    words = ["--works", "static_15", "--phases", "prefill_1x512", "decode_8", "--repeats", "6"]
    assert door.main(["--model", f"shape:{tmp_path}", "--device", "cpu", *words]) == 0
    out = capsys.readouterr().out
    assert "it reads random tokens" in out
    found = json.loads(out.splitlines()[-1])
    assert list(found) == ["bench"]
    assert len(found["bench"]) == 4


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--device", "spread"], "the bench measures one device; name it in place of"),
        (["--mode", "graphs"], "graphs need a CUDA device; take --mode eager"),
        (["--mode", "both"], "graphs need a CUDA device; take --mode eager"),
        (["--output_path", "/proc/x/y.json"], "'/proc/x' cannot be written: "),
        (["--output_path", "/"], "'/' is a folder; name the JSON to write"),
        (["--drafts", "dense"], "--drafts takes methods that speculate, and dense does not"),
        (["--parts", "routes", "--drafts", "dense"], "--drafts is for the part lossless"),
        (["--output_path", "/etc/passwd/y.json"], "'/etc/passwd' is a file"),
    ],
)
def test_wrong_words_fail_before_anything_is_loaded(words, told, monkeypatch, capsys):
    monkeypatch.setattr("dyndepth.data.corpus.load_corpus", None)
    monkeypatch.setattr("dyndepth.models.loading.load_tokenizer", None)
    assert door.main(["--device", "cpu", *words]) == 2
    assert told in capsys.readouterr().err


def test_graphs_without_a_decode_step_are_refused():
    options = argparse.Namespace(
        device="cuda", phases=["prefill_1x512"], modes=("graphs",), works=["mask_50"]
    )
    with pytest.raises(UserError, match="mask_50, prefill_1x512 is left; add a phase of decode"):
        shapes.passes(options)
    options.phases, options.works = ["decode_1"], [shapes.REFERENCE]
    with pytest.raises(UserError, match="take --mode eager"):
        shapes.passes(options)
    options.modes = ("eager", "graphs")
    assert shapes.passes(options) == [("decode_1", "eager"), ("decode_1", "graphs")]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--check"], "set for the embedded model, not for shape:mistral-7b"),
        (["--parts", "shapes", "routes", "sweep"], "routes and sweep is to score text"),
        (["--parts", "evaluation"], "evaluation is to score text; give --parts shapes"),
        (["--parts", "lossless", "--drafts", "dense"], "has no text for --drafts"),
    ],
)
def test_what_needs_text_or_goals_takes_no_shape(words, told, capsys):
    assert door.main(["--model", "shape:mistral-7b", "--device", "cpu", *words]) == 2
    assert told in capsys.readouterr().err
