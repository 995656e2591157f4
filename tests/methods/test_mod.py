"""Mixture of depths: the rule, eviction, weights."""

from __future__ import annotations

import pytest
import torch
from by_hand import evicting, scaled
from conftest import DEVICE, TOLERANCE

from dyndepth.methods.mod import MixtureOfDepths
from dyndepth.runtime.attach import attach

LAYERS = 4


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def given(threshold: float, scores: float = 1.0, **fields) -> MixtureOfDepths:
    """With weights of its own, so that nothing is trained."""
    random = torch.Generator().manual_seed(0)
    method = MixtureOfDepths(target_speedup=1.4, **fields)
    method.tensors = {
        "weight": 0.2 * torch.randn(LAYERS, 1, 32, generator=random),
        "bias": torch.full((LAYERS, 1), scores),
    }
    method.facts = {"layers": LAYERS, "hidden": 32, "threshold": threshold}
    return method


@pytest.mark.parametrize("backend", ["sparse", "masked"])
def test_the_forward_is_that_of_the_formula(tiny, tokens, backend):
    model, method = tiny(), given(threshold=0.9)
    weight, bias = (method.tensors[key].to(DEVICE) for key in ("weight", "bias"))
    shares = []

    def decide(layer, stream):
        if layer % 2 == 0:
            return torch.ones(len(stream), dtype=torch.bool, device=stream.device), 1.0
        score = scaled(stream) @ weight[layer, 0] + bias[layer]
        runs = torch.sigmoid(score) >= torch.sigmoid(torch.tensor(0.9))
        shares.append(runs.double().mean().item())
        return runs, score

    expected = evicting(model, tokens, decide)
    with torch.no_grad(), attach(model, method, backend=backend) as trace:
        found = model(tokens).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert any(0 < share < 1 for share in shares)
    assert trace.executed()[1::2, 0].sum().item() == pytest.approx(sum(shares) / 2)
    assert trace.flops["router"] == tokens.numel() * 2 * 2 * 32


def test_scores_of_one_that_all_reach_change_nothing(tiny, tokens):
    model, method = tiny(), given(threshold=0.0)
    method.tensors["weight"].zero_()
    with attach(model, method, warn=False):
        found = model(tokens).logits
    torch.testing.assert_close(found, model(tokens).logits, atol=TOLERANCE, rtol=0)


def test_every_other_block_can_go_and_no_more():
    assert [MixtureOfDepths().max_speedup(layers) for layers in (30, 31)] == [2.0, 31 / 16]
    assert list(MixtureOfDepths().routed(5)) == [1, 3]


def test_nobody_at_all_reaches_the_threshold(tiny, tokens):
    """What remains are the blocks without a router, in the model and in what is counted."""
    model, method = tiny(), given(threshold=9.0)
    expected = evicting(
        model,
        tokens,
        lambda layer, stream: (torch.full((len(stream),), layer % 2 == 0, device=DEVICE), 1.0),
    )
    with torch.no_grad(), attach(model, method) as trace:
        found = model(tokens).logits
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    totals = trace.totals()
    assert totals["dense_block_flops"] == 2 * totals["block_flops"]
