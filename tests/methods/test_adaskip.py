"""AdaSkip: which sublayers go, how many, and that nothing else is done than its rule says."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE
from test_attach import ids, incremental

from dyndepth.common.errors import UserError
from dyndepth.fitting.routers import budget_shares
from dyndepth.methods.adaskip import AdaSkip
from dyndepth.methods.static_pruning import StaticPruning
from dyndepth.models.blocks import decoder
from dyndepth.runtime.attach import attach

QUICK = AdaSkip.quick


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path))


def similarity(model, text):
    """Mean cosine of the stream before and after each sublayer, by hooks on the stock model."""
    sums, layers = {}, decoder(model).layers
    seen = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, out, key=(index, place): seen.__setitem__(key, (args, out))
        )
        for index, layer in enumerate(layers)
        for place, module in (
            (0, layer.input_layernorm),
            (1, layer.post_attention_layernorm),
            (2, layer),
        )
    ]
    for row in text:
        model(row[None])
        for index in range(len(layers)):
            x, y = seen[index, 0][0][0], seen[index, 1][0][0]
            z = seen[index, 2][1]
            for sublayer, (before, after) in enumerate(((x, y), (y, z))):
                cosine = torch.cosine_similarity(before, after, dim=-1).mean().item()
                sums[index, sublayer] = sums.get((index, sublayer), 0.0) + cosine
    for handle in handles:
        handle.remove()
    return sums


@pytest.mark.parametrize("budget", ["flops", "count"])
@pytest.mark.parametrize("target", [1.0, 1.2, 1.5, 2.0])
def test_those_that_turn_least_go(tiny, tiny_corpus, budget, target):
    model = tiny()
    method = AdaSkip(target_speedup=target, budget=budget, windows=4, length=16)
    method.fit(model, tiny_corpus)
    text = tiny_corpus.windows(16, 4, 0, split="calibration", model=model)
    found = similarity(model, text.to(DEVICE))
    order = sorted(found, key=lambda unit: -found[unit])
    gone = [(layer, ("attention", "mlp").index(kind)) for layer, kind in method.facts["order"]]
    assert gone == order[: len(gone)]
    plan = method.tensors["plan"]
    assert sorted(gone) == [tuple(each) for each in (~plan).nonzero().tolist()]
    executed = budget_shares(model, 16)[plan].sum().item()
    assert method.facts["achieved_speedup"] == pytest.approx(1 / executed)
    assert method.facts["sublayers_speedup"] == pytest.approx(8 / (8 - len(gone)))
    if budget == "count":
        assert len(gone) == round(8 - 8 / target)
    else:
        step = budget_shares(model, 16).max().item()
        assert abs(executed - 1 / target) <= step / 2 + 1e-6


@pytest.mark.parametrize("target", [1.25, 1.5])
def test_without_scales_it_is_the_ranking_bit_for_bit(tiny, tiny_corpus, target):
    """And with scales of 1, which change nothing."""
    model = tiny()
    given = {"target_speedup": target, **QUICK}
    pruned = StaticPruning(criterion="joint", **given).fit(model, tiny_corpus)
    plain = AdaSkip(scale=None, **given).fit(model, tiny_corpus)
    ones = AdaSkip(**given).fit(model, tiny_corpus)
    for row in ones.facts["scales"]:
        row[:] = [each and 1.0 for each in row]
    logits = []
    for method in (pruned, plain, ones):
        with attach(model, method):
            logits.append(incremental(model, ids(2, 12), prompt=5))
    assert torch.equal(logits[1], logits[0])
    assert torch.equal(logits[2], logits[0])


def test_the_first_attention_may_go(tiny, tiny_corpus):
    """The layer from whose cache lengths are read: what it does not store is counted."""
    model = tiny()
    method = AdaSkip(target_speedup=1.2, **QUICK).fit(model, tiny_corpus)
    method.tensors["plan"] = torch.ones(4, 2, dtype=torch.bool)
    method.tensors["plan"][0, 0] = False
    method.facts["scales"][0][0] = 1.2
    with attach(model, method):
        steps, whole = incremental(model, ids(2, 12), prompt=5), model(ids(2, 12)).logits
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=0)


def test_what_is_out_of_reach_is_said(tiny, tiny_corpus):
    assert AdaSkip().max_speedup(4) == 8
    AdaSkip(target_speedup=8.0, budget="count", **QUICK).fit(tiny(), tiny_corpus)
    with pytest.raises(UserError, match="one of 8 sublayers at least, a speedup of 8x, not 20x"):
        AdaSkip(target_speedup=20.0, budget="count", **QUICK).fit(tiny(), tiny_corpus)
    with pytest.raises(UserError, match="block FLOPs can be removed this way"):
        AdaSkip(target_speedup=200.0, **QUICK).fit(tiny(), tiny_corpus)
    with pytest.raises(UserError, match="give a corpus"):
        AdaSkip(target_speedup=1.5).fit(tiny())
    with pytest.raises(ValueError, match="windows must be at least 1"):
        AdaSkip(windows=0)
