"""Structure and honesty of timed runs, on tiny models; no test asserts a speed."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from gating import GivenPlan, RandomMask, plan_without

from dyndepth.common.errors import UserError
from dyndepth.evaluation.scoring import Group, score
from dyndepth.method import DynamicDepthMethod
from dyndepth.runtime.attach import attach
from dyndepth.timing import __main__ as door
from dyndepth.timing import passes
from dyndepth.timing.levels import LEVELS, Level, Shape
from dyndepth.timing.measure import measure
from dyndepth.timing.passes import Side, Stopwatch, decode, prefill, rescore

SHORT = Level((Shape(1, 12, 3), Shape(2, 6, 2)), 3, 6, 6, 1, 0.0, 0.0)
ONE = Level((Shape(1, 12, 1),), 1, 6, 6, 1, 0.0, 0.0)
HALF = GivenPlan(plan=plan_without(4, (1, 0), (1, 1), (2, 0), (2, 1)))
GENERATION = GivenPlan(plan=HALF.plan, phases="generation")


def windows(count: int = 6, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


def timed(model, method, level=SHORT, **changes):
    return measure(model, method, windows(), level=level, progress=False, **changes)


@dataclass(kw_only=True)
class Watching(DynamicDepthMethod):
    """Executes everything and writes down every forward that it sees."""

    name = "watching"
    granularity = "static"
    paper = "test"

    def start(self, context):
        self.seen = [
            *getattr(self, "seen", []),
            (context.phase, context.tokens, context.past_length),
        ]
        self.documents = [*getattr(self, "documents", []), tuple(context.documents or ())]
        return torch.ones(context.layers, 2, dtype=torch.bool)


def test_one_row_a_phase_and_shape_with_all_its_columns(tiny):
    rows = timed(tiny(), HALF)
    assert [(r["phase"], r["batch"], r["length"], r["new_tokens"]) for r in rows] == [
        ("prefill", 1, 12, 0),
        ("decode", 1, 12, 3),
        ("prefill", 2, 6, 0),
        ("decode", 2, 6, 2),
    ]
    for row in rows:
        assert row["repeats"] == 6
        assert row["wall_speedup_low"] <= row["wall_speedup"] <= row["wall_speedup_high"]
        assert row["wall_efficiency"] == pytest.approx(row["wall_speedup"] / row["total_speedup"])
        assert row["suspect"] is (row["wall_speedup"] > 1.05 * row["total_speedup"])
        assert row["dense_median_s"] > 0
        busy = [row[key] for key in row if "busy" in key or "host_share" in key]
        assert busy == [None] * 5  # of a GPU
        assert row["mode"] == "eager"
        assert (row["device"], row["dtype"], row["threads"]) == (
            "cpu",
            "float32",
            torch.get_num_threads(),
        )
        assert row["attn_implementation"] == "sdpa"
        assert row["allocator"]
        assert row["device_name"]
        assert row["attach_s"] > 0
        assert row["reproduces_scores"] is None
    assert len({tuple(row) for row in rows}) == 1
    json.dumps(rows, allow_nan=False)


def test_flops_are_those_of_the_timed_phase(tiny):
    model = tiny()
    prompt, step, *_ = timed(model, GENERATION)
    assert prompt["block_speedup"] == prompt["total_speedup"] == 1.0
    assert step["block_speedup"] == pytest.approx(2.0)
    assert 1.0 < step["total_speedup"] < step["block_speedup"]
    both = timed(model, HALF)
    assert both[0]["block_speedup"] == pytest.approx(2.0)
    with attach(model, RandomMask(rate=0.5)) as trace, torch.no_grad():
        prefill(model, windows(1))
        totals = trace.totals("prompt")
    masked = timed(model, RandomMask(rate=0.5), ONE)[0]
    assert masked["total_speedup"] == pytest.approx(
        totals["dense_total_flops"] / totals["total_flops"]
    )


def test_prefill_starts_from_nothing_and_decode_steps_over_its_cache(tiny):
    method = Watching()
    timed(tiny(), method, level=Level((Shape(1, 12, 3),), 1, 6, 6, 1, 0.0, 0.0))
    one_pass = [("prompt", 12, 0), *(("generation", 1, 12 + i) for i in range(3))]
    passes_run, rest = divmod(len(method.seen), 4)
    assert rest == 0
    assert passes_run >= 6 + 1
    assert method.seen == one_pass * passes_run


def test_dense_is_the_stock_model_and_both_sides_get_the_same_texts(tiny):
    model = tiny()
    stock = [type(module) for module in model.modules()]
    layer = model.model.layers[0]
    stock_layer = type(layer)
    batches: list[tuple[bool, tuple]] = []

    def watch(module, args):
        if args[0].shape[1] > 1:
            batches.append((type(layer) is not stock_layer, tuple(args[0].flatten().tolist())))

    handle = model.register_forward_pre_hook(watch)
    timed(model, HALF, level=Level((Shape(2, 12, 1),), 3, 6, 6, 0, 0.0, 0.0))
    handle.remove()
    dense = [tokens for attached, tokens in batches if not attached]
    own = [tokens for attached, tokens in batches if attached]
    assert dense == own
    assert len(dense) == 6 + 1  # and one for its memory
    assert len(set(dense)) == 3
    assert [type(module) for module in model.modules()] == stock


def test_end_of_sequence_stops_nothing(tiny):
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight.zero_()
    model.generation_config.eos_token_id = 0  # what argmax finds among equal logits
    side = Side(model, None, [windows(1)], 5)
    calls = []
    handle = model.register_forward_pre_hook(lambda m, args: calls.append(args[0].tolist()))
    with torch.no_grad(), side.around():
        side.run()
    handle.remove()
    assert calls[1:] == [[[0]]] * 5


def test_decode_equals_generate(tiny):
    model, tokens = tiny(), windows(2)
    fed = []
    for method in (HALF, GENERATION, RandomMask(rate=0.6)):
        with attach(model, method), torch.no_grad():
            logits, cache = prefill(model, tokens)
            handle = model.register_forward_pre_hook(lambda m, args: fed.append(args[0]))
            last = decode(model, cache, logits.argmax(-1, keepdim=True), 4)
            handle.remove()
            expected = model.generate(
                tokens, max_new_tokens=5, min_new_tokens=5, do_sample=False, eos_token_id=None
            )
        assert torch.equal(torch.cat([*fed, last], 1), expected[:, 12:])
        fed.clear()


def test_rows_of_a_batch_are_documents_of_their_own(tiny):
    method = Watching()
    timed(tiny(), method, level=Level((Shape(2, 6, 1),), 3, 6, 6, 0, 0.0, 0.0))
    assert all(len(set(names)) == 2 for names in method.documents)
    assert len(set(method.documents)) == 3


@pytest.fixture
def scored(tiny):
    """A model and documents with the scores that the evaluation gives them, by method."""
    model = tiny()
    tokens = windows(3, 14).tolist()
    cuts = (8, 5, 13)
    groups = [
        Group(f"d{i}", row[:cut], [row[cut:]])
        for i, (row, cut) in enumerate(zip(tokens, cuts))  # noqa: B905
    ]

    def documents(method):
        with attach(model, method) as trace:
            found = dict(score(model, trace, groups, batch_size=2))
        return [
            (group.context, group.continuations[0], found[index][0][0], group.document)
            for index, group in enumerate(groups)
        ]

    return model, documents


BY_DOCUMENT = GivenPlan(
    plan={
        "d0": HALF.plan,
        "d1": plan_without(4, (0, 0)),
        "d2": plan_without(4, (3, 1)),
        **{f"text {t}, row {r}": HALF.plan for t in range(3) for r in range(2)},
    }
)


@pytest.mark.parametrize("method", [HALF, GENERATION, RandomMask(), BY_DOCUMENT])
def test_timed_passes_reproduce_the_scores(scored, method):
    model, documents = scored
    check = documents(method)
    row = timed(model, method, ONE, check=check)[0]
    assert row["reproduces_scores"] is True
    assert row["score_gap"] < 1e-3
    assert row["check_error"] is None


def test_an_altered_score_is_found_and_so_is_another_method(scored):
    model, documents = scored
    check = documents(HALF)
    altered = [*check[:2], (*check[2][:2], check[2][2] + 0.1, check[2][3])]
    row = timed(model, HALF, ONE, check=altered)[-1]
    assert row["reproduces_scores"] is False
    assert row["score_gap"] == pytest.approx(0.1, abs=1e-3)
    assert timed(model, GENERATION, ONE, check=check)[0]["reproduces_scores"] is False


def test_a_score_that_is_no_number_is_no_agreement(scored):
    model, documents = scored
    check = documents(HALF)
    with pytest.warns(UserWarning, match="not a number"):
        row = timed(model, HALF, ONE, check=check, rescore=lambda *_: [math.nan] * 3)[0]
    assert row["reproduces_scores"] is False
    json.dumps(row, allow_nan=False)


def test_a_failing_check_marks_the_rows_and_raises_nothing(scored):
    model, documents = scored

    def broken(*_):
        raise RuntimeError("no\nmemory")

    with pytest.warns(UserWarning, match="could not score"):
        rows = timed(model, HALF, ONE, check=documents(HALF), rescore=broken)
    assert {row["reproduces_scores"] for row in rows} == {False}
    assert rows[0]["check_error"] == "RuntimeError: no memory"
    with pytest.warns(UserWarning, match="could not score"):
        short = timed(model, HALF, ONE, check=documents(HALF), rescore=lambda *_: [0.0])
    assert short[0]["reproduces_scores"] is False


def test_another_way_to_score_is_used_if_given(scored):
    model, documents = scored
    check = documents(HALF)
    seen = []

    def own(*arguments):
        seen.append(arguments)
        return [document[2] for document in check]

    assert timed(model, HALF, ONE, check=check, rescore=own)[0]["score_gap"] == 0.0
    assert seen == [(model, HALF, check)]


def test_rescoring_uses_the_cache_step_by_step(tiny):
    model, widths = tiny(), []
    handle = model.register_forward_pre_hook(lambda m, args: widths.append(args[0].shape[1]))
    rescore(model, HALF, [([5, 6, 7], [8, 9, 10], 0.0)])
    handle.remove()
    assert widths == [3, 1, 1]


def test_a_wall_speedup_beyond_the_flops_is_suspect(tiny, monkeypatch):
    class Fake(Side):
        def run(self):
            super().run()
            for times in self.watch.host.values():
                times[-1] = 3.0 if self.method is None else 1.0

    monkeypatch.setattr(passes, "Side", Fake)
    rows = timed(tiny(), HALF)
    assert [row["wall_speedup"] for row in rows] == [3.0] * 4
    assert all(row["suspect"] for row in rows)
    assert rows[1]["dense_median_s"] == 1.0  # 3 seconds for 3 steps


def test_a_lap_drains_its_device_at_both_ends(monkeypatch):
    drained = []
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda place: drained.append(str(place)))
    watch = Stopwatch(torch.device("cuda:1"))
    with watch.lap("prefill"):
        assert drained == ["cuda:1"]  # that one, whichever is torch's current
    assert drained == ["cuda:1"] * 2
    assert len(watch.host["prefill"]) == 1


def test_corpus_text_is_cut_into_windows(tiny, tiny_corpus):
    rows = measure(tiny(), HALF, tiny_corpus, level=SHORT, progress=False)
    assert len(rows) == 4


@pytest.mark.parametrize(
    ("text", "level", "message"),
    [
        (windows(1), SHORT, "needs 2 windows of 6 tokens"),
        (windows(6, 8), SHORT, "needs 1 windows of 12 tokens"),
        (windows(), "slow", "none of quick, full"),
        (windows(8, 400), Level((Shape(1, 250, 20),), 1, 6, 6, 1, 0, 0), "longer model"),
    ],
)
def test_wrong_input_is_told_in_one_sentence(tiny, text, level, message):
    with pytest.raises(UserError, match=message):
        measure(tiny(), HALF, text, level=level, progress=False)


def test_levels_can_have_an_interval():
    for level in LEVELS.values():
        assert level.pairs >= 6
        assert {shape.batch for shape in level.shapes} > {1}


def test_steady_allocator_leaves_a_choice_of_the_user_alone(monkeypatch):
    from dyndepth.common import machine
    from dyndepth.timing import conditions

    monkeypatch.setenv("MALLOC_TOP_PAD_", "1")
    machine.steady_allocator.cache_clear()
    assert machine.steady_allocator() == ""
    assert "MALLOC_TOP_PAD_=1" in conditions._allocator(on_gpu=False)
    machine.steady_allocator.cache_clear()


class TestCommandLine:
    def test_help_needs_no_torch(self):
        code = (
            "import sys; from dyndepth.timing.__main__ import main\n"
            "try: main(['--help'])\n"
            "except SystemExit: pass\n"
            "sys.exit('torch' in sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert "--speedup" in done.stdout

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--method", "no_such"], "no_such"),
            (["--method", "dense", "--speedup", "0.5"], "at least 1"),
            (["--method", "dense", "--speedup", "2"], "reaches a speedup of 1 "),
            (["--method", "dense", "--model", "./no/such/model"], "no/such/model"),
            (["--method", "dense", "--threads", "0"], "--threads"),
            (["--method", "oracle"], "is a bound"),
        ],
    )
    def test_wrong_input_exits_with_2(self, arguments, message, capsys):
        assert door.main(arguments) == 2
        assert message in capsys.readouterr().err

    def test_last_line_is_json(self, tiny, tiny_corpus, tmp_path, monkeypatch, capsys):
        from dyndepth.data import corpus
        from dyndepth.models import loading
        from dyndepth.timing import levels as timing

        model = tiny()
        monkeypatch.setattr(loading, "layer_count", lambda *_: 4)
        monkeypatch.setattr(loading, "load_model", lambda *_, **__: model)
        monkeypatch.setattr(loading, "load_tokenizer", lambda *_: None)
        monkeypatch.setattr(corpus, "load_corpus", lambda *_: tiny_corpus)
        monkeypatch.setitem(timing.LEVELS, "quick", SHORT)
        monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))
        assert door.main(["--method", "dense"]) == 0
        out = capsys.readouterr().out.splitlines()
        found = json.loads(out[-1])["timing"]
        assert len(found["rows"]) == 4
        assert found["rows"][0]["total_speedup"] == 1.0
        assert any("wall" in line for line in out[:-1])
