"""What the methods with one trained gate a block share: budget, training, resuming, refusals."""

from __future__ import annotations

import pytest
import torch
from conftest import DEVICE

from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method, method_class
from dyndepth.fitting import loop, routers
from dyndepth.fitting.calibration import block_speedup
from dyndepth.fitting.losses import next_token_nats
from dyndepth.fitting.routers import Routed, Tuning, budget_shares
from dyndepth.methods.mod import ScoreRouter
from dyndepth.runtime.attach import attach

LAYERS = 6
every = pytest.mark.parametrize("name", ["mod", "d_llm", "flexidepth"])


@pytest.fixture
def model(tiny):
    return tiny(num_hidden_layers=LAYERS)


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 16), generator=torch.Generator().manual_seed(1)).to(DEVICE)


@pytest.fixture
def calibration(tiny_corpus):
    return tiny_corpus.windows(48, 8, 0, split="calibration").to(DEVICE)


def quick(name, **changes):
    return load_method(name, **{"target_speedup": 1.4} | method_class(name).quick | changes)


@every
@pytest.mark.parametrize("phases", ["generation", "both"])
@pytest.mark.parametrize("target", [1.2, 1.6])
def test_the_budget_is_met_by_both_sublayers_together(
    model, tiny_corpus, calibration, name, phases, target
):
    method = quick(name, phases=phases, target_speedup=target).fit(model, tiny_corpus)
    assert method.facts["achieved_speedup"] == pytest.approx(target, rel=0.01)
    assert block_speedup(model, method, calibration) == method.facts["achieved_speedup"]
    with attach(model, method, prompt_length=24) as trace:
        model(calibration)
        gates = trace.gates()
    routed = list(method.routed(LAYERS))
    assert torch.equal(gates[..., 0], gates[..., 1])
    assert gates[:, :, [layer for layer in range(LAYERS) if layer not in routed]].all()
    share = gates[:, 24:, routed].double().mean((0, 1))
    assert ((share > 0) & (share < 1)).any()
    assert bool(gates[:, :24].all()) == (phases == "generation")


@every
def test_training_lowers_what_it_minimises(model, tiny_corpus, name):
    """Loss and budget of the trained routers' gates, against those that it began with."""
    method = quick(name, steps=40, weight_rate=1e-2, bias_rate=0.2).fit(model, tiny_corpus)
    windows = tiny_corpus.windows(24, 8, 5).to(DEVICE)
    shares = budget_shares(model, 24)

    def minimised(router):
        gated = Routed(router, method.tuning())
        with torch.no_grad(), attach(model, gated, backend="masked", count=False):
            torch.manual_seed(0)
            nats = next_token_nats(model, windows)
            return (nats + method.penalty * gated.distance(shares, 1 / 1.4)).item()

    begun = method.initial(model, tiny_corpus).to(DEVICE)
    trained = method.built(LAYERS).to(DEVICE)
    assert minimised(trained) < minimised(begun) - 0.1
    assert len(method.curve) == 40
    assert method.facts["tokens"] == 40 * 2 * 24


@every
def test_the_gradient_reaches_every_parameter(model, tiny_corpus, tokens, name):
    method = quick(name)
    router = method.initial(model, tiny_corpus).to(DEVICE)
    with torch.no_grad():
        for parameter in router.parameters():
            # Nothing that is zero, so that nothing stands in the way.
            parameter += 0.1 * torch.randn(
                parameter.shape, generator=torch.Generator().manual_seed(3)
            ).to(DEVICE)
        router.bias -= router.bias.mean()
    gated = Routed(router, method.tuning())
    with attach(model, gated, backend="masked", count=False):
        torch.manual_seed(0)
        nats = next_token_nats(model, tokens)
    (nats + gated.distance(budget_shares(model, 16), 0.1)).backward()
    routed = list(method.routed(LAYERS))
    for key, parameter in router.named_parameters():
        rows = parameter.grad if len(parameter) == len(routed) else parameter.grad[routed]
        assert (rows.flatten(1).abs().sum(1) > 0).all(), key
    assert all(parameter.grad is None for parameter in model.parameters())


@every
def test_a_killed_fit_goes_on_with_the_same_curve(model, tiny_corpus, tmp_path, monkeypatch, name):
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", 0.0)
    expected, forwards = quick(name).fit(model, tiny_corpus), []
    whole = routers.final_states

    def killed(*given):
        forwards.append(None)
        if len(forwards) > 5:
            raise KeyboardInterrupt
        return whole(*given)

    def killed_nats(*given):
        forwards.extend([None, None])
        if len(forwards) > 5:
            raise KeyboardInterrupt
        return next_token_nats(*given)

    with loop.checkpoints(tmp_path):
        with monkeypatch.context() as patched:
            patched.setattr(routers, "final_states", killed)
            patched.setattr(routers, "next_token_nats", killed_nats)
            with pytest.raises(KeyboardInterrupt):
                quick(name).fit(model, tiny_corpus)
        assert list(tmp_path.iterdir())
        again = quick(name).fit(model, tiny_corpus)
    assert again.curve == expected.curve
    assert again.facts == expected.facts
    assert all(torch.equal(again.tensors[key], each) for key, each in expected.tensors.items())


@every
def test_what_cannot_be_is_told_in_a_sentence(model, tiny, tiny_corpus, tokens, name):
    most = method_class(name)().max_speedup(LAYERS)
    for given, corpus, said in (
        ({}, None, "give fit a corpus"),
        ({"target_speedup": most + 0.5}, tiny_corpus, f"at most {most:g}, not {most + 0.5:g}"),
    ):
        with pytest.raises(UserError, match=said) as told:
            quick(name, **given).fit(model, corpus)
        assert "\n" not in str(told.value)
    method = quick(name).fit(model, tiny_corpus)
    for other, said in (
        (tiny(num_hidden_layers=8), "of 6 blocks, not 8"),
        (tiny(num_hidden_layers=LAYERS, hidden_size=40), "of 32 dimensions, not 40"),
    ):
        with attach(other, method), pytest.raises(UserError, match=said):
            other(tokens)
    for field in ("steps", "penalty", "bias_rate"):
        with pytest.raises(UserError, match=f"{field} must be"):
            load_method(name, **{field: 0})


def test_a_penalty_rises_as_a_sine():
    tuning = Tuning(target_speedup=2, penalty=4.0, rise=1.0)
    assert tuning.pressed(99, 100) == pytest.approx(4.0)
    assert tuning.pressed(49, 100) == pytest.approx(4.0 * 0.5**0.5)
    assert Tuning(target_speedup=2, penalty=4.0).pressed(0, 100) == 4.0


def test_the_budget_of_each_token_leaves_the_first_ones_out(tiny, tokens):
    """Half of the tokens run all and half none: that is right in the mean, and wrong for each."""
    model = tiny()
    router = ScoreRouter(torch.zeros(4, 1, 32), torch.zeros(4, 1), normalise=True).to(DEVICE)

    def forward(layer, hidden):
        runs = torch.arange(hidden.shape[1], device=hidden.device) % 2 == 0
        return (2.0 * runs - 1).expand(hidden.shape[:2])[..., None] + router.bias[layer] * 0

    router.forward = forward
    shares = budget_shares(model, 16)
    for each_token, keep_first, wanted in (
        (False, 0, 0.0),
        (True, 0, 0.5),
        (False, 3, 6.5 / 13 - 6 / 13),
        (True, 3, 0.5),
    ):
        tuning = Tuning(target_speedup=2, each_token=each_token, keep_first=keep_first)
        gated = Routed(router, tuning)
        with attach(model, gated, backend="masked", count=False) as trace:
            model(tokens)
        assert gated.distance(shares, 0.5).item() == pytest.approx(wanted, abs=1e-6)
    with attach(model, gated, backend="masked") as trace:
        model(tokens)
        assert trace.gates()[:, :4].double().mean((0, 2, 3)).tolist() == [1, 1, 1, 0]
