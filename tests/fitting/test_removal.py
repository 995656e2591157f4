"""Removal of units: the damage of each alone, the greedy search, what biases its order gives."""

from __future__ import annotations

import json
import math

import pytest
import torch
from conftest import DEVICE
from gating import GivenPlan

from dyndepth.fitting import removal
from dyndepth.fitting.removal import (
    Search,
    cached_order,
    greedy,
    greedy_kept,
    ordered_biases,
    plan_without,
    ranked_biases,
    removal_damage,
    removal_order,
    units_of,
)
from dyndepth.fitting.routers import budget_shares, loss
from dyndepth.runtime import many_plans
from dyndepth.runtime.attach import attach


@pytest.fixture
def windows(tiny_corpus):
    return tiny_corpus.windows(32, 80, 0).to(DEVICE)


def test_damage_is_the_loss_without_the_sublayer(tiny, windows):
    """Removing a sublayer equals zeroing the weights of its last projection."""
    damage = removal_damage(tiny(), windows[:2], progress=False)
    model = tiny()
    dense = loss(model, windows[:2])
    for layer, sublayer in ((0, 0), (2, 1)):
        crippled = tiny()
        block = crippled.model.layers[layer]
        [block.self_attn.o_proj, block.mlp.down_proj][sublayer].weight.zero_()
        expected = (loss(crippled, windows[:2]) - dense).cpu()
        torch.testing.assert_close(damage[layer, sublayer], expected, atol=1e-5, rtol=0)


def test_the_most_harmless_sublayer_flips_first():
    damage = torch.tensor([[3.0, 0.5], [-0.1, 7.0]])
    bias = ranked_biases(damage)
    assert bias.flatten().argsort().tolist() == damage.flatten().argsort().tolist()
    assert (bias > 0).all()
    steps = bias.flatten().sort().values.diff()
    torch.testing.assert_close(steps, steps[:1].expand(3))


def loss_under(model, ids, plan):
    """Loss with a plan attached, one forward: no plan shares anything with another."""
    with attach(model, GivenPlan(plan=plan.tolist())):
        return loss(model, ids).item()


def brute_force(model, ids, units, shares, until):
    """The order by measuring every candidate at every step: [(unit, loss, executed)]."""
    gone, executed, found = [], 1.0, []
    current = loss(model, ids).item()
    price = [shares.flatten()[list(unit)].sum().item() for unit in units]
    while executed > until:
        tried = {}
        for index, unit in enumerate(units):
            if index not in gone:
                plan = plan_without(len(shares), [*(units[g] for g in gone), unit])
                tried[index] = loss_under(model, ids, plan)
        best = min(tried, key=lambda index: (tried[index] - current) / price[index])
        gone.append(best)
        current, executed = tried[best], executed - price[best]
        found.append((best, current, executed))
    return found


def test_units():
    assert units_of(2, "block") == [(0, 1), (2, 3)]
    assert units_of(2, "sublayer") == [(0,), (1,), (2,), (3,)]
    assert plan_without(3, [(0, 1), (4,)]).tolist() == [[False] * 2, [True] * 2, [False, True]]
    assert plan_without(3, []).all()


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["block", "sublayer"])
def test_the_full_search_is_brute_force(tiny, windows, family, kind):
    model, ids = tiny(family), windows[:4]
    shares, units = budget_shares(model, 32), units_of(4, kind)
    steps = greedy(model, ids, units, shares, 0.3, progress=False).steps
    expected = brute_force(model, ids, units, shares, 0.3)
    assert [step.unit for step in steps] == [row[0] for row in expected]
    for step, (_, nats, executed) in zip(steps, expected, strict=True):
        assert step.loss == pytest.approx(nats, abs=1e-5)
        assert step.executed == pytest.approx(executed, abs=1e-6)


def test_only_candidates_go_and_something_remains(tiny, windows):
    model, shares = tiny(), budget_shares(tiny(), 32)
    inner = units_of(4, "block")[1:3]
    steps = greedy(model, windows[:2], inner, shares, 0.0, progress=False).steps
    assert sorted(step.unit for step in steps) == [0, 1]
    steps = greedy(model, windows[:2], units_of(4, "block"), shares, 0.0, progress=False).steps
    assert len(steps) == 3


def test_the_lazy_order_starts_and_mostly_goes_as_the_full_search(tiny, windows):
    """Lazy search may miss a candidate whose damage fell; here it agrees on most places."""
    model, ids = tiny(), windows[:4]
    shares = budget_shares(model, 32)
    order = removal_order(model, ids, shares, 0.4, progress=False)
    found = [(row.layer, row.sublayer) for row in order]
    full = [divmod(row[0], 2) for row in
            brute_force(model, ids, units_of(4, "sublayer"), shares, 0.4)]  # fmt: skip
    assert found[0] == full[0]
    assert len(set(found) & set(full)) >= len(full) - 1
    assert len(set(found)) == len(found)
    plan = torch.ones(4, 2, dtype=torch.bool)
    for row in order:
        plan[row.layer, row.sublayer] = False
        assert row.loss == pytest.approx(loss_under(model, ids, plan), abs=1e-5)
        assert row.executed == pytest.approx(shares[plan].sum().item(), abs=1e-5)
    assert order[-1].executed <= 0.4 < order[-2].executed


def test_the_lazy_search_measures_less(tiny, windows, monkeypatch):
    tried = count_plans(monkeypatch)
    for kind in ("lazy", "full"):
        greedy(tiny(), windows[:2], units_of(4, "sublayer"), budget_shares(tiny(), 32), 0.3,
               kind=kind, progress=False)  # fmt: skip
        tried.append(-1)
    lazy, full = tried[: tried.index(-1)], tried[tried.index(-1) + 1 : -1]
    assert lazy[0] == full[0] == 9
    assert set(lazy[1:]) == {1}
    assert sum(lazy) < sum(full)
    assert full[:3] == [9, 7, 6]


def count_plans(monkeypatch):
    """How many plans each call of ``losses`` tries, from now on."""
    tried, stock = [], many_plans.losses

    def counting(model, plans, ids):
        tried.append(len(plans))
        return stock(model, plans, ids)

    monkeypatch.setattr(removal, "losses", counting)
    return tried


def test_a_kept_order_serves_less_and_is_continued_for_more(tiny, windows, tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))
    model, ids = tiny(), windows[:2]
    shares = budget_shares(model, 32)
    whole = removal_order(model, ids, shares, 0.2, progress=False)
    tried = count_plans(monkeypatch)
    first = cached_order(model, ids, shares, 0.6, progress=False)
    assert first == whole[: len(first)]
    assert tried
    tried.clear()
    assert cached_order(model, ids, shares, 0.7, progress=False) == first
    assert not tried
    assert cached_order(model, ids, shares, 0.2, progress=False) == whole
    assert 9 not in tried, "it did not start over"
    (file,) = (tmp_path / "removal").iterdir()
    for garbled in ("{", '{"garbled": 1}', "[]", '{"steps": [], "candidates": [], "dense": 1}'):
        file.write_text(garbled)
        tried.clear()
        assert cached_order(model, ids, shares, 0.6, progress=False) == first
        assert tried[0] == 9


@pytest.mark.parametrize("kind", ["full", "lazy"])
def test_a_search_that_was_cut_short_goes_on(tiny, windows, tmp_path, monkeypatch, kind):
    model, ids, units = tiny(), windows[:2], units_of(4, "sublayer")
    shares, file = budget_shares(model, 32), tmp_path / "search.json"
    whole = greedy(model, ids, units, shares, 0.3, kind=kind, progress=False)
    stock, left = many_plans.losses, [3]

    def failing(*arguments):
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        return stock(*arguments)

    monkeypatch.setattr(removal, "losses", failing)
    with pytest.raises(KeyboardInterrupt):
        greedy_kept(file, model, ids, units, shares, 0.3, kind=kind, progress=False)
    monkeypatch.setattr(removal, "losses", stock)
    begun = json.loads(file.read_text())["steps"]
    assert 0 < len(begun) < len(whole.steps)
    went_on = greedy_kept(file, model, ids, units, shares, 0.3, kind=kind, progress=False)
    assert went_on.steps == whole.steps


def test_what_blows_up_goes_last(tiny, windows, monkeypatch):
    """A loss that is not a number counts as infinite, and the search can be kept all the same."""
    stock = many_plans.losses

    def blowing_up(model, plans, ids):
        found = stock(model, plans, ids)
        found[~plans[:, 1, 1]] = math.nan
        return found

    monkeypatch.setattr(removal, "losses", blowing_up)
    shares = budget_shares(tiny(), 32)
    search = greedy(tiny(), windows[:2], units_of(4, "sublayer"), shares, 0.0, progress=False)
    assert 3 in search.candidates
    assert search.candidates[3].after == math.inf
    assert Search.of_json(json.loads(json.dumps(search.to_json())), 8) == search


def test_ordered_biases_execute_the_share_and_follow_the_order(tiny, windows):
    model = tiny()
    shares = budget_shares(model, 32)
    order = removal_order(model, windows[:2], shares, 0.3, progress=False)
    bias = ordered_biases(order, shares, 0.6)
    assert abs(shares[bias >= 0].sum().item() - 0.6) < shares.max()
    values = [bias[row.layer, row.sublayer].item() for row in order]
    assert values == sorted(values)
