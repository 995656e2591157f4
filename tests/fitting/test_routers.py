"""Router tuning: gradients, estimators, budget, determinism."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from dyndepth.fitting.loop import Schedule
from dyndepth.fitting.routers import (
    Routed,
    Tuning,
    budget_shares,
    loss,
    mark_along,
    stream_statistics,
    tune_router,
)
from dyndepth.methods.skipgpt.router import LinearRouter, MLPRouter
from dyndepth.runtime.attach import attach

SCHEDULE = Schedule(steps=40, batch=2, length=32)


def tuning(target: float = 1.5, **changes) -> Tuning:
    given = {"bias_rate": 0.1, "weight_rate": 2e-3, "objective": "ce", "ramp": 0.5}
    return Tuning(target_speedup=target, **given | changes)


@pytest.fixture
def windows(tiny_corpus):
    return tiny_corpus.windows(32, 80, 0).to(DEVICE)


def fresh(normalise: bool = True) -> LinearRouter:
    bias = torch.linspace(0.1, 1.5, 8).view(4, 2)
    return LinearRouter(torch.zeros(4, 2, 32), bias, normalise=normalise).to(DEVICE)


def test_budget_alone_has_a_gradient_into_every_router(tiny, windows):
    model = tiny()
    for budget in ("flops", "modules"):
        for estimator in ("deterministic", "gumbel"):
            router = fresh()
            method = Routed(router, tuning(budget=budget, estimator=estimator))
            with attach(model, method, backend="masked"):
                model(windows[:2])
            method.executed(budget_shares(model, 32, budget)).backward()
            assert (router.bias.grad > 0).all()
            assert (router.weight.grad.abs().sum(-1) > 0).all()


def test_budget_alone_has_a_gradient_into_every_layer_of_mlp_routers(tiny, windows):
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 2, 8, 32), (4, 2, 8), (4, 2, 8), (4, 2))
    parts = [torch.rand(*shape, generator=generator) * 0.1 for shape in shapes]
    router = MLPRouter(*parts, normalise=True)
    method = Routed(router, tuning())
    model = tiny()
    with attach(model, method, backend="masked"):
        model(windows[:2])
    method.executed(budget_shares(model, 32)).backward()
    for parameter in router.parameters():
        assert (parameter.grad.reshape(4, 2, -1).abs().sum(-1) > 0).all()


def test_loss_has_a_gradient_into_every_router_and_none_into_the_model(tiny, windows):
    model, router = tiny(), fresh()
    with attach(model, Routed(router, tuning()), backend="masked"):
        loss(model, windows[:2]).backward()
    assert (router.bias.grad != 0).all()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_gates_are_hard_and_only_the_gradient_is_soft(tiny, windows):
    router = fresh().cpu()
    method = Routed(router, tuning())
    method.start(_context())
    hidden = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        router.weight.normal_(generator=torch.Generator().manual_seed(1))
    gates = torch.stack(method.gates(1, hidden), -1)
    assert torch.equal(gates.round(), (router(1, hidden) >= 0).float())
    torch.testing.assert_close(gates, gates.round())
    assert 0 < gates.mean() < 1


def _context():
    """What the gates ask of a forward: nothing is padded, no phases."""
    from types import SimpleNamespace

    return SimpleNamespace(generation=None, layers=4)


def test_gumbel_samples_in_training_with_the_logits_odds():
    method = Routed(fresh(), tuning(estimator="gumbel", temperature=(1.0, 1.0)))
    method.start(_context())
    torch.manual_seed(0)
    executed = torch.stack(method.gates(3, torch.zeros(8, 4000, 32)), -1).mean((0, 1))
    torch.testing.assert_close(executed, fresh().bias[3].sigmoid().cpu(), atol=0.01, rtol=0)


@pytest.mark.parametrize("objective", ["ce", "kl"])
@pytest.mark.parametrize("target", [1.25, 2.0])
def test_training_meets_the_budget(tiny, windows, target, objective):
    wanted = tuning(target, objective=objective)
    curve = tune_router(tiny(), fresh(), windows, wanted, SCHEDULE, progress=False)
    assert len(curve) == 40
    assert curve[0]["executed"] == 1.0
    if objective == "kl":
        assert curve[0]["loss"] == pytest.approx(0.0, abs=1e-5)
    assert [row["wanted"] for row in curve[19:]] == pytest.approx([1 / target] * 21)
    assert curve[9]["wanted"] == pytest.approx((1 + 1 / target) / 2)
    executed = sum(row["executed"] for row in curve[-8:]) / 8
    assert executed == pytest.approx(1 / target, abs=0.08)


def test_target_one_leaves_the_model_dense(tiny, windows):
    model, router = tiny(), fresh()
    curve = tune_router(model, router, windows, tuning(1.0), SCHEDULE, progress=False)
    assert curve[-1]["executed"] == 1.0
    with attach(model, Routed(router, tuning()), backend="masked"):
        routed = model(windows[:2]).logits
    torch.testing.assert_close(routed, model(windows[:2]).logits, atol=1e-5, rtol=0)


def test_training_is_deterministic(tiny, windows):
    results = []
    for _ in range(2):
        router = fresh()
        curve = tune_router(tiny(), router, windows, tuning(), SCHEDULE, progress=False)
        results.append((curve, router.weight.detach(), router.bias.detach()))
    assert results[0][0] == results[1][0]
    assert torch.equal(results[0][1], results[1][1])
    assert torch.equal(results[0][2], results[1][2])
    assert results[0][1].abs().sum() > 0


def test_shares_are_flops(tiny):
    shares = budget_shares(tiny(), 10)
    attention = 2 * (32 * 32 + 2 * 32 * 16 + 32 * 32) + 2 * 2 * 32 * 10
    mlp = 2 * 3 * 32 * 64
    assert shares.sum().item() == pytest.approx(1.0)
    assert (shares[0, 0] / shares[0, 1]).item() == pytest.approx(attention / mlp)


def test_modules_weigh_the_same(tiny):
    torch.testing.assert_close(budget_shares(tiny(), 10, "modules"), torch.full((4, 2), 0.125))


def test_the_wanted_share_follows_ramp_or_curriculum():
    assert tuning(2.0, ramp=0.0).wanted(0, 100, 1.0) == 0.5
    assert tuning(2.0, ramp=0.5).wanted(24, 100, 1.0) == pytest.approx(0.75)
    steps = tuning(2.0, curriculum=(0.1, 500))
    found = [round(steps.wanted(n, 9999, 1.0), 6) for n in (0, 499, 500, 2500)]
    assert found == [1.0, 1.0, 0.9, 0.5]
    assert tuning(2.0, cost="linear").wanted(0, 100, 1.0) == 0.0


def test_a_linear_cost_is_the_executed_share(tiny, windows):
    """No share is wanted; the dearer it is, the less is executed."""
    shares = []
    for penalty in (0.5, 20.0):
        wanted = tuning(cost="linear", penalty=penalty, ramp=0.0, bias_rate=0.05)
        curve = tune_router(tiny(), fresh(), windows, wanted, SCHEDULE, progress=False)
        assert {row["wanted"] for row in curve} == {0.0}
        shares.append([row["executed"] for row in curve])
    assert shares[0][0] == shares[1][0] == 1.0
    assert shares[1][-1] < shares[0][-1]


def test_one_logit_decides_for_both_sublayers(tiny, windows):
    router = LinearRouter(
        torch.zeros(4, 1, 32), torch.tensor([[1.0], [-1], [1], [-1]]), normalise=True
    )
    model, method = tiny(), Routed(router, tuning())
    with attach(model, method, backend="masked") as trace:
        model(windows[:2])
    assert trace.executed().tolist() == [[1, 1], [0, 0], [1, 1], [0, 0]]
    shares = budget_shares(model, 32)
    executed = method.executed(shares)
    assert executed.item() == pytest.approx(shares[[0, 2]].sum().item())
    executed.backward()
    assert (router.bias.grad > 0).all()


def test_statistics_are_those_of_the_streams(tiny, windows):
    model = tiny()
    with torch.no_grad():
        states = model(windows[:4], output_hidden_states=True).hidden_states[:-1]
    mean, deviation = stream_statistics(model, windows[:4], normalise=False)
    for layer, state in enumerate(states):
        flat = state.flatten(0, 1)
        torch.testing.assert_close(mean[layer], flat.mean(0).cpu())
        torch.testing.assert_close(deviation[layer], flat.std(0).cpu() + 1e-3)
    assert not any(block._forward_pre_hooks for block in model.model.layers)


def test_phase_generation_keeps_prompts_whole_and_counts_generated_tokens(tiny, windows):
    model = tiny()
    method = Routed(fresh(), tuning(phases="generation"))
    with torch.no_grad():
        method.router.bias.fill_(-1.0)
    with attach(model, method, backend="masked", prompt_length=16):
        routed = model(windows[:2]).logits
    torch.testing.assert_close(routed[:, :16], model(windows[:2]).logits[:, :16])
    assert method.executed(budget_shares(model, 32)).item() == pytest.approx(0.0, abs=1e-6)


def test_marked_parameters_of_the_model_are_trained_along(tiny, windows):
    model = tiny()
    weight = model.model.layers[1].self_attn.q_proj.weight
    before, frozen = weight.clone(), model.model.layers[1].self_attn.k_proj.weight.clone()
    weight.requires_grad_(True)
    mark_along([weight])
    tune_router(model, fresh(), windows, tuning(), SCHEDULE, progress=False)
    assert not torch.equal(weight, before)
    assert torch.equal(model.model.layers[1].self_attn.k_proj.weight, frozen)


def test_a_model_that_nobody_froze_stays_as_it_is(tiny, windows):
    """As transformers loads it: every parameter asks for a gradient."""
    model = tiny().requires_grad_(True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tune_router(model, fresh(), windows, tuning(), SCHEDULE, progress=False)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
