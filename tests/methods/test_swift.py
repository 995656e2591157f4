"""SWIFT: what a set scores, which sets are tried, and when the search ends."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from gating import GivenPlan

from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.fitting.drafting import COST
from dyndepth.fitting.routers import budget_shares
from dyndepth.methods.swift.search import Search, find, matchness
from dyndepth.runtime.attach import attach
from dyndepth.runtime.draft_costs import by_bytes

PROMPTS = torch.tensor([[5, 17, 3, 40, 22, 8], [9, 9, 30, 2, 71, 4]])
EVEN = torch.full((10, 2), 1 / 20)
"""Shares of ten blocks whose sublayers cost the same."""


def by_hand(model, plan, window: int) -> float:
    """Token by token, without a cache: the text at full depth, then what the plan would say."""
    hits = 0
    for prompt in PROMPTS.tolist():
        text = list(prompt)
        for _ in range(window + 1):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
        for end in range(len(prompt) + 1, len(text)):
            method = GivenPlan(plan=plan.tolist(), phases="generation")
            with attach(model, method, prompt_length=len(prompt)):
                said = int(model(torch.tensor([text[:end]])).logits[0, -1].argmax())
            hits += said == text[end]
    return hits / (window * len(PROMPTS))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_score_is_how_often_the_draft_says_what_the_model_says(tiny, family):
    model, plans = tiny(family), torch.ones(3, 4, 2, dtype=torch.bool)
    plans[1, 2, 0] = plans[2, 1] = False
    with matchness(model, PROMPTS, 5) as score:
        found = [score(plan) for plan in (*plans, plans[1])]
    assert found[0] == 1.0
    assert found[1] == found[3]
    assert found[1:3] == pytest.approx([by_hand(model, plan, 5) for plan in plans[1:]])
    assert found[2] < 1.0


def planted(goes: set[int]):
    """Scores sets by how many of ``goes`` are left out."""
    return lambda plan: float((~plan.flatten())[list(goes)].double().mean())


def test_the_first_set_is_of_every_other_block_and_ends_stay():
    seen = []

    def score(plan):
        seen.append(plan.clone())
        return 0.0

    found = find(score, EVEN, Search(1 / 0.6, seed=0, tries=60, misses=99), progress=False)
    skipped = (~seen[0]).nonzero()[:, 0].unique().tolist()
    assert skipped == [1, 3, 5, 7]
    assert all(plan[0].all() and plan[-1].all() for plan in seen)
    assert all(int((~plan).sum()) == 8 for plan in seen)
    assert [found.removed, found.ended] == [(~seen[0]).flatten().nonzero()[:, 0].tolist(), "tries"]
    # Then one goes and one comes back, but for two random sets; none is scored twice.
    changes = [int((plan != seen[0]).sum()) for plan in seen[1:]]
    assert sum(change != 2 for change in changes) == 2
    assert len({tuple(plan.flatten().tolist()) for plan in seen}) == len(seen) <= 60


@pytest.mark.parametrize(("layers", "target", "published"), [(32, 1.73, 27), (40, 1.74, 34)])
def test_the_published_count_is_a_target(layers, target, published):
    """int(0.45 * 2 (L - 2)), whose two sets in the repository have 27 and 34 sublayers."""
    shares = torch.rand(layers, 2, generator=torch.Generator().manual_seed(0))
    settings = Search(target, seed=0, budget="count", tries=1)
    found = find(lambda plan: 0.0, shares / shares.sum(), settings, progress=False)
    assert len(found.removed) == published == int(0.45 * 2 * (layers - 2))


@pytest.mark.parametrize("target", [1.1, 1.25, 1.5, 2.0])
def test_the_budget_is_met_in_flops(target):
    shares = torch.rand(12, 2, generator=torch.Generator().manual_seed(0)) + 0.1
    settings = Search(target, seed=0, tries=30)
    found = find(lambda plan: 0.0, shares / shares.sum(), settings, progress=False)
    largest = float((shares / shares.sum()).max())
    assert all(abs(row["executed"] - 1 / target) <= largest / 2 for row in found.curve)


def test_climbing_finds_a_set_that_chance_does_not():
    goal = {2, 5, 7, 10, 13, 14, 17, 11}
    found = {
        kind: find(
            planted(goal),
            EVEN,
            Search(1 / 0.6, 0, kind=kind, tries=300, enough=0.99),
            progress=False,
        )
        for kind in ("climb", "random")
    }
    assert set(found["climb"].removed) == goal
    assert (found["climb"].score, found["climb"].ended) == (1.0, "enough")
    assert found["random"].score < 1.0
    best = [row["best"] for row in found["climb"].curve]
    assert best == sorted(best)
    assert best[-1] == max(row["score"] for row in found["climb"].curve)


def test_the_search_ends_by_misses():
    found = find(lambda plan: 0.5, EVEN, Search(1.25, 0, misses=7), progress=False)
    assert (found.ended, len(found.curve)) == ("misses", 8)
    again = find(lambda plan: 0.5, EVEN, Search(1.25, 0, misses=7), progress=False)
    other = find(lambda plan: 0.5, EVEN, Search(1.25, 1, misses=7), progress=False)
    assert again == found != other


def test_it_finds_the_best_of_all_sets_of_a_small_model(tiny, tiny_corpus):
    model = tiny()
    method = load_method(
        "swift", target_speedup=4 / 3, budget="count", prompts=3, before=8, window=10, tries=80
    ).fit(model, tiny_corpus)
    text = tiny_corpus.windows(8, 3, 0, split="calibration")
    with matchness(model, text, 10) as score:
        scores = []
        for places in itertools.combinations(range(2, 6), 2):
            plan = torch.ones(8, dtype=torch.bool)
            plan[list(places)] = False
            scores.append(score(plan.view(4, 2)))
    assert method.facts["matchness"] == max(scores) > method.facts["first_matchness"] - 1e-9
    assert len(method.facts["removed"]) == 2
    assert method.facts["tries"] == len(method.curve) <= 80
    refitted = replace(method).fit(model, tiny_corpus)
    assert (refitted.facts, refitted.curve) == (method.facts, method.curve)


def test_facts_say_what_a_draft_costs_and_reaches(tiny, tiny_corpus):
    model = tiny()
    method = load_method(
        "swift", target_speedup=1.5, adaptive="bytes", **{"tries": 5, "prompts": 2}
    )
    method.fit(model, tiny_corpus)
    plan, shares = method.tensors["plan"], budget_shares(model, 97)
    assert method.facts[COST]["draft"] == by_bytes(model, plan).draft
    assert method.facts["achieved_speedup"] == pytest.approx(float(1 / shares[plan].sum()))


def test_what_cannot_be_is_refused_in_one_sentence(tiny, tiny_corpus):
    with pytest.raises(UserError, match="at most 2, not 3; ask for less"):
        load_method("swift", target_speedup=3.0, tries=1).fit(tiny(), tiny_corpus)
    with pytest.raises(UserError, match="searches on text; give fit a corpus"):
        load_method("swift", target_speedup=1.5).fit(tiny())
    with pytest.raises(UserError, match="tries must be at least 1, not 0"):
        load_method("swift", tries=0)
    with attach(tiny(), load_method("swift")):  # at full depth nothing is searched
        pass
