"""Removal of sublayers: the damage of each alone, the greedy order, what biases it gives."""

from __future__ import annotations

import json

import pytest
import torch

from dyndepth import removal
from dyndepth.removal import (
    cached_order,
    ordered_biases,
    ranked_biases,
    removal_damage,
    removal_order,
)
from dyndepth.training import budget_shares, loss


@pytest.fixture
def windows(tiny_corpus):
    return tiny_corpus.windows(32, 80, 0)


def test_damage_is_the_loss_without_the_sublayer(tiny, windows):
    """Removing a sublayer equals zeroing the weights of its last projection."""
    damage = removal_damage(tiny(), windows[:2], progress=False)
    model = tiny()
    dense = loss(model, windows[:2])
    for layer, sublayer in ((0, 0), (2, 1)):
        crippled = tiny()
        block = crippled.model.layers[layer]
        [block.self_attn.o_proj, block.mlp.down_proj][sublayer].weight.zero_()
        expected = loss(crippled, windows[:2]) - dense
        torch.testing.assert_close(damage[layer, sublayer], expected, atol=1e-5, rtol=0)


def test_the_most_harmless_sublayer_flips_first():
    damage = torch.tensor([[3.0, 0.5], [-0.1, 7.0]])
    bias = ranked_biases(damage)
    assert bias.flatten().argsort().tolist() == damage.flatten().argsort().tolist()
    assert (bias > 0).all()
    steps = bias.flatten().sort().values.diff()
    torch.testing.assert_close(steps, steps[:1].expand(3))


def greedy(model, ids, shares, until):
    """The order by measuring every candidate at every step."""
    plan, executed, found = torch.ones(4, 2, dtype=torch.bool), 1.0, []
    current = loss(model, ids).item()
    while executed > until:
        best = None
        for index in plan.flatten().nonzero()[:, 0].tolist():
            plan.view(-1)[index] = False
            after = removal._loss_with(model, ids, plan)
            plan.view(-1)[index] = True
            rate = (after - current) / shares.flatten()[index].item()
            if best is None or rate < best[0]:
                best = (rate, index, after)
        plan.view(-1)[best[1]] = False
        current, executed = best[2], executed - shares.flatten()[best[1]].item()
        found.append((best[1] // 2, best[1] % 2))
    return found


def test_the_lazy_order_starts_and_mostly_goes_as_the_full_search(tiny, windows):
    """Lazy search may miss a candidate whose damage fell; here it agrees on most places."""
    model, ids = tiny(), windows[:4]
    shares = budget_shares(model, 32)
    order = removal_order(model, ids, shares, 0.4, progress=False)
    found, full = [(row.layer, row.sublayer) for row in order], greedy(model, ids, shares, 0.4)
    assert found[0] == full[0]
    assert len(set(found) & set(full)) >= len(full) - 1
    assert len(set(found)) == len(found)
    plan = torch.ones(4, 2, dtype=torch.bool)
    for row in order:
        plan[row.layer, row.sublayer] = False
        assert row.loss == pytest.approx(removal._loss_with(model, ids, plan), abs=1e-5)
        assert row.executed == pytest.approx(shares[plan].sum().item(), abs=1e-5)
    assert order[-1].executed <= 0.4 < order[-2].executed


def test_a_kept_order_serves_less_and_is_made_again_for_more(tiny, windows, tmp_path, monkeypatch):
    monkeypatch.setattr(removal, "cache_root", lambda: tmp_path)
    model, ids = tiny(), windows[:2]
    shares = budget_shares(model, 32)
    first = cached_order(model, ids, shares, 0.6, progress=False)
    monkeypatch.setattr(removal, "removal_order", lambda *_, **__: pytest.fail("made again"))
    assert cached_order(model, ids, shares, 0.7, progress=False) == first
    with pytest.raises(pytest.fail.Exception, match="made again"):
        cached_order(model, ids, shares, 0.2, progress=False)
    (file,) = (tmp_path / "removal").iterdir()
    file.write_text(json.dumps({"garbled": 1}))
    with pytest.raises(pytest.fail.Exception, match="made again"):
        cached_order(model, ids, shares, 0.7, progress=False)


def test_ordered_biases_execute_the_share_and_follow_the_order(tiny, windows):
    model = tiny()
    shares = budget_shares(model, 32)
    order = removal_order(model, windows[:2], shares, 0.3, progress=False)
    bias = ordered_biases(order, shares, 0.6)
    assert abs(shares[bias >= 0].sum().item() - 0.6) < shares.max()
    values = [bias[row.layer, row.sublayer].item() for row in order]
    assert values == sorted(values)
