"""Scores of adapters: learned over a trained change, and what they keep trained anew."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from conftest import DEVICE, make_tiny
from gating import GivenPlan, plan_without
from torch.nn.functional import cross_entropy
from transformers.pytorch_utils import Conv1D

from dyndepth.cells.recipe import ALL, Recipe, parse_recovery
from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.fitting import loop
from dyndepth.fitting.importance import Settings, rank
from dyndepth.fitting.recovery import training
from dyndepth.fitting.recovery.adapters import CARD, adaptable, adapted, load_adapter
from dyndepth.fitting.recovery.kept import recover_cached
from dyndepth.fitting.recovery.significance import most_significant, weigh
from dyndepth.fitting.recovery.training import injected, recover
from dyndepth.models.families import FAMILIES
from dyndepth.studies.significance import agreement, unit_scores

pytestmark = pytest.mark.skipif(
    DEVICE.type == "standin",
    reason="adapters merge into plain parameters, and the stand-in's are a class of their own",
)
NAME = training._NAME
QUICK = {"rank": 2, "steps": 3, "batch": 2, "length": 16, "rate": 3e-2}
ILA = Recipe(modules="ila", keep=0.3, score_steps=2, **QUICK)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """A cache of the test's own."""
    monkeypatch.setenv("DYNDEPTH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


# --- recipes ------------------------------------------------------------------------------------


def test_a_recipe_without_ranking_has_the_text_that_it_always_had():
    assert str(Recipe()) == (
        "lora(rank=4, alpha=8, dropout=0, targets=query+value+gate, steps=40, batch=4, length=256, "
        "accumulate=1, rate=0.001, warm_up=0.1, weight_decay=0, precision=no)"
    )
    assert str(Recipe(kind="joint")) == (
        "joint(rank=4, alpha=8, dropout=0, targets=query+value+gate)"
    )


def test_a_ranking_recipe_is_read_back_equal():
    recipe = parse_recovery("lora(modules=ila)")
    assert str(recipe).endswith("modules=ila, keep=0.3, score_steps=40, score_rate=0.1)")
    assert recipe.targets == ALL
    for text in ("lora(modules=ila)", "lora(modules=ila, keep=1, targets=value)"):
        recipe = parse_recovery(text)
        assert parse_recovery(str(recipe)) == recipe == parse_recovery(recipe.short)
    assert recipe.short == "lora(targets=value, modules=ila, keep=1)"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lora(modules=ila, keep=0)", "keep must be above 0 and at most 1, not 0"),
        ("lora(modules=ila, keep=1.5)", "keep must be above 0 and at most 1, not 1.5"),
        ("lora(keep=0.3)", "keep is of a recovery with modules=ila; give that as well"),
        ("lora(score_steps=3)", "score_steps is of a recovery with modules=ila"),
        ("lora(modules=ila, score_steps=0)", "score_steps must be at least 1"),
        ("lora(modules=ila, score_rate=0)", "score_rate must be positive"),
        ("lora(modules=illa)", "modules"),
        ("joint(modules=ila)", "recovery 'joint' has no parameter 'modules'"),
    ],
)
def test_wrong_recipes_get_a_sentence(text, says):
    with pytest.raises(UserError, match=says) as fault:
        parse_recovery(text)
    assert "\n" not in str(fault.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_targets_are_all_linear_maps_of_the_blocks(family):
    model = make_tiny(family)
    linears = {n for n, m in model.named_modules() if isinstance(m, torch.nn.Linear | Conv1D)}
    found = adaptable(model, Recipe(targets=ALL))
    outside = {name for name in linears if name.endswith(("lm_head", "embed_out"))}
    assert set(found) == linears - outside
    assert len(found) % 4 == 0


def test_a_projection_that_a_family_lacks_is_told():
    with pytest.raises(UserError, match="block 0 has no up projection, so no adapter"):
        adaptable(make_tiny("phi3"), Recipe(targets="up"))


# --- scores -------------------------------------------------------------------------------------


def drawn(layers, dtype=None):
    """Give every adapter a change that is not zero."""
    generator = torch.Generator().manual_seed(2)
    for layer in layers.values():
        for factor in (layer.lora_A[NAME], layer.lora_B[NAME]):
            factor.to(dtype)
            factor.weight.data = 0.2 * torch.randn(
                factor.weight.shape, generator=generator, dtype=dtype
            )


def test_weights_of_one_are_lora_and_of_zero_are_dense(tiny_corpus):
    model, ids = make_tiny(), tiny_corpus.windows(12, 2, 0)
    dense = model(ids).logits
    with injected(model, ILA) as layers:
        drawn(layers)
        scales = {name: layer.scaling[NAME] for name, layer in layers.items()}
        lora = model(ids).logits
        weigh(layers, NAME, scales, torch.ones(len(layers)))
        assert torch.equal(model(ids).logits, lora)
        weigh(layers, NAME, scales, torch.zeros(len(layers)))
        assert torch.equal(model(ids).logits, dense)
        weigh(layers, NAME, scales, torch.full((len(layers),), 0.5))
        assert not torch.allclose(model(ids).logits, dense, atol=1e-2)
    assert not torch.allclose(lora, dense, atol=1e-2)


def test_gradient_of_a_score_is_that_of_the_weight_along_the_change(tiny_corpus):
    """In float64, on a family that computes nothing in less: against the gradient of the loss in
    the merged weights, and against finite differences of a stock model's loss."""
    model, ids = make_tiny("gpt2").double(), tiny_corpus.windows(12, 2, 0)

    def nats():
        logits = model(ids).logits
        return cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    targets = adaptable(model, ILA)
    scores = torch.linspace(-2, 2, len(targets), dtype=torch.float64, requires_grad=True)
    with injected(model, ILA) as layers:
        drawn(layers, torch.float64)
        scales = {name: layer.scaling[NAME] for name, layer in layers.items()}
        weigh(layers, NAME, scales, scores.sigmoid())
        nats().backward()
        changes = {
            name: scales[name] * (layer.lora_B[NAME].weight @ layer.lora_A[NAME].weight).detach().T
            for name, layer in layers.items()
        }
    bare = {name: module.weight.data.clone() for name, module in targets.items()}

    def merged(values):
        for (name, module), value in zip(targets.items(), values, strict=True):
            module.weight.data = bare[name] + value * changes[name]
        return nats()

    gamma = scores.detach().sigmoid()
    for module in targets.values():
        module.weight.requires_grad_(True)
    merged(gamma).backward()
    slope = gamma * (1 - gamma)
    along = torch.stack([(m.weight.grad * changes[n]).sum() for n, m in targets.items()]) * slope
    torch.testing.assert_close(scores.grad, along, atol=1e-12, rtol=1e-8)
    for index in (0, 5, len(targets) - 1):
        step = torch.zeros_like(gamma)
        step[index] = 1e-5
        ends = [merged((scores.detach() + sign * step).sigmoid()).item() for sign in (1, -1)]
        assert (ends[0] - ends[1]) / 2e-5 == pytest.approx(along[index].item(), rel=1e-5)
    assert along.abs().min() > 1e-6


def test_the_highest_scores_of_what_was_changed_are_kept():
    scores, changed = [0.3, -1.0, 0.9, 0.0, 0.3], [True, True, True, False, True]
    assert most_significant(scores, changed, 0.2) == [2]
    assert most_significant(scores, changed, 0.6) == [2, 0]
    assert most_significant(scores, changed, 0.8) == [2, 0, 4]
    assert most_significant(scores, changed, 0.99) == [2, 0, 4, 1]
    assert most_significant(scores, changed, 1.0) == [2, 0, 4, 1, 3]
    assert most_significant(scores, changed, 0.01) == [2]


# --- recoveries ---------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_what_is_kept_is_trained_alone_and_merged_as_peft_does(family, tiny_corpus):
    from peft import PeftModel

    model = make_tiny(family)
    before = {name: (p, p.clone()) for name, p in model.named_parameters()}
    # One sublayer of block 1 and all of block 2 never run.
    method = GivenPlan(plan=plan_without(4, (1, 0), (2, 0), (2, 1)))
    method, adapter = recover_cached(method, model, tiny_corpus, ILA, progress=False)
    assert all(p is before[n][0] and torch.equal(p, before[n][1]) for n, p in
               model.named_parameters())  # fmt: skip
    rows = adapter.card["significance"]["modules"]
    assert [row["module"] for row in rows] == list(adaptable(model, ILA))
    idle = {(row["layer"], row["sublayer"]) for row in rows if not row["changed"]}
    assert idle == {(1, "attention"), (2, "attention"), (2, "mlp")}
    kept = [row for row in rows if row["kept"]]
    assert len(kept) == round(0.3 * sum(row["changed"] for row in rows))
    least = min(row["score"] for row in kept)
    assert all(row["score"] <= least for row in rows if row["changed"] and not row["kept"])
    assert len({row["score"] for row in rows}) > 4
    assert set(adapter.factors) == {row["module"] for row in kept}
    numbers = sum(factor.numel() for pair in adapter.factors.values() for factor in pair)
    assert adapter.card["parameters"] == numbers
    assert adapter.card["tokens"] == (3 + 2 + 3) * 2 * 16
    ids = tiny_corpus.windows(16, 2, 0)
    with adapted(model, adapter):
        ours = model(ids).logits
    theirs = PeftModel.from_pretrained(make_tiny(family), str(adapter.folder)).eval()(ids).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(ours, model(ids).logits, atol=1e-2)
    _, again = recover_cached(method, model, tiny_corpus, ILA, progress=False)
    assert again.folder == adapter.folder


def test_keeping_all_is_plain_lora_on_all_targets(tiny_corpus):
    model, method = make_tiny(), load_method("dense")
    plain = recover(method, model, tiny_corpus, Recipe(targets=ALL, **QUICK), progress=False)
    whole = Recipe(modules="ila", keep=1, score_steps=2, **QUICK)
    found = recover(method, model, tiny_corpus, whole, progress=False)
    assert found.curve == plain.curve
    assert found.parameters == plain.parameters
    for name, pair in plain.factors.items():
        for mine, theirs in zip(found.factors[name], pair, strict=True):
            assert torch.equal(mine, theirs)
    assert len(found.scores.kept) == len(plain.factors) == 28


def test_what_is_kept_starts_and_is_trained_as_lora_on_those_alone(tiny_corpus):
    """With the targets of one role kept, by a recipe that names that role."""
    model, method = make_tiny(), load_method("dense")
    values = Recipe(targets="value", **QUICK)
    plain = recover(method, model, tiny_corpus, values, progress=False)
    with injected(model, ILA, only=list(plain.factors)):
        curve = training._train(method, model, tiny_corpus, values, 0, False, "kept")
    assert curve == plain.curve


@pytest.mark.parametrize("call", [2, 5, 7])
def test_a_killed_recovery_goes_on_in_each_of_its_trainings(tiny_corpus, monkeypatch, cache, call):
    model, method = make_tiny(), load_method("uls", target_speedup=1.3)
    calm = recover(method, model, tiny_corpus, ILA, method.seed, progress=False)
    monkeypatch.setattr(loop, "CHECKPOINT_SECONDS", -1.0)
    whole, calls = training.window_loss, []

    def struck(*arguments):
        calls.append(1)
        if len(calls) == call:
            raise KeyboardInterrupt
        return whole(*arguments)

    monkeypatch.setattr(training, "window_loss", struck)
    with pytest.raises(KeyboardInterrupt):
        recover_cached(method, model, tiny_corpus, ILA, progress=False)
    _, adapter = recover_cached(method, model, tiny_corpus, ILA, progress=False)
    # The struck call, and the one before it whose numbers were still being read.
    assert len(calls) <= 3 + 2 + 3 + 2
    assert adapter.card["significance"] == json.loads(json.dumps(calm.scores.facts()))
    for name, pair in calm.factors.items():
        for mine, theirs in zip(adapter.factors[name], pair, strict=True):
            assert torch.equal(mine, theirs.bfloat16())
    assert not list(cache.rglob("*.checkpoint"))


def test_what_ranks_the_modules_serves_every_share(tiny_corpus, monkeypatch):
    model, method = make_tiny(), load_method("uls", target_speedup=1.3)
    calm = recover(method, model, tiny_corpus, ILA, method.seed, progress=False)
    whole, calls = training.window_loss, []
    monkeypatch.setattr(training, "window_loss", lambda *a: calls.append(1) or whole(*a))
    found = {}
    for keep in (0.1, 0.3, 1.0):
        recipe = replace(ILA, keep=keep)
        found[keep] = recover_cached(method, model, tiny_corpus, recipe, progress=False)[1].card
    assert len(calls) == 3 + 2 + 3 + 3
    assert found[0.3]["tokens"] == calm.tokens
    assert found[0.3]["significance"] == calm.scores.facts()
    kept = {k: {r["module"] for r in c["significance"]["modules"] if r["kept"]}
            for k, c in found.items()}  # fmt: skip
    assert [len(each) for each in kept.values()] == [2, 6, 28]  # 21 were changed
    assert kept[0.1] < kept[0.3]


def test_a_card_of_other_modules_is_refused(tiny_corpus):
    model = make_tiny()
    _, adapter = recover_cached(load_method("dense"), model, tiny_corpus, ILA, progress=False)
    card = adapter.folder / CARD
    changed = json.loads(card.read_text())
    changed["significance"]["modules"].pop()
    card.write_text(json.dumps(changed))
    with pytest.raises(UserError, match="ranks other modules than this model has"):
        load_adapter(adapter.folder, model)


# --- beside importance --------------------------------------------------------------------------


def card_of(scores):
    """A card of blocks with two maps each: ``[(attention, mlp), ...]``, None for unchanged."""
    rows = [
        {"layer": layer, "sublayer": sublayer, "score": score or 0.0, "changed": score is not None}
        for layer, both in enumerate(scores)
        for sublayer, score in zip(("attention", "mlp"), both, strict=True)
    ]
    return {"significance": {"modules": rows}}


def test_scores_of_units_are_means_over_what_was_changed():
    card = card_of([(1.0, 3.0), (None, -1.0), (None, None)])
    assert unit_scores(card, "block") == {(0, "block"): 2.0, (1, "block"): -1.0}
    assert unit_scores(card, "sublayer") == {
        (0, "attention"): 1.0, (0, "mlp"): 3.0, (1, "mlp"): -1.0,
    }  # fmt: skip
    with pytest.raises(UserError, match="has no scores; recover with modules=ila"):
        unit_scores({}, "block")


def test_agreement_pairs_each_block_with_its_importance(tiny_corpus):
    model = make_tiny()
    ranking = rank(model, tiny_corpus, Settings(criterion="block_influence", windows=2, length=16))
    own = [row["score"] for row in ranking.rows()]
    same = agreement(card_of([(value, value) for value in own]), ranking)
    assert (same.rho, same.n) == (pytest.approx(1.0), 4)
    turned = agreement(card_of([(-value, -value) for value in own]), ranking)
    assert turned.rho == pytest.approx(-1.0)
    fewer = agreement(card_of([(value, value) for value in own[:3]] + [(None, None)]), ranking)
    assert fewer.n == 3
