"""Fits, gates and scores beside a model that lies on another device than the CPU, or on two.

The device is a stand-in (``standin``): it computes what the CPU does, bit for bit, and refuses
tensors of two devices as a GPU does. ``test_devices`` runs this file, in a process of its own.
"""

from __future__ import annotations

import functools

import pytest
import standin
import torch
from conftest import make_tiny
from gating import RandomMask
from test_attach import incremental

from dyndepth.common.registry import load_method, method_class, methods
from dyndepth.evaluation import plan_scoring
from dyndepth.evaluation.generation import Prompt, generate
from dyndepth.evaluation.scoring import Group, score, score_alone
from dyndepth.fitting import importance
from dyndepth.fitting.fits import load_fit, save_fit
from dyndepth.models.families import family
from dyndepth.models.seeding import seeded
from dyndepth.runtime import many_plans
from dyndepth.runtime.attach import attach

VARIANTS = [
    *methods(),
    "skipgpt(standardise=true, initial=order)",
    "skipgpt(initial=damage, estimator=gumbel, objective=ce, phases=generation)",
    "skipgpt(preset=paper, ramp=0.5, curriculum=false, penalty=8.0)",
    "skipgpt(router=mlp, initial=order, normalise=false)",
    "skipgpt(reads=constant)",
    "layer_controller(initial=random, estimator=gumbel, objective=ce, cost=linear)",
    "layer_controller(reads=constant, phases=both)",
    "early_exit(confidence=saturation, phases=both, every=1)",
    "random_mask(rates=uniform)",
    "static_pruning(criterion=perplexity)",
    "exit_oracle(agree=stays, phases=both)",
]
SPREAD = ["skipgpt", "layer_controller", "exit_oracle", "random_skip", "random_mask(rates=uniform)"]
SPREAD += [spec for spec in VARIANTS if any(x in spec for x in ("mlp", "every=1", "perplexity"))]
SHORTER = {
    "skipgpt": {"steps": 2, "windows": 4, "threshold": "zero"},
    "layer_controller": {"steps": 2},
    "random_mask": {"source": "skipgpt(initial=damage, steps=2, length=24, threshold=zero)"},
}
DOCUMENTS = ["a", "b"]


@pytest.fixture(scope="module")
def device():
    return torch.device(standin.NAME, 0)


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNDEPTH_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def on_cpu(tiny_corpus):
    """Facts of a fit on the CPU and what comes of it there; each once."""

    @functools.cache
    def run(spec):
        model = placed("cpu", None)
        method = fitted(spec, model, tiny_corpus)
        return method.facts, *logits(model, method, "cpu")

    return run


def tokens(batch, length):
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))


def spread(model, device):
    """The first half of the blocks on the CPU, the rest on ``device``, by accelerate's hooks."""
    from accelerate import dispatch_model

    record = family(model)
    layers = f"{record.decoder}.{record.layers}"
    places = {name: "cpu" for name, module in model.named_modules() if not list(module.children())}
    places = {name: place for name, place in places.items() if not name.startswith(layers)}
    places |= {f"{layers}.{index}": "cpu" if index < 2 else str(device) for index in range(4)}
    places |= {f"{record.decoder}.{record.final_norm}": str(device), "lm_head": str(device)}
    return dispatch_model(model, places, main_device="cpu", force_hooks=True)


def placed(kind, device):
    model = make_tiny("llama", "eager").cpu()
    if kind == "spread":
        return spread(model, device)
    return model.to(device) if kind == "whole" else model


def unfitted(spec):
    name = spec.partition("(")[0]
    quick = method_class(name).quick | SHORTER.get(name, {})
    given = {key: value for key, value in quick.items() if f"{key}=" not in spec}
    reach = load_method(spec, **given).max_speedup(4)  # a bound that is not quite reached
    return load_method(spec, target_speedup=max(1.0, min(1.3, 0.98 * reach)), **given)


def fitted(spec, model, corpus):
    return unfitted(spec).fit(model, corpus)


def logits(model, method, device):
    """Of one forward, of a batch with padding, and of decoding over a cache; on the CPU."""
    ids = tokens(2, 9).to(device)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    with torch.no_grad(), attach(model, method, documents=DOCUMENTS, prompt_length=4) as trace:
        found = [model(ids).logits, model(ids, attention_mask=mask).logits[:, 5:]]
        trace.prompt_length = None
        found.append(incremental(model, ids, prompt=7))
        return [each.cpu() for each in found], trace.totals(), trace.executed()


@pytest.mark.parametrize(
    ("kind", "spec"),
    [("whole", spec) for spec in VARIANTS] + [("spread", spec) for spec in SPREAD],
)
def test_fits_and_gates(spec, kind, device, on_cpu, tiny_corpus):
    facts, want, flops, executed = on_cpu(spec)
    model = placed(kind, device)
    method = fitted(spec, model, tiny_corpus)
    if method.kv_policy == "evict":  # short forwards are not gathered there: another rounding
        facts = {key: pytest.approx(value, rel=1e-5) for key, value in facts.items()}
    assert method.facts == facts
    found, counted, ran = logits(model, method, device if kind == "whole" else "cpu")
    for one, other in zip(found, want, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    assert counted == flops
    assert torch.equal(ran, executed)


places = pytest.mark.parametrize("kind", ["whole", "spread"])


@places
def test_scores_and_texts(kind, device):
    """Of contexts with continuations: by one method, by many plans at once, and greedy texts."""
    rows = tokens(8, 12).tolist()
    groups = [Group(str(n), row[:9], [row[9:], row[3:5]]) for n, row in enumerate(rows[:3])]
    prompts = [Prompt(str(n), row[: 5 + n], 3, lambda _: False) for n, row in enumerate(rows[:3])]
    plans = torch.rand(3, 4, 2, generator=torch.Generator().manual_seed(0)) < 0.6

    def found(model):
        with attach(model, RandomMask()) as trace:
            scored = dict(score(model, trace, groups, 2))
            alone = [score_alone(model, trace, group) for group in groups]
            texts = dict(generate(model, trace, prompts, 2))
            flops = trace.totals()
        batches = [
            dict(plan_scoring.score(model, plans, groups, phases=phases))
            for phases in ("both", "generation")
        ]
        return scored, alone, texts, flops, batches, many_plans.losses(model, plans, tokens(2, 9))

    *want, want_batches, losses = found(placed("cpu", device))
    *got, got_batches, got_losses = found(placed(kind, device))
    assert got == want
    torch.testing.assert_close(got_batches, want_batches, atol=1e-5, rtol=0)
    torch.testing.assert_close(got_losses, losses, atol=1e-5, rtol=0)


@places
@pytest.mark.parametrize("criterion", ["angular", "taylor", "greedy", "joint"])
def test_importance(kind, device, criterion, tiny_corpus):
    settings = importance.Settings(criterion=criterion, windows=2, length=12)
    want = importance.rank(placed("cpu", device), tiny_corpus, settings, progress=False)
    found = importance.rank(placed(kind, device), tiny_corpus, settings, progress=False)
    assert found.order == want.order
    assert found.scores == pytest.approx(want.scores, abs=1e-6)


@places
def test_masks_may_lie_anywhere(kind, device):
    """A method need not know where a block lies: its masks are taken there."""

    class Elsewhere(RandomMask):
        def gates(self, layer, hidden):
            other = "cpu" if hidden.device.type == device.type else device
            return tuple(gate.to(other) for gate in super().gates(layer, hidden))

    for backend in ("sparse", "masked"):
        found = []
        for model, method in (
            (placed("cpu", device), RandomMask()),
            (placed(kind, device), Elsewhere()),
        ):
            ids = tokens(2, 9).to(next(model.parameters()).device)
            with torch.no_grad(), attach(model, method, backend=backend, prompt_length=4) as trace:
                found.append((model(ids).logits.cpu(), trace.gates(), trace.totals()))
        torch.testing.assert_close(found[1][0], found[0][0], atol=1e-5, rtol=0)
        assert torch.equal(found[1][1], found[0][1])
        assert found[1][2] == found[0][2]


def test_a_kept_fit_is_loaded_beside_the_model(device, tiny_corpus, tmp_path):
    model = placed("whole", device)
    method = fitted("layer_controller", model, tiny_corpus)
    want = logits(model, method, device)[0]
    assert method.tensors["weight"].device == device
    save_fit(method, model, tmp_path / "fit")
    fresh = unfitted("layer_controller")
    found = load_fit(fresh, model, tmp_path / "fit")
    assert found.tensors["weight"].device == device
    assert all(map(torch.equal, logits(model, found, device)[0], want))


@pytest.mark.parametrize("used", [True, False])
def test_random_numbers_go_on_as_before(device, used, monkeypatch):
    """Also those of a device that is in use elsewhere; one that is not in use is not asked."""
    monkeypatch.setattr(torch.standin, "is_initialized", lambda: used)
    for place in (torch.device("cpu"), device) if used else (torch.device("cpu"),):
        torch.manual_seed(3)
        want, there = torch.rand(2), torch.standin.get_rng_state()
        torch.manual_seed(3)
        with seeded(5, place):
            inside = torch.rand(2)
            seed = torch.standin.get_rng_state()
            assert torch.equal(seed, there) != used
            torch.standin.manual_seed_all(4)
        assert torch.equal(torch.rand(2), want)
        assert torch.equal(torch.standin.get_rng_state(), there) == used
        with seeded(5, place):
            assert torch.equal(torch.rand(2), inside)
            assert torch.equal(torch.standin.get_rng_state(), seed) == used


def test_the_device_refuses_what_a_gpu_refuses(device):
    there, here = torch.ones(3, device=device), torch.ones(3)
    mixed = "found at least two devices"
    for wrong in (
        lambda: there + here,
        lambda: here.add_(there),
        lambda: torch.where(here > 0, there, there),
        lambda: there.index_select(0, torch.tensor([0])),
        lambda: here[there.long()],
        lambda: torch.stack([there[0], here[0]]),
    ):
        with pytest.raises(RuntimeError, match=mixed):
            wrong()
    with pytest.raises(RuntimeError, match="for generator but found 'cpu'"):
        torch.rand(2, device=device, generator=torch.Generator())
    with pytest.raises(TypeError, match="can't convert standin:0"):
        there.numpy()
    assert (there * here[0])[torch.tensor([True, False, True])].tolist() == [1, 1]
    assert here.copy_(2 * there).tolist() == [2, 2, 2]
