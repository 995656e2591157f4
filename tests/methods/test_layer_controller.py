"""Layer controllers: what is protected, what gates depend on, the budget, the control."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.fitting.calibration import block_speedup
from dyndepth.fitting.routers import Routed, Tuning, budget_shares, loss
from dyndepth.methods.layer_controller import (
    BlockRouter,
    LayerController,
    block_damage,
    initial_router,
)
from dyndepth.runtime.attach import attach

LAYERS = 6
QUICK = LayerController.quick


@pytest.fixture
def model(tiny):
    return tiny(num_hidden_layers=LAYERS)


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.fixture
def calibration(tiny_corpus):
    return tiny_corpus.windows(48, 8, 0, split="calibration").to(DEVICE)


def fitted(model, corpus, **changes):
    return LayerController(**{"target_speedup": 1.4} | QUICK | changes).fit(model, corpus)


@pytest.mark.parametrize("phases", ["generation", "both"])
@pytest.mark.parametrize("target", [1.2, 1.4, 2.0])
def test_fit_meets_the_target_and_gates_differ_by_token(
    model, tiny_corpus, calibration, phases, target
):
    method = fitted(model, tiny_corpus, phases=phases, target_speedup=target)
    assert method.facts["achieved_speedup"] == pytest.approx(target, rel=0.03)
    assert block_speedup(model, method, calibration) == method.facts["achieved_speedup"]
    with attach(model, method, prompt_length=24) as trace:
        model(calibration)
        gates = trace.gates()
    inner = gates[:, 24:, 1:-1, 0].double().mean((0, 1))
    assert ((inner > 0) & (inner < 1)).any()
    assert torch.equal(gates[..., 0], gates[..., 1])


@pytest.mark.parametrize("reads", ["stream", "constant"])
def test_the_first_and_the_last_block_always_run(model, tiny_corpus, calibration, reads):
    method = fitted(model, tiny_corpus, reads=reads, target_speedup=LAYERS / 2, phases="both")
    with attach(model, method) as trace:
        model(calibration)
    executed = trace.executed()
    assert (executed[[0, -1]] == 1).all()
    assert (executed[1:-1] < 0.2).all()
    assert LayerController().max_speedup(LAYERS) == LAYERS / 2
    with pytest.raises(UserError, match="at most 3 on this model, not 3.5"):
        fitted(model, tiny_corpus, target_speedup=3.5)


def test_the_prompt_keeps_full_depth_where_asked(model, tiny_corpus, tokens):
    method = fitted(model, tiny_corpus, phases="generation")
    with attach(model, method, warn=False) as trace:
        prompt = model(tokens).logits
        assert (trace.executed() == 1).all()
        trace.reset()
        trace.prompt_length = 6
        model(tokens)
        executed = trace.executed("generation"), trace.executed("prompt")
    assert torch.equal(prompt, model(tokens).logits)
    assert (executed[1] == 1).all()
    assert (executed[0] < 1).any()


def test_rule_is_the_formula(model, tokens):
    generator = torch.Generator().manual_seed(0)
    method = LayerController(target_speedup=1.5, phases="both")
    method.tensors = {
        "weight": torch.randn(LAYERS, 1, 32, generator=generator),
        "bias": torch.randn(LAYERS, 1, generator=generator),
    }
    method.facts = {"threshold": 0.3}
    streams = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad(), attach(model, method) as trace:
        model(tokens)
        gates = trace.gates()
    for hook in hooks:
        hook.remove()
    for layer in range(1, LAYERS - 1):
        stream = streams[layer] / streams[layer].square().mean(-1, keepdim=True).sqrt()
        logits = stream @ method.tensors["weight"][layer, 0] + method.tensors["bias"][layer, 0]
        assert torch.equal(gates[:, :, layer, 0], logits.cpu() >= 0.3)
    assert trace.flops["router"] == tokens.numel() * (LAYERS - 2) * 2 * 32


def test_a_control_that_reads_nothing_is_one_plan(model, tiny_corpus, calibration):
    method = fitted(model, tiny_corpus, reads="constant", phases="both", target_speedup=1.5)
    assert (method.granularity, method.kv_policy) == ("static", "drop")
    kept = LayerController(reads="constant", phases="generation")
    assert kept.kv_policy == "prompt_only"
    assert (method.tensors["weight"] == 0).all()
    with attach(model, method) as trace:
        model(calibration)
    executed = trace.executed()
    assert ((executed == 0) | (executed == 1)).all()
    assert executed.sum() == 2 * 4  # of six blocks, what comes nearest to 1.5
    assert method.facts["achieved_speedup"] == pytest.approx(1.5)
    assert trace.flops["router"] == 0


@pytest.mark.parametrize("estimator", ["deterministic", "gumbel"])
@pytest.mark.parametrize("cost", ["target", "linear"])
def test_the_budget_has_a_gradient_into_every_controller(
    model, tiny_corpus, tokens, estimator, cost
):
    router = initial_router(LayerController(initial="random"), model, tiny_corpus)
    tuning = Tuning(target_speedup=1.5, estimator=estimator, cost=cost, temperature=(1.0, 1.0))
    method = Routed(router, tuning)
    with attach(model, method, backend="masked"):
        model(tokens)
    executed = method.executed(budget_shares(model, 16))
    (executed - tuning.wanted(0, 1, 1.0)).abs().backward()
    sign = torch.sign(executed.detach() - tuning.wanted(0, 1, 1.0))
    assert (router.bias.grad[1:-1] * sign > 0).all()
    assert (router.weight.grad[1:-1].abs().sum(-1) > 0).all()
    assert (router.bias.grad[[0, -1]] == 0).all()


def test_one_draw_a_block(model, tokens):
    """Both sublayers of a block share their gate in training too, under noise as well."""
    router = BlockRouter(torch.zeros(LAYERS, 1, 32), torch.zeros(LAYERS, 1), normalise=True)
    method = Routed(router, Tuning(target_speedup=2, estimator="gumbel"))
    with attach(model, method, backend="masked") as trace:
        model(tokens)
        gates = trace.gates()
    assert torch.equal(gates[..., 0], gates[..., 1])
    assert 0.2 < gates[:, :, 1:-1].double().mean() < 0.8
    assert gates[:, :, [0, -1]].all()
    executed = method.executed(budget_shares(model, 16)).item()
    assert executed == pytest.approx(gates.double().mean().item(), abs=1e-5)


def test_a_linear_cost_wants_nothing_executed(model, tiny_corpus):
    """The heavier the cost, the less is executed; the threshold then meets the target."""
    shares = []
    for penalty in (1e-3, 30.0):
        method = fitted(
            model,
            tiny_corpus,
            cost="linear",
            penalty=penalty,
            steps=40,
            bias_rate=0.1,
            weight_rate=1e-2,
        )
        assert {row["wanted"] for row in method.curve} == {0.0}
        assert method.facts["achieved_speedup"] == pytest.approx(1.4, rel=0.05)
        shares.append(method.curve[-1]["executed"])
    assert shares[1] < shares[0] - 0.2


def test_the_wanted_share_falls_over_the_ramp(model, tiny_corpus):
    wanted = [row["wanted"] for row in fitted(model, tiny_corpus).curve]
    assert wanted == sorted(wanted, reverse=True)
    assert wanted[3:] == pytest.approx([1 / 1.4] * 5)
    assert fitted(model, tiny_corpus).curve[0]["executed"] == 1.0


def test_biases_begin_in_the_order_of_damage(model, tiny_corpus):
    windows = tiny_corpus.windows(24, 2, 0).to(DEVICE)
    damage = block_damage(model, windows)
    for layer in (1, 4):
        model.model.layers[layer].forward = lambda hidden, **_: hidden
        without = loss(model, windows).item()
        del model.model.layers[layer].forward
        expected = without - loss(model, windows).item()
        assert damage[layer - 1].item() == pytest.approx(expected, abs=1e-5)
    method = LayerController(**QUICK)
    bias = initial_router(method, model, tiny_corpus).bias[1:-1, 0]
    assert torch.equal(bias.argsort(), damage.argsort())
    assert (bias > 0).all()


def test_the_published_way_trains(model, tiny_corpus):
    method = load_method(
        "layer_controller(initial=random, estimator=gumbel, objective=ce, cost=linear)",
        target_speedup=1.4,
        penalty=1.0,
        **QUICK,
    ).fit(model, tiny_corpus)
    assert method.facts["achieved_speedup"] == pytest.approx(1.4, rel=0.03)
    assert method.facts["tokens"] == 8 * 2 * 24
    assert len(method.curve) == 8


def test_seeds_decide(model, tiny_corpus):
    one, same, other = (
        fitted(model, tiny_corpus, initial="random", estimator="gumbel", seed=seed)
        for seed in (0, 0, 1)
    )
    assert torch.equal(one.tensors["weight"], same.tensors["weight"])
    assert one.facts == same.facts
    assert not torch.equal(one.tensors["weight"], other.tensors["weight"])


def test_refusals(model, tiny, tiny_corpus, tokens):
    with pytest.raises(UserError, match="give fit a corpus"):
        LayerController(target_speedup=1.4).fit(model)
    unfitted = LayerController(target_speedup=1.4, phases="both")
    with pytest.raises(UserError, match="not fitted.*call .fit"), attach(model, unfitted):
        pass
    deeper = tiny(num_hidden_layers=8)
    method = fitted(model, tiny_corpus, phases="both")
    with attach(deeper, method), pytest.raises(UserError, match="of 6 blocks, not 8"):
        deeper(tokens)
    for changes, told in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"penalty": 0.0}, "penalty must be positive"),
        ({"ramp": 2.0}, "ramp must lie between 0 and 1"),
    ):
        with pytest.raises(UserError, match=told):
            load_method("layer_controller", **changes)
