"""SkipGPT: the rule, the fit, the shipped routers."""

from __future__ import annotations

import json
import os

import pytest
import torch
from conftest import DEVICE

from dyndepth.common.errors import UserError
from dyndepth.common.registry import load_method
from dyndepth.fitting.calibration import block_speedup
from dyndepth.fitting.fits import load_fit, save_fit
from dyndepth.fitting.routers import budget_shares
from dyndepth.methods.skipgpt import SkipGPT, shipped, tuning
from dyndepth.methods.skipgpt.presets import PRESETS, Recipe
from dyndepth.runtime.attach import attach

QUICK = SkipGPT.quick


@pytest.fixture
def trained(tiny, tiny_corpus):
    method = SkipGPT(target_speedup=1.4, **QUICK)
    return method.fit(tiny(), tiny_corpus)


@pytest.fixture
def tokens():
    return torch.randint(3, 90, (2, 12), generator=torch.Generator().manual_seed(1)).to(DEVICE)


def test_fit_meets_the_target_and_gates_differ_by_token(tiny, tiny_corpus, trained):
    windows = tiny_corpus.windows(48, 8, 0, split="calibration").to(DEVICE)
    assert block_speedup(tiny(), trained, windows) == pytest.approx(1.4, rel=0.02)
    assert trained.facts["achieved_speedup"] == pytest.approx(1.4, rel=0.02)
    model = tiny()
    with attach(model, trained) as trace:
        model(windows)
    executed = trace.executed()
    assert ((executed > 0) & (executed < 1)).any()
    assert trained.tensors["weight"].abs().sum() > 0


@pytest.mark.parametrize("normalise", [True, False])
def test_rule_is_the_formula(tiny, tokens, normalise):
    """Gates against the formula on the stream that enters each block."""
    generator = torch.Generator().manual_seed(0)
    method = SkipGPT(target_speedup=1.5, normalise=normalise)
    method.tensors = {
        "weight": torch.randn(4, 2, 32, generator=generator),
        "bias": torch.randn(4, 2, generator=generator),
    }
    method.facts = {"threshold": 0.3}
    model, streams = tiny(), []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: streams.append(args[0]))
        for layer in model.model.layers
    ]
    with torch.no_grad(), attach(model, method) as trace:
        model(tokens)
    for hook in hooks:
        hook.remove()
    seen = 0
    for layer, stream in enumerate(streams):
        if normalise:
            stream = stream / stream.square().mean(-1, keepdim=True).add(1e-6).sqrt()
        logits = torch.einsum("btd,kd->btk", stream, method.tensors["weight"][layer])
        execute = logits + method.tensors["bias"][layer] >= 0.3
        expected = execute.double().mean((0, 1)).cpu()
        torch.testing.assert_close(trace.executed()[layer], expected)
        seen += int(((expected > 0) & (expected < 1)).sum())
    assert seen > 4
    assert trace.flops["router"] == tokens.numel() * 4 * 2 * 2 * 32


@pytest.mark.parametrize("initial", ["gain", "order", "damage", "random"])
@pytest.mark.parametrize("router", ["linear", "mlp"])
def test_every_recipe_meets_the_target(tiny, tiny_corpus, initial, router):
    if (initial, router) == ("gain", "mlp"):
        with pytest.raises(UserError, match="give router=mlp another initial"):
            load_method("skipgpt", initial=initial, router=router)
        return
    method = SkipGPT(target_speedup=1.4, initial=initial, router=router, **QUICK)
    curve = tuning.train(method, tiny(), tiny_corpus, progress=False)
    before = 2 * 8 // 2 if initial == "gain" else 0
    assert len(curve) == len(method.curve) == before + 4
    assert method.facts["achieved_speedup"] == pytest.approx(1.4, rel=0.05)
    assert method.facts["tokens"] == (before + 4) * 2 * 24


def test_standardised_training_starts_at_the_same_routers(tiny, tiny_corpus):
    """Mean and deviation are a change of coordinates: before any step nothing differs."""
    found = []
    for standardise in (True, False):
        method = SkipGPT(target_speedup=1.4, standardise=standardise, **QUICK)
        router, _ = tuning.initial_router(method, tiny(), tiny_corpus, progress=False)
        found.append(router.folded())
    for name in ("weight", "bias"):
        torch.testing.assert_close(found[0][name], found[1][name], atol=1e-4, rtol=1e-3)


def test_the_paper_preset_has_the_published_settings(tiny, tiny_corpus):
    recipe = SkipGPT(preset="paper").recipe
    assert recipe == PRESETS["paper"]
    assert (recipe.router, recipe.estimator, recipe.budget) == ("linear", "gumbel", "modules")
    assert (recipe.tau_start, recipe.tau_end, recipe.steps) == (5.0, 1.0, 10_000)
    assert (recipe.penalty, recipe.objective, recipe.normalise) == (8.0, "ce", False)
    overridden = SkipGPT(preset="paper", penalty=20.0, curriculum=True).recipe
    assert (overridden.penalty, overridden.curriculum) == (20.0, True)
    method = SkipGPT(
        target_speedup=1.3,
        preset="paper",
        steps=3,
        batch=1,
        length=16,
        accumulate=2,
        precision="no",
    )
    method.fit(tiny(), tiny_corpus)
    assert method.facts["tokens"] == 3 * 2 * 16


def test_every_setting_is_a_field_of_the_method():
    from dataclasses import fields

    own = {field.name for field in fields(SkipGPT)}
    assert {field.name for field in fields(Recipe)} <= own


def test_a_fixed_input_router_is_one_plan_for_all_tokens(tiny, tiny_corpus, tokens):
    method = SkipGPT(target_speedup=1.4, reads="constant", **QUICK).fit(tiny(), tiny_corpus)
    assert method.granularity == "static"
    # A plan comes as near to the target as whole sublayers allow.
    missed = 1 / method.facts["achieved_speedup"] - 1 / 1.4
    assert abs(missed) < budget_shares(tiny(), 24).max()
    assert (method.tensors["weight"] == 0).all()
    model = tiny()
    with attach(model, method) as trace:
        model(tokens)
    executed = trace.executed()
    assert ((executed == 0) | (executed == 1)).all()
    assert (executed == 0).any()
    assert trace.flops["router"] == 0


def test_named_routers_are_used_and_bound_to_content(tiny, tiny_corpus, trained, tmp_path):
    model = tiny()
    save_fit(trained, model, tmp_path / "fit")
    method = load_method("skipgpt", routers=str(tmp_path / "fit"), target_speedup=1.4, length=24)
    method.fit(model, tiny_corpus)
    assert torch.equal(method.tensors["weight"], trained.tensors["weight"])
    assert method.routers.startswith(f"{tmp_path / 'fit'}@")
    other = load_method("skipgpt", routers=method.routers, target_speedup=1.2, length=24)
    assert other.routers == method.routers
    assert other.fit(model, tiny_corpus).facts["achieved_speedup"] == pytest.approx(1.2, rel=0.03)
    with pytest.raises(UserError, match="is for another model|are for another model"):
        load_method("skipgpt", routers=method.routers, target_speedup=1.4).fit(
            tiny(seed=1), tiny_corpus
        )
    (tmp_path / "fit" / "tensors.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="have changed"):
        load_method("skipgpt", routers=method.routers)
    with pytest.raises(UserError, match="no folder with fitted routers"):
        load_method("skipgpt", routers=str(tmp_path / "nowhere"))


def test_routers_named_by_what_earlier_versions_wrote(
    tiny, tiny_corpus, trained, tmp_path, monkeypatch
):
    """By a digest of the tensors alone, and for a model by its digest of then."""
    import hashlib

    from dyndepth.cells import identity
    from dyndepth.models import fingerprints

    model, folder = tiny(), tmp_path / "fit"
    save_fit(trained, model, folder)
    facts, now = folder / "facts.json", fingerprints.fingerprint(model)
    facts.write_text(facts.read_text().replace(now, "0123456789abcdef"))
    monkeypatch.setitem(identity.FORMER, "0123456789abcdef", now)
    digest = hashlib.sha256((folder / "tensors.safetensors").read_bytes()).hexdigest()[:12]
    asked = {"target_speedup": 1.4, "length": 24}
    method = load_method("skipgpt", routers=f"{folder}@{digest}", **asked)
    assert method.routers == load_method("skipgpt", routers=str(folder), **asked).routers
    assert not method.routers.endswith(digest)
    method.fit(model, tiny_corpus)
    assert torch.equal(method.tensors["weight"], trained.tensors["weight"])
    (folder / "tensors.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match="have changed"):
        load_method("skipgpt", routers=f"{folder}@{digest}")


def test_routers_of_wrong_shapes_are_refused(tiny, tiny_corpus, trained, tmp_path):
    model = tiny()
    trained.tensors["weight"] = trained.tensors["weight"][:, :, :16]
    save_fit(trained, model, tmp_path / "fit")
    method = load_method("skipgpt", routers=str(tmp_path / "fit"), target_speedup=1.4)
    with pytest.raises(UserError, match="a model of 4 blocks and width 32 needs"):
        method.fit(model, tiny_corpus)


def test_routers_in_a_pickle_are_refused(tiny, tiny_corpus, tmp_path):
    folder = tmp_path / "fit"
    folder.mkdir()
    torch.save({"weight": torch.zeros(4, 2, 32)}, folder / "tensors.safetensors")
    (folder / "facts.json").write_text("{}")
    method = load_method("skipgpt", routers=str(folder), target_speedup=1.4)
    with pytest.raises(UserError, match="can't be read"):
        method.fit(tiny(), tiny_corpus)


def test_two_evaluations_are_identical(tiny, trained, tokens):
    model, logits = tiny(), []
    for seed in (0, 1):
        torch.manual_seed(seed)
        with attach(model, trained):
            logits.append(model(tokens).logits)
    assert torch.equal(*logits)


def test_target_one_leaves_the_model_dense(tiny, tiny_corpus, tokens):
    model = tiny()
    method = SkipGPT(target_speedup=1.0, **QUICK).fit(model, tiny_corpus)
    with attach(model, method):
        routed = model(tokens).logits
    assert torch.equal(routed, model(tokens).logits)


def test_phase_generation_calibrates_on_generated_tokens(tiny, tiny_corpus):
    method = SkipGPT(target_speedup=1.3, phases="generation", **QUICK).fit(tiny(), tiny_corpus)
    windows = tiny_corpus.windows(48, 8, 0, split="calibration").to(DEVICE)
    assert block_speedup(tiny(), method, windows) == pytest.approx(1.3, rel=0.03)


def test_routers_of_another_model_are_refused(tiny, trained, tokens, tmp_path):
    save_fit(trained, tiny(), tmp_path / "fit")
    with pytest.raises(UserError, match="another model"):
        load_fit(SkipGPT(target_speedup=1.4, **QUICK), tiny(seed=1), tmp_path / "fit")
    deeper = tiny(num_hidden_layers=6)
    with pytest.raises(UserError, match="a model of 4 blocks, not 6"), attach(deeper, trained):
        deeper(tokens)


def test_unfitted_is_refused(tiny, tokens):
    model = tiny()
    unfitted = SkipGPT(target_speedup=2.0)
    with pytest.raises(UserError, match="not fitted.*call .fit"), attach(model, unfitted):
        pass
    with pytest.raises(UserError, match="give fit a corpus"):
        SkipGPT(target_speedup=2.0, **QUICK).fit(tiny())


def test_shipped_routers_are_taken_for_their_model_target_and_defaults_only(
    tiny, tiny_corpus, trained, tmp_path, monkeypatch
):
    monkeypatch.setattr(shipped, "ROUTERS", tmp_path)
    model, kept = tiny(), SkipGPT(target_speedup=1.4)
    kept.tensors = trained.tensors
    shipped.save_shipped(kept, model, {"command": "none", **trained.facts})
    taken = SkipGPT(target_speedup=1.4).fit(model)
    assert all(torch.equal(taken.tensors[name], kept.tensors[name]) for name in kept.tensors)
    assert taken.facts["threshold"] == trained.facts["threshold"]
    assert shipped.load_shipped(SkipGPT(target_speedup=1.5), model) is None
    assert shipped.load_shipped(SkipGPT(target_speedup=1.4, steps=7), model) is None
    assert shipped.load_shipped(SkipGPT(target_speedup=1.4, seed=1), model) is None
    assert shipped.load_shipped(kept, tiny(seed=1)) is None
    prompt_kept = SkipGPT(target_speedup=1.4, phases="generation")
    with pytest.raises(UserError, match="give fit a corpus"):
        prompt_kept.fit(model)


def test_repository_ships_routers_under_one_megabyte():
    files = [path for path in shipped.ROUTERS.rglob("*") if path.is_file()]
    assert {path.stem for path in files} >= {"1.1", "1.25", "1.5", "2"}
    assert sum(os.path.getsize(path) for path in files) < 1e6
    for path in files:
        if path.suffix == ".json":
            card = json.loads(path.read_text())
            assert card["achieved_speedup"] == pytest.approx(float(path.stem), rel=0.01)
            assert "dyndepth.methods.skipgpt.ship" in card["command"]
            assert card["held_out_loss"] > card["held_out_dense_loss"]
            # Fields may have been added since.
            told = card["method"].removesuffix(")")
            assert repr(SkipGPT(target_speedup=float(path.stem))).startswith(told)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"weight_rate": -1.0}, "weight_rate must be positive"),
        ({"tau_start": 0.0}, "tau_start must be positive"),
        ({"warm_up": 1.5}, "warm_up must lie between 0 and 1"),
        ({"surplus": 0.5}, "surplus must be at least 1"),
        ({"steps": -1}, "steps must be at least 0"),
        ({"length": 1}, "length must be at least 2"),
    ],
)
def test_settings_out_of_range_are_told(changes, told):
    with pytest.raises(UserError, match=told):
        load_method("skipgpt", **changes)


def test_a_budget_out_of_reach_is_told(tiny, tiny_corpus):
    method = SkipGPT(target_speedup=60.0, **QUICK)
    with pytest.raises(UserError, match="not 60x; ask for less"):
        method.fit(tiny(), tiny_corpus)


def test_large_targets_are_met(tiny, tiny_corpus):
    method = SkipGPT(target_speedup=4.0, **QUICK).fit(tiny(), tiny_corpus)
    assert method.facts["achieved_speedup"] == pytest.approx(4.0, rel=0.15)
