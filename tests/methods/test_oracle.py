"""The route bound: its routes, its choices, and that what they promise is what is scored."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
import test_outcomes as tried
import torch
from test_attach import ids

from dyndepth.common.errors import UserError
from dyndepth.lm_eval_plugin.model import NamedLM
from dyndepth.method import Outcomes
from dyndepth.methods.dense import Dense
from dyndepth.methods.oracle import Oracle
from dyndepth.runtime.attach import attach

folder, model, run, tokenizer = tried.folder, tried.model, tried.run, tried.tokenizer
_own_cache = tried._own_cache

PROMISED = {"choice": ("acc", 1), "rolling": ("bits_per_byte", -1), "graded": ("grade", 1)}


def bound(model, **settings):
    return Oracle(**({"target_speedup": 1.5} | settings)).fit(model)


def values(result):
    return {(row["task"], row["metric"]): row["value"] for row in result.accuracy}


@pytest.mark.parametrize("settings", [{}, {"rule": "match"}, {"cross_fitted": True}], ids=str)
@pytest.mark.parametrize("phases", ["both", "generation"])
def test_what_is_promised_is_what_is_scored(model, run, phases, settings):
    # The shallowest route of 4 blocks has no partner.
    target = 1.3 if "cross_fitted" in settings else 1.5
    method = bound(model, phases=phases, random=4, target_speedup=target, **settings)
    result = run(method, ",".join(PROMISED))
    assert json.loads(json.dumps(method.facts)) == method.facts
    assert {f"{row['task']}/{row['doc_id']}" for row in result.samples} == set(
        method.facts["chosen"]
    )
    found = values(result)
    spent = {
        row["task"]: row["block_speedup"]
        for row in result.compute
        if row["phase"] == ("all" if phases == "both" else "generation")
    }
    for task, (metric, sign) in PROMISED.items():
        promise = method.facts["tasks"][task]
        assert promise["metric"] == f"{metric},none"
        assert found[task, metric] == pytest.approx(sign * promise["quality"], abs=1e-4)
        # Texts are as long as their routes make them; the promise counts them as dense's.
        tolerance = 0.06 if task == "graded" else 1e-9
        assert spent[task] == pytest.approx(1 / promise["executed"], rel=tolerance)
        if "rule" not in settings:
            assert promise["executed"] <= 1 / target
            assert len({route for name, route in method.facts["chosen"].items()}) > 1


def test_examples_drawn_at_random_are_those_that_were_tried(model, run, monkeypatch):
    """Full depth for every document: the scores are then dense's, prompts included."""

    def choose(self, outcomes):
        self.facts.setdefault("chosen", {}).update(dict.fromkeys(outcomes.documents, 0))

    monkeypatch.setattr(Oracle, "choose", choose)
    found = [run(method, "drawn", num_fewshot=2) for method in (bound(model), Dense())]
    logs = [[json.loads(row["loglikelihoods"]) for row in each.samples] for each in found]
    for one, other in zip(*logs, strict=True):  # dense documents share examples, a bound's do not
        assert one == pytest.approx(other, abs=1e-5)


def test_labels_are_for_those_that_say_so(model, run, monkeypatch):
    monkeypatch.setattr(Oracle, "uses_labels", False)
    with pytest.raises(TypeError, match="does not say that it uses labels"):
        run(bound(model), "choice")


def test_match_is_never_worse_than_full_depth_and_saves(model, run):
    method = bound(model, rule="match", target_speedup=1.1)
    assert not method.budgeted
    names = ",".join(PROMISED)
    full, matched = run(Dense(), names), run(method, names)
    for one, two in zip(full.samples, matched.samples, strict=True):
        assert (one["task"], one["doc_id"]) == (two["task"], two["doc_id"])
        sign = PROMISED[one["task"]][1]
        assert sign * two["outcome"] >= sign * one["outcome"] - 1e-5
        if one["task"] != "graded":
            assert two["block_flops"] <= one["block_flops"]
    assert all(task["executed"] < 1 for task in method.facts["tasks"].values())


def test_the_bound_is_above_each_of_its_routes_and_grows_with_the_budget(model, run):
    promised = []
    for speedup in (2.0, 1.6, 1.3, 1.05):
        method = bound(model, target_speedup=speedup)
        kept = {}
        method_choose = method.choose

        def choose(outcomes, kept=kept, method_choose=method_choose):
            kept[outcomes.task] = outcomes
            method_choose(outcomes)

        method.choose = choose
        run(method, "choice,rolling")
        for task, outcomes in kept.items():
            weights = outcomes.weights / outcomes.weights.sum()
            alone = weights @ outcomes.quality
            affordable = outcomes.flops.sum(0) <= outcomes.dense_flops.sum() / speedup
            best = alone[affordable].max()
            assert method.facts["tasks"][task]["quality"] >= best - 1e-12
        promised.append([method.facts["tasks"][task]["quality"] for task in kept])
    assert (np.diff(np.array(promised), axis=0) >= -1e-12).all()


def toy(quality, depths=(4, 2, 2, 3, 3), speedup=2.0, **settings):
    """A fitted bound of 4 layers with routes of given depths, which chose by ``quality``."""
    method = Oracle(target_speedup=speedup, **settings)
    plans = torch.zeros(len(depths), 4, 2, dtype=torch.bool)
    for number, depth in enumerate(depths):
        plans[number, :depth] = True
    method.tensors["routes"] = plans
    quality = torch.tensor(quality, dtype=torch.float64)
    documents = tuple(f"t/{index}" for index in range(len(quality)))
    flops = torch.tensor(depths, dtype=torch.float64).expand(len(quality), -1)
    outcomes = Outcomes(
        "t", "acc,none", documents, quality, torch.ones(len(quality)).double(), flops, flops[:, 0]
    )
    method.choose(outcomes)
    return method


def test_a_budget_is_spent_where_it_helps():
    quality = [[1, 0, 0, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 0, 1], [1, 0, 0, 1, 0]]
    # 16 blocks at full depth, 10 within the budget: 4 for the first would be too dear.
    method = toy(quality, speedup=1.6)
    assert list(method.facts["chosen"].values()) == [1, 1, 2, 3]
    assert toy(quality, speedup=16 / 11).facts["tasks"]["t"]["quality"] == 1.0
    matched = toy(quality, rule="match", speedup=3.0)
    assert list(matched.facts["chosen"].values()) == [0, 1, 2, 3]
    assert matched.facts["tasks"]["t"]["executed"] == 11 / 16
    with pytest.raises(UserError, match="on task t the cheapest routes reach a speedup of 2, not"):
        toy(quality, speedup=2.1)


def test_cross_fitting_executes_what_was_not_seen():
    depths = (4, 2, 2, 2, 2, 2, 3, 3, 3)
    random = np.random.default_rng(0)
    method = toy(random.random((40, 9)).tolist(), depths, 1.5, cross_fitted=True)
    seen, executed = (set(column) for column in zip(*method._pairs(), strict=True))
    assert seen & executed == {0}, "only full depth is in both halves"
    assert all(depths[one] == depths[two] for one, two in method._pairs())
    assert len(seen) == 1 + 2 + 1, "a route without a partner is not used"
    assert set(method.facts["chosen"].values()) <= executed
    promise = method.facts["tasks"]["t"]
    assert promise["quality"] < promise["evidence"], "what is seen is luck here"
    halves = [list(toy([[0] * 9], depths, 1.5, seed=s, cross_fitted=True)._pairs()) for s in (0, 1)]
    assert halves[0] != halves[1]


def test_documents_that_were_not_tried_follow_the_chosen_mix(tiny):
    model = tiny()
    method = toy([[0, 0, 0, 0, 0], [0, 0, 0, 1, 0]], speedup=1.6)
    known = method.facts["chosen"]
    assert sorted(known.values()) == [1, 3]
    drawn = [method._route(f"other {number}") for number in range(200)]
    assert set(drawn) == {1, 3}
    assert 70 < drawn.count(1) < 130
    names = ["t/0", "t/1", "other 3"]
    with attach(model, method, documents=names) as trace:
        together = model(ids(3, 9)).logits
        rows = [trace.by_document()[name]["block_flops"] for name in names]
        trace.documents = ["t/1"]
        alone = model(ids(3, 9)[1:2]).logits
        trace.documents = None
        model(ids(3, 9))
    assert rows[0] < rows[1]
    torch.testing.assert_close(together[1], alone[0], atol=1e-5, rtol=0)


def test_routes_are_full_depth_first_and_different(tiny, tiny_corpus):
    deep = tiny(num_hidden_layers=9)
    plans = Oracle(target_speedup=2.0, windows=4).fit(deep, tiny_corpus).candidates()
    assert plans.dtype == torch.bool
    assert plans[0].all()
    depths = plans[:, :, 0].sum(1).tolist()
    assert sorted(set(depths[1:])) == list(range(2, 9))
    assert torch.equal(plans[..., 0], plans[..., 1])
    assert all(not torch.equal(one, two) for one, two in combinations(plans, 2))
    twin = Oracle(target_speedup=3.0, windows=4, routes="random").fit(deep, tiny_corpus)
    counts = [
        np.bincount(some[1:, :, 0].sum(1), minlength=9) for some in (plans, twin.candidates())
    ]
    assert (counts[0] == counts[1]).all()
    assert counts[1][2] == 1, "one set of two blocks keeps both ends"
    assert twin.candidates()[:, [0, -1]].all()
    few = Oracle(target_speedup=2.0, depths=3).fit(deep).candidates()
    assert sorted(set(few[:, :, 0].sum(1).tolist())) == [2, 5, 8, 9]
    other = Oracle(target_speedup=4.0, windows=4, rule="match").fit(deep, tiny_corpus)
    assert torch.equal(other.candidates(), plans), "one set of outcomes serves all budgets"
    assert Oracle().fit(deep).candidates() is None


@pytest.mark.parametrize("settings", [{"random": -1}, {"depths": 0}, {"windows": 0}], ids=str)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be at least"):
        Oracle(**settings)


def test_match_cannot_be_cross_fitted():
    with pytest.raises(ValueError, match="cross_fitted goes with rule=budget alone"):
        Oracle(rule="match", cross_fitted=True)


@pytest.mark.parametrize("layers", [3, 4, 9])
@pytest.mark.parametrize("routes", ["all", "random"])
@pytest.mark.parametrize("cross_fitted", [False, True])
@pytest.mark.parametrize("depths", [None, 1, 2])
def test_the_reach_is_that_of_the_shallowest_route(tiny, layers, routes, cross_fitted, depths):
    settings = {"routes": routes, "cross_fitted": cross_fitted, "depths": depths}
    method = Oracle(target_speedup=1.1, **settings).fit(tiny(num_hidden_layers=layers))
    plans = method.candidates()
    least = min(int(plans[executed, :, 0].sum()) for _, executed in method._pairs())
    assert method.max_speedup(layers) == layers / least


def test_by_name_on_lm_evals_command_line_it_is_refused(model, tokenizer, tiny_corpus, monkeypatch):
    monkeypatch.setattr("dyndepth.data.corpus.load_corpus", lambda *_: tiny_corpus)
    given = {"target_speedup": 1.5, "windows": 4}
    with pytest.raises(UserError, match="is a bound, which chooses by the outcomes"):
        NamedLM(model, "oracle", tokenizer, **given)
    assert NamedLM(model, "oracle", tokenizer).method == Oracle()
