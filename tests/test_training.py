"""The shared training loop: gradients, budget, determinism, the damage-ranked start."""

from __future__ import annotations

import pytest
import torch

from dyndepth.methods.skipgpt.router import LinearRouter
from dyndepth.runtime import attach
from dyndepth.training import (
    Schedule,
    _Routed,
    flop_shares,
    loss,
    ranked_biases,
    removal_damage,
    tune_router,
)

SCHEDULE = Schedule(steps=40, batch=2, length=32, bias_rate=0.1, penalty=8.0)


@pytest.fixture
def windows(tiny_corpus):
    return tiny_corpus.windows(32, 80, 0)


def fresh(normalise: bool = True) -> LinearRouter:
    bias = torch.linspace(0.1, 1.5, 8).view(4, 2)
    return LinearRouter(torch.zeros(4, 2, 32), bias, normalise=normalise)


def test_budget_alone_has_a_gradient_into_every_router(tiny, windows):
    model, router = tiny(), fresh()
    method = _Routed(router)
    with attach(model, method, backend="masked"):
        model(windows[:2])
    (torch.stack(method.executed) * flop_shares(model, 32)).sum().backward()
    assert (router.bias.grad > 0).all()
    assert (router.weight.grad.abs().sum(-1) > 0).all()


def test_loss_has_a_gradient_into_every_router_and_none_into_the_model(tiny, windows):
    model, router = tiny(), fresh()
    with attach(model, _Routed(router), backend="masked"):
        loss(model, windows[:2]).backward()
    assert (router.bias.grad != 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gates_are_hard_and_only_the_gradient_is_soft(tiny, windows):
    router = fresh()
    method = _Routed(router)
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(1))
    method.executed = []
    gates = torch.stack(method.gates(1, hidden), -1)
    assert torch.equal(gates.round(), (router(1, hidden) >= 0).float())
    torch.testing.assert_close(gates, gates.round())
    assert 0 < gates.mean() < 1


@pytest.mark.parametrize("target", [1.25, 2.0])
def test_training_meets_the_budget(tiny, windows, target):
    curve = tune_router(tiny(), fresh(), windows, target, SCHEDULE, progress=False)
    assert len(curve) == 40
    assert curve[0]["executed"] == 1.0
    assert [row["wanted"] for row in curve[19:]] == pytest.approx([1 / target] * 21)
    assert curve[9]["wanted"] == pytest.approx((1 + 1 / target) / 2)
    executed = sum(row["executed"] for row in curve[-8:]) / 8
    assert executed == pytest.approx(1 / target, abs=0.08)


def test_target_one_leaves_the_model_dense(tiny, windows):
    model, router = tiny(), fresh()
    curve = tune_router(model, router, windows, 1.0, SCHEDULE, progress=False)
    assert curve[-1]["executed"] == 1.0
    with attach(model, _Routed(router), backend="masked"):
        routed = model(windows[:2]).logits
    torch.testing.assert_close(routed, model(windows[:2]).logits, atol=1e-5, rtol=0)


def test_training_is_deterministic(tiny, windows):
    results = []
    for _ in range(2):
        router = fresh()
        curve = tune_router(tiny(), router, windows, 1.5, SCHEDULE, progress=False)
        results.append((curve, router.weight.detach(), router.bias.detach()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])
    assert results[0][1].abs().sum() > 0


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


def test_shares_are_flops(tiny):
    shares = flop_shares(tiny(), 10)
    attention = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32) + 2 * 2 * 32 * 10
    mlp = 2 * 3 * 32 * 64
    assert shares.sum().item() == pytest.approx(1.0)
    assert (shares[0, 0] / shares[0, 1]).item() == pytest.approx(attention / mlp)
