"""The bench of drafts on tiny models: what is timed is what it says. No test asserts a speed."""

from __future__ import annotations

import argparse
import json
import random

import pytest
import torch
from toys import Drafting

from dyndepth.bench import forced, lossless, rivals
from dyndepth.bench.forced import Coin, Forced, drafting, first_blocks
from dyndepth.bench.goals import LOSSLESS_GOALS, check
from dyndepth.bench.lossless import LENGTH, ROUNDS, crossing
from dyndepth.cells.identity import plain
from dyndepth.models.caches import cache_of
from dyndepth.runtime.choosing import Choice
from dyndepth.timing.passes import AS_EVER, Side


def windows(count: int = 2, length: int = 12) -> torch.Tensor:
    return torch.randint(3, 90, (count, length), generator=torch.Generator().manual_seed(0))


def judged(chance: float, count: int) -> list[int]:
    coin = Coin(chance=chance, throws=random.Random(0))
    logits, drafted = torch.randn(4, 8), [torch.tensor(each) for each in (1, 2, 3)]
    own = logits.argmax(-1).tolist()
    found = []
    for _ in range(count):
        tokens, stand, more = coin.judge([], drafted, [None] * 3, logits)
        assert tokens == [1, 2, 3]
        assert more in own
        found.append(stand)
    return found


def test_a_coin_decides_whatever_the_logits_say():
    assert set(judged(0.0, 20)) == {0}
    assert set(judged(1.0, 20)) == {3}
    found = judged(0.6, 4000)
    assert sum(found) / len(found) == pytest.approx(0.6 + 0.6**2 + 0.6**3, abs=0.06)
    assert found[:50] == judged(0.6, 50)


@pytest.mark.parametrize("chance", [0.0, 0.5, 1.0])
def test_what_is_forced_is_written_and_kept(tiny, chance):
    model, texts = tiny(), list(windows().split(1))
    side = Forced(model, drafting(first_blocks(model, 2), 3), texts, 9)
    side.chance = chance
    dense = Side(model, None, texts, 9)
    for each in (side, dense, side, side):
        with torch.no_grad(), each.around():
            each.run()
    first, _, again = side.rounds
    assert [each.accepted for each in first] == [each.accepted for each in again]  # of one text
    assert sum(len(each.tokens) for each in first) == 9
    assert side.kept[0] == dense.kept[0]
    stand = {each.accepted == len(each.drafted) for each in first if each.drafted}
    assert stand == {0.0: {False}, 1.0: {True}}.get(chance, {True, False})


def test_the_hook_is_in_no_loop_but_the_bench_s():
    assert forced.Coin.__mro__[1] is Choice
    assert Coin.draw is Choice.draw


def test_both_sides_of_the_overhead_run_the_same_forwards(tiny):
    model, width = tiny(), (LENGTH + 1) * ROUNDS
    texts, seen = windows(2, 8 + width), {}
    for kind in (lossless._Rounds, lossless._Forwards):
        side, forwards = kind(model, texts, 8, AS_EVER), []
        with torch.no_grad(), side.around():
            handle = model.register_forward_pre_hook(
                lambda m, args, kwargs, to=forwards: to.append(
                    (args[0].shape[1], cache_of(kwargs).get_seq_length())
                ),
                with_kwargs=True,
            )
            side.run()
            handle.remove()
        seen[kind] = forwards
    first, second = seen.values()
    assert first == second
    assert [wide for wide, _ in first] == [*[1] * LENGTH, LENGTH + 1] * ROUNDS
    assert [past for wide, past in first if wide > 1] == [8 + 5 * each for each in range(ROUNDS)]


@pytest.mark.parametrize(
    ("speedups", "found"),
    [
        ({0.6: 0.5, 0.8: 0.9, 1.0: 1.3}, 0.85),
        ({0.6: 1.1, 0.8: 1.2}, 0.6),
        ({0.6: 0.5, 0.8: 0.9}, None),
        ({0.6: 1.1, 0.8: 0.9, 1.0: 1.1}, 0.9),  # noise: from where on it wins
    ],
)
def test_a_draft_wins_from_the_crossing_on(speedups, found):
    assert crossing(speedups) == pytest.approx(found)


@pytest.fixture
def options(tiny, monkeypatch):
    model = tiny()
    monkeypatch.setattr(lossless, "loaded", lambda *_: model)
    monkeypatch.setattr(lossless, "PROMPT", {"cpu": 16})
    monkeypatch.setattr(lossless, "NEW_TOKENS", 10)
    monkeypatch.setattr(lossless, "ACCEPTANCES", (0.5, 1.0))
    monkeypatch.setattr(lossless, "WARM_UP", 0)
    monkeypatch.setattr(rivals, "WARM_UP", 0)
    monkeypatch.setattr(rivals, "PROMPT", 10)
    monkeypatch.setattr(rivals, "NEW_TOKENS", 9)
    monkeypatch.setattr(rivals, "fit_cached", lambda method, *_: method)
    monkeypatch.setattr(rivals, "speculating", lambda _: [Drafting(without=None)])
    given = {"dtypes": ["float32"], "device": "cpu", "modes": ("eager",), "repeats": 2}
    return argparse.Namespace(**given, model="tiny", drafts=None)


def test_all_lines_are_measured_printed_and_checked(tiny_corpus, options, capsys):
    model = lossless.loaded()
    stock = model.generation_config
    lines = lossless.lossless(tiny_corpus, options)
    kinds = [name.split("/")[0] for name in lines]
    assert kinds == ["overhead", "forced", "forced", "break_even", *["compared"] * 6]
    assert lines["overhead/float32"]["rounds"] == ROUNDS
    assert [each.line for each in check(lines, LOSSLESS_GOALS)] == ["overhead/float32"]
    assert lines["forced/1/float32"]["acceptance"] == 1.0
    assert lines["forced/1/float32"]["tokens_per_verify"] == 5.0
    even = lines["break_even/float32"]
    assert 0 < even["draft_bytes"] < even["by_bytes"] < 1
    out = capsys.readouterr().out
    assert "times its 5 forwards" in out
    assert "it wins from a chance of" in out
    json.dumps(plain(lines), allow_nan=False)

    own = {name.split("/")[1]: line for name, line in lines.items() if name.startswith("comp")}
    assert {line["equal"] for line in own.values()} == {line["prompts"] for line in own.values()}
    ours = own[f"ours: {Drafting(without=None)!r}"]
    assert ours["acceptance"] == 1.0
    assert ours["tokens_per_forward"] == pytest.approx(9 / 3)  # the prompt's, 5 and 3
    assert own["dense"]["acceptance"] is None
    assert model.generation_config is stock
    assert "_get_candidate_generator" not in vars(model)


@pytest.mark.parametrize("name", ["assistant_early_exit", "prompt_lookup_num_tokens"])
def test_transformers_drafts_are_counted_as_they_are_judged(tiny, options, name):
    """By its forwards: each adds one token to those that stand."""
    prompts = list(windows(2, 10).repeat(1, 2).split(1))  # something to look up
    side = rivals.Generating(tiny(), prompts, {name: 3}, {"num_assistant_tokens": 4})
    widths = []
    handle = side.model.register_forward_pre_hook(
        lambda m, args, kwargs: widths.append(kwargs["logits_to_keep"]), with_kwargs=True
    )
    side.count()
    handle.remove()
    assert 0 < side.accepted <= side.drafted
    assert side.forwards + side.accepted == 2 * rivals.NEW_TOKENS
    if name.startswith("prompt"):  # drafts take no forwards: these are all verifications
        assert len(widths) == side.forwards
        assert sum(widths) == side.drafted + side.forwards


def test_methods_to_compare_are_those_that_speculate(monkeypatch):
    known = {"drafting": Drafting, "other": object}
    monkeypatch.setattr(rivals, "methods", lambda: known)
    monkeypatch.setattr(
        rivals, "method_class", lambda name: known[name] if name == "drafting" else Idle
    )
    monkeypatch.setattr(rivals, "load_method", lambda name, **how: known[name](**how))
    (found,) = rivals.speculating(None)
    assert found == Drafting(target_speedup=rivals.SPEEDUP)


class Idle:
    speculates = needs_training = False
